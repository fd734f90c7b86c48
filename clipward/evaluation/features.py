"""Features by which sets of pictures are compared."""

import torch
from torch import Tensor, nn

from clipward.errors import InputError, first_line


class Inception(nn.Module):
    """The network of FID (Heusel et al. 2017) as torch-fidelity has it, up to its last pooling.

    Args:
        path: of its weights, or ``inception`` to download them.

    Raises:
        InputError: where the package or the weights can't be had.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError("features: Inception needs the package torch-fidelity, which pip installs") from error
        file = None if path == "inception" else path
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
        except Exception as error:
            raise InputError(f"features: {path} gives no weights of Inception ({first_line(error)})") from error

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048)."""
        return self.network(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]
