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


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"unet.channels: got \[48, 80\], expected multiples of norm_groups \(32\)"):
        UNetConfig(channels=(48, 80))
