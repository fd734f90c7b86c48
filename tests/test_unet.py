import pytest
import torch
from conftest import randomise
from diffusers import UNet2DModel

from diffusion.convert import from_diffusers, to_diffusers
from diffusion.unet import UNet, UNetConfig
from errors import InputError


def diffusers_twin(config: UNetConfig) -> UNet2DModel:
    levels = range(len(config.channels))
    names = ["Attn" if level in config.attention_levels else "" for level in levels]
    return UNet2DModel(
        in_channels=config.image_channels,
        out_channels=config.out_channels or config.image_channels,
        block_out_channels=config.channels,
        layers_per_block=config.num_res_blocks,
        down_block_types=[f"{name}DownBlock2D" for name in names],
        up_block_types=[f"{name}UpBlock2D" for name in reversed(names)],
        attention_head_dim=None,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=(8, 16), num_res_blocks=1, attention_levels=(1,), norm_groups=4),
        UNetConfig(channels=(8, 8, 24), num_res_blocks=2, attention_levels=(0, 2), norm_groups=8, out_channels=6),
        UNetConfig(channels=(16, 8, 8, 16), num_res_blocks=3, attention_levels=(), norm_groups=4, norm_eps=1e-5),
    ],
)
def test_equals_diffusers_under_the_key_map(config: UNetConfig) -> None:
    ours, theirs = randomise(UNet(config)).eval(), diffusers_twin(config).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 17, 999])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, atol=1e-5, rtol=1e-5)


def test_the_key_map_is_its_own_inverse() -> None:
    state = UNet(UNetConfig(channels=(8, 16), norm_groups=4, attention_levels=(1,))).state_dict()
    assert from_diffusers(to_diffusers(state)).keys() == state.keys()


@pytest.mark.slow
def test_the_default_is_the_celebahq_network() -> None:
    config = UNetConfig()
    ours, theirs = UNet(config), diffusers_twin(config)
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(113.67e6, rel=1e-3)
    theirs.load_state_dict(to_diffusers(randomise(ours).state_dict()))
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs.eval()(x, t).sample, atol=1e-4, rtol=1e-4)


def test_a_patch_folds_pixels_into_channels() -> None:
    config = UNetConfig(patch=4, channels=(8, 16), norm_groups=4, attention_levels=(), out_channels=6)
    network = randomise(UNet(config))
    assert config.stride == 8
    assert network(torch.randn(2, 3, 16, 32), torch.tensor([1, 2])).shape == (2, 6, 16, 32)


def test_a_new_network_puts_out_zero() -> None:
    network = UNet(UNetConfig(channels=(8, 16), norm_groups=4))
    assert network(torch.randn(1, 3, 8, 8), torch.tensor([3])).abs().max() == 0


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"unet.channels: \[48, 80\] given; multiples of norm_groups \(32\)"):
        UNetConfig(channels=(48, 80))
