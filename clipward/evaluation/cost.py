"""What a picture costs: passes through the networks, seconds and memory."""

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipward.networks.clip import Clip


@dataclass(frozen=True)
class Cost:
    """What one picture costs.

    Args:
        network_forwards: forward passes through the U-Net; a batch counts one for each of its pictures, and none for
            those that only fill it up.
        network_backwards: backward passes through the U-Net, counted likewise.
        clip_passes: pictures that the image towers of the guiding CLIPs encode, counted likewise.
        seconds: its share of the seconds that its batch takes.
        peak_bytes: the most memory in use while its batch was made. It is not divided by the batch size.
    """

    network_forwards: float = 0.0
    network_backwards: float = 0.0
    clip_passes: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def network_passes(self) -> float:
        """Forward and backward passes through the U-Net."""
        return self.network_forwards + self.network_backwards

    def multiply(self, factor: float) -> "Cost":
        """The cost of ``factor`` such pictures, made one after another: the peak of memory stays the same."""
        return Cost(
            self.network_forwards * factor,
            self.network_backwards * factor,
            self.clip_passes * factor,
            self.seconds * factor,
            self.peak_bytes,
        )


def average_costs(costs: Sequence[Cost]) -> Cost:
    """The mean of each count and of the seconds, and the highest peak of memory."""
    number = len(costs)
    return Cost(
        sum(cost.network_forwards for cost in costs) / number,
        sum(cost.network_backwards for cost in costs) / number,
        sum(cost.clip_passes for cost in costs) / number,
        sum(cost.seconds for cost in costs) / number,
        max(cost.peak_bytes for cost in costs),
    )


class CostMeter:
    """Measures what batches of pictures cost, from :meth:`start` to :meth:`stop`.

    On a GPU the peak of memory is that of the batch; on a CPU it is that of the process since it started.

    Args:
        network: the diffusion model's U-Net.
        clips: the CLIPs that guide or score.
        share_asked: gives the share of the pictures that they see now which was asked for.
    """

    def __init__(self, network: nn.Module, clips: Iterable[Clip], share_asked: Callable[[], float]) -> None:
        self._device, self._share_asked = next(network.parameters()).device, share_asked
        self._forwards = self._backwards = self._clip_passes = 0.0
        self._started = time.perf_counter()
        self._hooks = [network.register_forward_hook(self._count_network)]
        for clip in clips:
            self._hooks.append(clip.model.get_submodule("visual").register_forward_hook(self._count_clip))

    def _count_network(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._forwards += len(output) * self._share_asked()
        if output.requires_grad:
            output.register_hook(self._count_gradient)

    def _count_gradient(self, gradient: Tensor) -> None:
        self._backwards += len(gradient) * self._share_asked()

    def _count_clip(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._clip_passes += len(output) * self._share_asked()

    def start(self) -> None:
        """Set all counts to zero."""
        self._forwards = self._backwards = self._clip_passes = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    def stop(self, pictures: int) -> Cost:
        """The cost of each of ``pictures`` that were made since :meth:`start`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        return Cost(
            self._forwards / pictures,
            self._backwards / pictures,
            self._clip_passes / pictures,
            seconds / pictures,
            peak_bytes(self._device),
        )

    def remove(self) -> None:
        """Remove the hooks from the networks."""
        for hook in self._hooks:
            hook.remove()


def peak_bytes(device: torch.device) -> int:
    """The most memory in use: on a GPU since its statistics were reset, on a CPU since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
