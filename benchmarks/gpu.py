"""Measure a step on a GPU, one setting after another, beside the time that its arithmetic takes.

    python benchmarks/gpu.py

takes Ho et al.'s network for 256×256 pixels with random weights, and prints milliseconds a picture of a forward pass,
of a forward and a backward pass to x_t, and of a training step, for float32, TF32, channels_last, bf16,
``torch.compile`` and CUDA graphs. The *floor* of each is its floating-point operations over the speed of a large matrix
product in the same precision on the same device. The last line is of the data path: pictures a second to the host and
to PNG files. Without a GPU, or with ``--quick true``, it takes a small network, so that the script can be tried
anywhere; a CPU that doesn't compute in bf16 leaves that out.
"""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipward.cli.precision import choose_precision
from clipward.networks.unet import UNet, UNetConfig
from clipward.sampler import to_picture

FORWARDS = {"forward": 1, "to x_t": 2, "training": 3}  # a backward pass to the input, or to weights, costs as much
SMALL = UNetConfig(channels=(32, 64), num_res_blocks=1, attention_levels=(1,))


def measure(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one run, the best of ``repeats`` after two that warm up."""
    best = float("inf")
    for i in range(repeats + 2):
        synchronise()
        begun = time.perf_counter()
        run()
        synchronise()
        best = min(best, time.perf_counter() - begun) if i >= 2 else best
    return best


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_speed(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, 3)


@contextmanager
def precision_of(device: torch.device, tf32: bool, bf16: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def passes(network: UNet, x: Tensor, t: Tensor, optimiser: torch.optim.Optimizer) -> dict[str, Callable[[], object]]:
    """What is timed."""

    def forward() -> None:
        with torch.no_grad():
            network(x, t)

    def gradient() -> Tensor:
        network.requires_grad_(False)
        at = x.detach().requires_grad_()
        return torch.autograd.grad(network(at, t).square().sum(), at)[0]

    def train() -> None:
        network.requires_grad_(True)
        network(x, t).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return {"forward": forward, "to x_t": gradient, "training": train}


def bench(batch: int | None = None, repeats: int = 5, quick: bool = False, compile: bool = True) -> None:
    """Print the tables.

    Args:
        batch: pictures of a pass; 16 on a GPU, 2 without.
        repeats: runs of each setting, of which the best counts.
        quick: take a small network.
        compile: also take ``torch.compile``, which needs a C++ compiler on a CPU and a minute or more.
    """
    on_gpu = torch.cuda.is_available()
    device, quick = torch.device("cuda" if on_gpu else "cpu"), quick or not on_gpu
    config, size, batch = (SMALL, 32, batch or 2) if quick else (UNetConfig(), 256, batch or 16)
    print(
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {size}×{size}, batch {batch}"
    )
    settings: dict[str, dict[str, Any]] = {
        "float32": {},
        "channels_last": {"channels_last": True},
        "bf16": {"bf16": True},
    }
    settings["bf16, channels_last"] = {"bf16": True, "channels_last": True}
    if not on_gpu and choose_precision("cpu")[0] == "32-true":
        settings = {name: setting for name, setting in settings.items() if not setting.get("bf16")}
    if on_gpu:
        settings = {"TF32": {"tf32": True}, **settings}
    if compile:
        last = list(settings.values())[-1]
        settings["the last, compiled"] = {**last, "mode": "default"}
        if on_gpu:
            settings["the same, CUDA graphs"] = {**last, "mode": "reduce-overhead"}
    print("\n| setting | pass | ms a picture | floor, ms | share of the floor |\n|---|---|---|---|---|")
    for name, setting in settings.items():
        torch.manual_seed(0)
        network = UNet(config).to(device).eval()
        x, t = torch.randn(batch, 3, size, size, device=device), torch.full((batch,), 500, device=device)
        if setting.get("channels_last"):
            network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t)
        operations = counter.get_total_flops()
        optimiser = torch.optim.AdamW(network.parameters(), 1e-6, fused=True)
        if "mode" in setting:
            network.compile(mode=setting["mode"])
        with precision_of(device, bool(setting.get("tf32")), bool(setting.get("bf16"))):
            speed = matmul_speed(
                device, torch.bfloat16 if setting.get("bf16") else torch.float32, 256 if quick else 8192
            )
            for which, run in passes(network, x, t, optimiser).items():
                seconds, floor = measure(run, repeats) / batch, FORWARDS[which] * operations / speed / batch
                print(
                    f"| {name} | {which} | {1e3 * seconds:.2f} | {1e3 * floor:.2f} | {floor / seconds:.0%} |",
                    flush=True,
                )

    pictures = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    to_host = measure(lambda: [to_picture(each) for each in pictures], repeats) / batch
    made = [to_picture(each) for each in pictures]
    write = measure(lambda: [each.save(io.BytesIO(), "png", compress_type=3) for each in made], repeats) / batch
    print(f"\nto the host: {1 / to_host:.0f} pictures a second; as PNG: {1 / write:.0f} pictures a second")


if __name__ == "__main__":
    auto_cli(bench)
