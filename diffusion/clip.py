"""CLIP, frozen, as a critic of pictures: the only place that imports open_clip."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.weights import state_hash, whole
from errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


class Clip:
    """A frozen open_clip model with differentiable preprocessing.

    Args:
        model: an open_clip model; it is put in evaluation mode, in float32, and its parameters are frozen.
        tokenizer: its own; ``tokenizer(text)`` cuts in silence, so lengths are checked before.
        preprocess: ``size``, ``mean``, ``std`` and ``interpolation``, as open_clip names them.
        name: what it was loaded from, for the record.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: dict[str, Any], name: str = "") -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.name = tokenizer, preprocess, name
        self.context_length: int = tokenizer.context_length
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, name: str) -> "Clip":
        """Load an open_clip folder, or ``ARCHITECTURE/PRETRAINED`` such as ``ViT-B-32-quickgelu/openai``.

        Raises:
            InputError: where there is no such folder, name or weights.
        """
        import open_clip

        folder = Path(name.removeprefix("local-dir:"))
        if folder.is_dir():
            missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
            if missing:
                raise InputError(f"clip: {name} has no {missing[0]}; an open_clip folder would do")
            source: dict[str, Any] = {"model_name": f"local-dir:{folder}"}
        else:
            architecture, _, pretrained = name.partition("/")
            if (architecture, pretrained) not in open_clip.list_pretrained():
                raise InputError(
                    f"clip: {name!r} is neither a folder nor a pretrained model of open_clip; a folder with "
                    f"{CONFIG_FILE}, or a name such as ViT-B-32-quickgelu/openai would do"
                )
            source = {"model_name": architecture, "pretrained": pretrained}
        model = open_clip.create_model(**source, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(source["model_name"])
        return cls(model, tokenizer, dict(model.visual.preprocess_cfg), name)

    def to(self, device: torch.device | str) -> "Clip":
        self.model.to(device)
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names and values of the weights, 16 digits."""
        return state_hash(self.model.state_dict())

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, D), of unit length; each text is encoded once and kept.

        Raises:
            InputError: where a text is empty or longer than the context.
        """
        device = next(self.model.parameters()).device
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._check_length(text)
                features = self.model.encode_text(self.tokenizer([text]).to(device))
                self._texts[text] = F.normalize(features.float(), dim=-1)[0]
        return torch.stack([self._texts[text].to(device) for text in texts])

    def _check_length(self, text: str) -> None:
        if not text.strip():
            raise InputError("text: an empty text given; a sentence that says what to draw would do")
        over = len(self.tokenizer.encode(text)) + 2 - self.context_length
        if over > 0:
            raise InputError(
                f"text: {text!r} is {over} tokens too long for this CLIP, which reads {self.context_length}"
            )

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, D), of unit length, differentiable, in float32."""
        with torch.autocast(image.device.type, enabled=False):
            pixels = preprocess(image.float(), self.preprocess)
            return F.normalize(self.model.encode_image(pixels).float(), dim=-1)


def preprocess(image: Tensor, config: dict[str, Any]) -> Tensor:
    """Pictures in [-1, 1] as CLIP wants them: resized to its size with antialias, by its own mean and std."""
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    pixels = (image + 1) / 2
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode=config["interpolation"], antialias=True, align_corners=False)
    mean, std = (pixels.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def new_model(model_cfg: dict[str, Any]) -> nn.Module:
    """A new open_clip model from ``embed_dim``, ``vision_cfg`` and ``text_cfg``, with random weights."""
    from open_clip import CLIP

    return CLIP(**model_cfg)


def new_tokenizer(context_length: int) -> Any:
    """CLIP's own byte-pair encoder."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def save_folder(folder: Path, model: nn.Module, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    """Write an open_clip folder, weights in half precision, that open_clip loads with ``local-dir:``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with whole(folder / WEIGHTS_FILE) as aside:
        save_file({k: v.contiguous().cpu() for k, v in half.items()}, aside)


def contrastive_loss(rank: int = 0, world_size: int = 1) -> nn.Module:
    """The symmetric InfoNCE loss of CLIP over all devices: ``loss(image_features, text_features, logit_scale)``."""
    from open_clip import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
