"""What all training shares: it goes on after a stop as if there had been none, stops where numbers break, and logs."""

import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipward.diffusion.sampling import seed_of
from clipward.errors import InputError, list_names, shorten


class Reproducible(L.LightningModule):
    """Before each batch, the seed is set to a function of (seed, epoch, batch, rank), so that it has no state to save.

    With a loader that knows its place, a fit that is resumed within an epoch ends with the same bits.

    A gradient that is not finite stops the training before the step, and weights that are not finite are never saved.

    It logs ``train/learning_rate``, ``train/gradient_norm`` (of all parameters together, before clipping) and
    ``train/pictures_per_second`` (of all processes; reading the pictures counts, validation and samples don't).
    """

    training_seed: int | None = None
    can_shard = False  # whether ``configure_model`` spreads the network over the processes of a ``Sharded`` strategy
    _ended: float | None = None  # when the work on the last batch ended
    _seconds, _pictures = 0.0, 0  # since the last log

    def check_data(self, data: Any) -> None:
        """Raise :class:`InputError` where a data module lacks what the module learns from."""

    def on_fit_start(self) -> None:
        if self.training_seed is None:
            self.training_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.training_seed, self.current_epoch, batch_idx, self.global_rank))
        self._batch_idx = batch_idx
        now, self._stepped = time.perf_counter(), False
        self._seconds += 0.0 if self._ended is None else now - self._ended  # reading this batch
        self._started = now
        self._pictures += len(next(iter(batch.values())) if isinstance(batch, dict) else batch)

    def on_after_backward(self) -> None:
        self._ended = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._ended, self._stepped = time.perf_counter(), True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seconds += self._ended - self._started
        if self._stepped and self.logs_step(self.global_step):
            self.log("train/pictures_per_second", self.trainer.world_size * self._pictures / self._seconds)
            self._seconds, self._pictures = 0.0, 0
        self._ended = time.perf_counter()

    def on_validation_end(self) -> None:
        self._ended = None if self._ended is None else time.perf_counter()
        if self.trainer.sanity_checking:
            self._check_monitors()

    def _check_monitors(self) -> None:
        """Raise :class:`InputError` where a callback waits for a number of the validation that there is not."""
        known = [name for name in self.trainer.callback_metrics if name.startswith("val")]
        for callback in self.trainer.callbacks:
            name = getattr(callback, "monitor", None)
            if isinstance(name, str) and name.startswith("val") and name not in known:
                raise InputError(
                    f"trainer.callbacks: got the monitor {shorten(name)} of {type(callback).__name__}, expected one of "
                    f"{list_names(known)}, or a train/ one"
                )

    def logs_step(self, number: int) -> bool:
        """Whether the loggers get the numbers of a step, by its number from 1 on."""
        return self.trainer.log_every_n_steps > 0 and number % self.trainer.log_every_n_steps == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.logs_step(self.global_step + 1):
            norm = torch.nn.utils.get_total_norm(gradients)
            self.log("train/gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        if self.trainer.precision == "16-mixed" and self.device.type == "cuda":
            return  # float16 overflows now and then; its scaler leaves such a step out and scales less
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
