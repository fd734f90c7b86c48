import pytest
import torch
from conftest import randomise

from clipward.errors import InputError
from clipward.networks.unet import UNet, UNetConfig


def test_a_patch_folds_pixels_into_channels() -> None:
    config = UNetConfig(patch=4, channels=(8, 16), norm_groups=4, attention_levels=(), out_channels=6)
    network = randomise(UNet(config))
    assert config.stride == 8
    assert network(torch.randn(2, 3, 16, 32), torch.tensor([1, 2])).shape == (2, 6, 16, 32)


def test_a_new_network_puts_out_zero() -> None:
    network = UNet(UNetConfig(channels=(8, 16), norm_groups=4))
    assert network(torch.randn(1, 3, 8, 8), torch.tensor([3])).abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": (48, 80)}, "unet.channels: got [48, 80], expected multiples of norm_groups (32)"),
        ({"channels": ()}, "unet.channels: got [], expected numbers above 0, the first even and 4 or more"),
        ({"channels": (8, -8), "norm_groups": 4}, "unet.channels: got [8, -8], expected numbers above 0"),
        (
            {"channels": (5, 10), "norm_groups": 5},
            "unet.channels: got [5, 10], expected numbers above 0, the first even",
        ),
        (
            {"channels": (2,), "norm_groups": 1},
            "unet.channels: got [2], expected numbers above 0, the first even and 4",
        ),
        ({"norm_groups": 0}, "unet.norm_groups: got 0, expected 1 to 65536"),
        ({"image_channels": 0}, "unet.image_channels: got 0, expected 1 to 1024"),
        ({"out_channels": -3}, "unet.out_channels: got -3, expected 1 to 2048"),
        ({"patch": 0}, "unet.patch: got 0, expected 1 to 256"),
        ({"num_res_blocks": 0}, "unet.num_res_blocks: got 0, expected 1 to 128"),
        ({"head_channels": 0}, "unet.head_channels: got 0, expected 1 to 65536"),
        ({"head_channels": 48}, "unet.head_channels: got 48, expected a divisor of [512], the channels with attention"),
        ({"dropout": 1.0}, "unet.dropout: got 1.0, expected 0 or more, below 1"),
        ({"norm_eps": 0.0}, "unet.norm_eps: got 0.0, expected a number above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError) as raised:
        UNetConfig(**settings)
    assert str(raised.value).startswith(message)
