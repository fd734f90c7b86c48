"""Features by the networks of FID and of FD-DINOv2, as torch-fidelity has them."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipward.errors import InputError, first_line, shorten
from clipward.files import check_archive
from clipward.networks.channels import to_rgb

DINOV2 = {  # by the width of the network: torch-fidelity's name, and timm's of the architecture
    384: ("dinov2-vit-s-14", "vit_small_patch14_dinov2"),
    768: ("dinov2-vit-b-14", "vit_base_patch14_dinov2"),
    1024: ("dinov2-vit-l-14", "vit_large_patch14_dinov2"),
    1536: ("dinov2-vit-g-14", "vit_giant_patch14_dinov2"),
}
DINOV2_NAMES = {"dinov2": "dinov2-vit-l-14", **{name: name for name, _ in DINOV2.values()}}
EXPECTED = f"judge, inception, {', '.join(DINOV2_NAMES)}, or a file with the weights of Inception or DINOv2"


class Extractor(nn.Module):
    """One of torch-fidelity's feature extractors, for pictures in [-1, 1].

    Args:
        network: torch-fidelity's, which takes 8-bit pictures and resizes them itself.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, features)."""
        return self.network(((to_rgb(image) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]


def load_extractor(name: str) -> Extractor:
    """Load the network of FID or of FD-DINOv2.

    Args:
        name: ``inception``, the network of FID up to its last pooling (Heusel et al. 2017); ``dinov2``, which is
            ``dinov2-vit-l-14``, the network of FD-DINOv2 (Stein et al. 2023), or a smaller or larger one of
            torch-fidelity's names; these are downloaded on first use. Or a file: torch-fidelity's weights of
            Inception, or those that facebookresearch/dinov2 publishes, such as ``dinov2_vitl14_pretrain.pth``.

    Raises:
        InputError: where torch-fidelity or the weights are missing, or are none of these.
    """
    try:
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(f"features: {name} needs torch-fidelity; use pip install 'torch-fidelity>=0.4,<1'") from error
    try:
        if name in DINOV2_NAMES:
            return Extractor(FeatureExtractorDinoV2(DINOV2_NAMES[name], ["dinov2"]))
        if name == "inception":
            return Extractor(FeatureExtractorInceptionV3(name, ["2048"]))
        check_archive(Path(name), "features")
        state = torch.load(name, map_location="cpu", weights_only=True)  # tensors alone: no code that stands in it runs
        if isinstance(state, dict) and "patch_embed.proj.weight" in state:
            return Extractor(_read_dinov2(state))
        return Extractor(FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=name))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"features: got {shorten(name)}, expected {EXPECTED} ({first_line(error)})") from error


def _read_dinov2(state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's extractor with weights of facebookresearch/dinov2, which it only downloads itself."""
    import timm
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    width = state["patch_embed.proj.weight"].shape[0]
    if width not in DINOV2 or "register_tokens" in state:
        kind = "registers" if "register_tokens" in state else f"a width of {width}"
        raise InputError(f"features: got a vision transformer with {kind}, expected one of {', '.join(DINOV2_NAMES)}")
    name, architecture = DINOV2[width]

    class FromFile(FeatureExtractorDinoV2):
        def __init__(self, model: nn.Module) -> None:
            FeatureExtractorBase.__init__(self, name, ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = model
            self.requires_grad_(False)
            self.eval()

    size = FeatureExtractorDinoV2.INPUT_IMAGE_SIZE
    model: Any = timm.create_model(architecture, pretrained=False, img_size=size, num_classes=0)
    fitted = {**state, "pos_embed": _resize_positions(state["pos_embed"], size // 14)}
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(fitted, model))
    return FromFile(model)


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + N², D) -> (1, 1 + side², D), as DINOv2 does: bicubic, by a factor that 0.1 is added to."""
    first, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    square = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    scale = (side + 0.1) / old
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, resized.flatten(2).mT], dim=1)
