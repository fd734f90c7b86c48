"""Training that goes on, after a stop, as if there had been none."""

from typing import Any

import lightning as L
import torch

from clipward.diffusion.sampling import seed_of


class Reproducible(L.LightningModule):
    """Before each batch, chance is made a function of (seed, epoch, batch, rank), so that it has no state to save.

    With a loader that knows its place, a fit that is resumed within an epoch ends with the same bits.
    """

    training_seed: int | None = None

    def on_fit_start(self) -> None:
        if self.training_seed is None:
            self.training_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(self.training_seed, self.current_epoch, batch_idx, self.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["training_seed"] = self.training_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.training_seed = checkpoint.get("training_seed")
