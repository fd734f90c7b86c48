"""A network in parts, one in each process (FSDP2)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the parameters of a network, block by block, over the processes of ``mesh``."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def own_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name; those of a sharded network as this process's parts."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(network.named_parameters())


def full_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name in float32, with all their parts in every process; what has no parts is not copied."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().float()
        for name, value in weights.items()
    }


@torch.no_grad()
def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name into a network, whether they or it are in parts."""
    for name, p in own_parameters(network).items():
        value = weights[name]
        if isinstance(p, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(p.device, p.dtype), p.device_mesh, p.placements)
        p.copy_(value)
