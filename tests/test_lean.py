"""The lean backward pass through a frozen network: the same gradients from fewer saved activations."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import TINY_UNET, randomise

from clipward.allocator import VARIABLE, keep_freed_memory
from clipward.networks.unet import UNet, UNetConfig

CONFIGS = {
    "plain": TINY_UNET,
    "diffusers' padding": replace(TINY_UNET, downsample_padding=1),
    "OpenAI's": replace(TINY_UNET, scale_shift_norm=True, resblock_updown=True, out_channels=6, head_channels=4),
}


def input_gradient(network: UNet, x: torch.Tensor, autocast: bool) -> torch.Tensor:
    x = x.clone().requires_grad_()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        return torch.autograd.grad(network(x, torch.tensor([3, 70])).float().square().sum(), x)[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_torchs_own_layers(name: str, autocast: bool) -> None:
    network = randomise(UNet(CONFIGS[name])).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    own = input_gradient(network, x, autocast)
    network.requires_grad_(False)
    found = input_gradient(network, x, autocast)
    assert own.abs().max() > 0
    torch.testing.assert_close(found, own, atol=0, rtol=2e-2 if autocast else 1e-6)


def saved_bytes(network: UNet, x: torch.Tensor) -> int:
    """What a forward pass keeps for the backward pass, without the parameters."""
    own = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x.requires_grad_(), torch.tensor([3])).sum()
    return sum(kept.values())


def test_less_is_kept_where_the_weights_are_frozen() -> None:
    config = UNetConfig(channels=(16, 32), num_res_blocks=2, attention_levels=(), norm_groups=4)
    network, x = randomise(UNet(config)).eval(), torch.randn(1, 3, 32, 32)
    whole = saved_bytes(network, x)
    network.requires_grad_(False)
    assert saved_bytes(network, x) < 0.5 * whole


def test_weights_that_train_still_get_their_gradients() -> None:
    network = randomise(UNet(TINY_UNET))
    network(torch.randn(2, 3, 16, 16), torch.tensor([3, 70])).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_allocator_is_left_alone_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    assert not keep_freed_memory()
