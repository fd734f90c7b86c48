"""What a picture costs: passes through the network and CLIP, seconds, and the peak of memory."""

import resource
import time
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


def peak_bytes(device: torch.device) -> int:
    """The most memory: on a GPU since its statistics were reset, on a CPU of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Cost:
    """Counts what a batch takes: passes through the network and CLIP, seconds, and the peak of memory.

    On a GPU the peak is of the batch; on a CPU it is the process's so far.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.device, self.counts = module.device, defaultdict(float)
        critics = [clip.model.visual for clip in module.critics.loaded()]
        self.hooks = [module.unet.register_forward_hook(self._counted("network_forwards", "network_backwards"))]
        self.hooks += [critic.register_forward_hook(self._counted("critic_passes", None)) for critic in critics]

    def _counted(self, forward: str, backward: str | None) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.counts[forward] += len(output)
            if backward is not None and output.requires_grad:
                output.register_hook(lambda gradient: self._add(backward, len(gradient)))

        return hook

    def _add(self, name: str, count: int) -> None:
        self.counts[name] += count

    def start(self) -> None:
        self.counts = defaultdict(float, dict.fromkeys(("network_forwards", "network_backwards", "critic_passes"), 0.0))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.since = time.perf_counter()

    def stop(self, pictures: int) -> dict[str, float]:
        """A picture's share; the peak is not shared."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.counts["seconds"] = time.perf_counter() - self.since
        return {name: count / pictures for name, count in self.counts.items()} | {"peak_bytes": peak_bytes(self.device)}

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
