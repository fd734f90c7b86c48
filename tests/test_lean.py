"""The lean backward pass through a frozen network: the same gradients from fewer saved activations."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import TINY_UNET, randomise

from clipward.allocator import VARIABLE, keep_freed_memory
from clipward.networks.lean import norm_silu
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
        return torch.autograd.grad(network(x, torch.tensor([3, 70])).double().square().sum(), x)[0]


def weight_gradients(network: UNet, x: torch.Tensor) -> torch.Tensor:
    network.zero_grad()
    network(x, torch.tensor([3, 70])).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_the_same_whether_weights_train_or_not(name: str, autocast: bool) -> None:
    network = randomise(UNet(CONFIGS[name])).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if not autocast:  # in float64, as processors round float32 in one way with weights and in another without
        network, x = network.double(), x.double()
    own = input_gradient(network, x, autocast)
    network.requires_grad_(False)
    found = input_gradient(network, x, autocast)
    assert own.abs().max() > 0
    torch.testing.assert_close(found, own, atol=0, rtol=2e-2 if autocast else 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_torchs_own_layers(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(UNet(CONFIGS[name])).eval().requires_grad_(False)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = input_gradient(network, x, autocast)
    with monkeypatch.context() as patch:
        patch.setattr("clipward.networks.lean.needs_backward", lambda _: False)
        own = input_gradient(network, x, autocast)
    assert (found - own).norm() < (2e-2 if autocast else 1e-5) * own.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_that_train_get_the_gradients_of_torchs_own_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(UNet(CONFIGS[name]))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = weight_gradients(network, x)
    with monkeypatch.context() as patch:
        patch.setattr("clipward.networks.lean.needs_backward", lambda _: False)
        own = weight_gradients(network, x)
    assert len(found) == sum(p.numel() for p in network.parameters())
    assert (found - own).norm() < 1e-5 * own.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_normalised_activation_has_its_exact_gradients(memory_format: torch.memory_format) -> None:
    norm = randomise(torch.nn.GroupNorm(4, 8, eps=1e-3)).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).mul(3).add(1).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    inputs = (x.requires_grad_(), norm.weight, norm.bias)
    torch.testing.assert_close(norm_silu(norm, x), torch.nn.functional.silu(norm(x)))
    found = torch.autograd.grad(norm_silu(norm, x), inputs, grad)
    torch.testing.assert_close(found, torch.autograd.grad(torch.nn.functional.silu(norm(x)), inputs, grad))


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


def test_less_is_kept_where_the_weights_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(channels=(16, 32), num_res_blocks=2, attention_levels=(), norm_groups=4)
    network, x = randomise(UNet(config)).eval(), torch.randn(1, 3, 32, 32)
    training = saved_bytes(network, x)
    network.requires_grad_(False)
    frozen = saved_bytes(network, x)
    monkeypatch.setattr("clipward.networks.lean.needs_backward", lambda _: False)
    torchs = saved_bytes(network.requires_grad_(True), x)
    assert frozen < 0.5 * torchs
    assert frozen < training < torchs


def test_the_allocator_is_left_alone_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    assert not keep_freed_memory()
