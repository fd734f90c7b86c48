"""A network in parts, one in each process (FSDP2)."""

from lightning.pytorch.strategies import ModelParallelStrategy

from clipward.errors import InputError
from clipward.lightning_modules.reproducible import Reproducible


class Sharded(ModelParallelStrategy):
    """Each process has its own pictures and a part of every block; a checkpoint is one file that any strategy loads."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        module = self.lightning_module
        if isinstance(module, Reproducible) and not module.can_shard:  # its processes would train apart in silence
            raise InputError("trainer.strategy: got fsdp, which serves diffusion models alone; use -c ddp")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
