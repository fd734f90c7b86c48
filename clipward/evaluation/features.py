"""Features by the Inception network of FID."""

from pathlib import Path

import torch
from torch import Tensor, nn

from clipward.errors import InputError, first_line, shorten
from clipward.files import check_archive
from clipward.networks.channels import to_rgb


class Inception(nn.Module):
    """The Inception network of FID (Heusel et al. 2017) as torch-fidelity has it, up to its last pooling.

    Args:
        path: the file with its weights, or ``inception`` to download them.

    Raises:
        InputError: where torch-fidelity or the weights are missing.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(f"features: {path} needs torch-fidelity; use pip install 'clipward[inception]'") from error
        file = None if path == "inception" else path
        try:
            if file is not None:  # torch-fidelity would run code that stands in it; tensors alone pass here
                check_archive(Path(file), "features")
                torch.load(file, map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"features: got {shorten(path)}, expected judge, inception or a file with Inception's weights "
                f"({first_line(error)})"
            ) from error

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 2048)."""
        return self.network(((to_rgb(image) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]
