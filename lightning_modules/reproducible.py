"""What all training shares: it goes on after a stop as if there had been none, and stops where numbers break."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipward.diffusion.sampling import seed_of
from clipward.errors import InputError


class Reproducible(L.LightningModule):
    """Before each batch, the seed is set to a function of (seed, epoch, batch, rank), so that it has no state to save.

    With a loader that knows its place, a fit that is resumed within an epoch ends with the same bits.

    A gradient that is not finite stops the training before the step, and weights that are not finite are never saved.
    """

    training_seed: int | None = None

    def on_fit_start(self) -> None:
        if self.training_seed is None:
            self.training_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.training_seed, self.current_epoch, batch_idx, self.global_rank))
        self._batch_idx = batch_idx

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision == "16-mixed" and self.device.type == "cuda":
            return  # float16 overflows now and then; its scaler leaves such a step out and scales less
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self._in_all_processes(all_finite(gradients)):
            raise InputError(
                f"fit: the gradient is not finite at step {self.global_step + 1} (epoch {self.current_epoch}, batch "
                f"{self._batch_idx}), so the step is not taken; use a smaller model.optim.learning_rate"
            )

    def on_train_end(self) -> None:
        self._check_weights(self.state_dict().values())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_weights(checkpoint["state_dict"].values())
        checkpoint["training_seed"] = self.training_seed

    def _check_weights(self, weights: Iterable[Any]) -> None:
        if not all_finite(weights):
            raise InputError(
                f"fit: the weights are not finite after step {self.global_step}, so they are not saved; the last "
                "checkpoint before it is kept; use a smaller model.optim.learning_rate"
            )

    def _in_all_processes(self, here: bool) -> bool:
        return here if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(here, all=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.training_seed = checkpoint.get("training_seed")


def all_finite(values: Iterable[Any]) -> bool:
    """Whether no number of the tensors is NaN or infinite; of a sharded tensor, this process's part."""
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in values if isinstance(value, Tensor)]
    finite = [torch.isfinite(part.detach()).all() for part in parts if part.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())
