"""Layers that keep little for a backward pass, and the order of numbers in memory that suits a device.

Guidance through the U-Net needs the gradient of x_t alone. torch's convolution keeps its input all the same, for a
gradient of its weight that no one asks for. Here a convolution whose weights are frozen keeps its weight alone. A
normalised activation keeps every step on the way in torch; here it keeps its input, and the backward pass starts from
there. The gradients are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def best_order(device: torch.device) -> torch.memory_format:
    """The order of (B, C, H, W) in memory that convolutions of a device like best.

    On a CPU, all channels of a pixel lie together: with AMX, a bf16 convolution of 256×256 pixels takes a fifth of the
    time, and one in float32 a tenth less. On a GPU, GroupNorm would reorder everything twice.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def arrange(x: Tensor) -> Tensor:
    """Put (B, C, H, W) in the best order."""
    return x.contiguous(memory_format=best_order(x.device))


def arrange_weights(network: nn.Module, device: torch.device) -> None:
    """Put the weights of convolutions in the best order too, else every pass copies them into it."""
    if best_order(device) == torch.channels_last:
        network.to(memory_format=torch.channels_last)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, whose backward pass keeps the weight alone where it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if needs_backward(x) and not self.weight.requires_grad:
            return _FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``silu(norm(x))``, of which x alone is kept for the backward pass; (B, C, H, W) -> the same."""
    if needs_backward(x):
        return _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


def needs_backward(x: Tensor) -> bool:
    """Whether a gradient goes to x; ``torch.compile`` finds out itself what it must keep."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.stride, ctx.padding = x.shape, x.dtype, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight, stride, padding = weight.to(grad.dtype), list(ctx.stride), list(ctx.padding)
        if (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0):  # torch's own way back takes twice as long
            return F.conv2d(grad, weight.transpose(0, 1)).to(ctx.dtype), None, None, None, None
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=best_order(grad.device))
        needed = [True, False, False]
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, needed
        )
        return found[0].to(ctx.dtype), None, None, None, None


class _NormSiLU(torch.autograd.Function):
    """With x̂ = (x − mean)·rstd of a group and y = weight·x̂ + bias, silu(y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = arrange(x)
        mixed = x.device.type == "cpu"  # where float32 weights may go with half precision
        given = (weight, bias) if mixed else (weight.to(x.dtype), bias.to(x.dtype))
        y, mean, rstd = torch.native_group_norm(x, *given, len(x), x.shape[1], x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        mean, rstd = mean[:, :, None].to(weight.dtype), rstd[:, :, None].to(weight.dtype)  # (B, G, 1)
        groups = mean.shape[1]

        def split(channels: Tensor) -> Tensor:  # (B or 1, C) -> (B or 1, G, C/G)
            return channels.to(weight.dtype).unflatten(-1, (groups, -1))

        def spread(values: Tensor) -> Tensor:  # (B, G, C/G or 1) -> (B, C, 1, 1)
            return values.expand(-1, -1, x.shape[1] // groups).flatten(1).to(x.dtype)[:, :, None, None]

        gamma, beta = split(weight[None]), split(bias[None])
        slope = rstd * gamma  # of y against x
        y = torch.addcmul(spread(beta - mean * slope), x, spread(slope))
        grad = torch.ops.aten.silu_backward(grad, y)
        total, along = split(grad.sum((2, 3))), split(torch.mul(grad, x, out=y).sum((2, 3)))  # with 1, and with x
        along = (along - mean * total) * rstd  # with x̂
        count = x[0].numel() // groups
        of_mean = (gamma * total).sum(2, keepdim=True) * rstd / count
        of_rstd = (gamma * along).sum(2, keepdim=True) * rstd**2 / count
        found = torch.addcmul(spread(mean * of_rstd - of_mean), x, spread(-of_rstd), out=y)
        found.addcmul_(grad, spread(slope))
        return found, along.sum(0).flatten(), total.sum(0).flatten(), None, None
