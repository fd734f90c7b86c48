"""What the channels of a picture mean: 1 is grey, 3 are RGB, 4 are RGB and opacity."""

import torch
from torch import Tensor

from clipward.errors import InputError

SHOWN = (1, 3, 4)  # numbers of channels that a picture can be shown by


def check_shown(channels: int) -> None:
    """Raise :class:`InputError` where no picture has so many channels, so that it can be neither seen nor saved."""
    if channels not in SHOWN:
        raise InputError(
            f"unet.image_channels: got {channels}, expected 1 (grey), 3 (RGB) or 4 (RGBA) for pictures; tensors of any "
            "number are drawn by Model.sample in Python, without a text and with return_tensors=True"
        )


def to_rgb(image: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, 3, H, W), for a network that sees RGB; differentiable.

    Grey is repeated, and RGBA is laid on white: α·RGB + (1 − α), α being the fourth channel, scaled and clamped to
    [0, 1].

    Raises:
        InputError: where C is not 1, 3 or 4.
    """
    channels = image.shape[1]
    if channels == 3:
        return image
    check_shown(channels)
    if channels == 1:
        return image.expand(-1, 3, -1, -1)
    opacity = ((image[:, 3:] + 1) / 2).clamp(0, 1)
    return torch.addcmul(1 - opacity, opacity, image[:, :3])
