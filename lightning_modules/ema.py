"""An exponential moving average of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipward.networks.sharding import fill, own_parameters


class EMA:
    """Averages the parameters of ``network``: ``average = decay·average + (1 − decay)·weight`` after each step.

    The averages are float32 whatever the parameters are: half precision has no room for what a step adds. Those of a
    network in parts are in parts.

    Args:
        network: whose parameters are averaged, in their own order and on their own device.
        decay: the limit of the decay, which starts low and rises as (1 + n) / (10 + n).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.reset()

    def reset(self) -> None:
        """Begin with what the network has."""
        self.average = {name: p.detach().float().clone() for name, p in own_parameters(self.network).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.average = {name: state[name].float().clone() for name in self.average}

    def decay_at(self, n: int) -> float:
        """The decay of step ``n`` (1 is the first)."""
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take the weights in after step ``n``."""
        decay = self.decay_at(n)
        for name, p in own_parameters(self.network).items():
            self.average[name] = self.average[name].to(p.device).lerp_(p.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        own = {name: p.detach().clone() for name, p in own_parameters(self.network).items()}
        fill(self.network, self.average)
        try:
            yield
        finally:
            fill(self.network, own)
