"""Layers that keep little for a backward pass to their input, where their weights are frozen.

Guidance through the U-Net needs the gradient of x_t alone. torch's convolution keeps its input all the same, for a
gradient of its weight that no one asks for, and a normalised activation keeps every step on the way. Here a convolution
keeps its weight alone, and GroupNorm with SiLU keeps its input and is computed again. The gradients are the same.
Layers whose weights train are torch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, whose backward pass keeps the weight alone where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if is_frozen(self.weight, x):
            return _FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``silu(norm(x))``, computed again in the backward pass where the norm is frozen; (B, C, H, W) -> the same."""
    if is_frozen(norm.weight, x):
        return _FrozenNormSiLU.apply(x, norm)
    return F.silu(norm(x))


def is_frozen(weight: Tensor, x: Tensor) -> bool:
    """Whether a gradient goes to the input alone; ``torch.compile`` finds out itself what it must keep."""
    return (
        not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    )


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.stride, ctx.padding = x.shape, x.dtype, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        found = conv2d_input(ctx.shape, weight.to(grad.dtype), grad, ctx.stride, ctx.padding)
        return found.to(ctx.dtype), None, None, None, None


class _FrozenNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm, device = norm, x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return F.silu(norm(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            return torch.autograd.grad(F.silu(ctx.norm(x)), x, grad)[0], None
