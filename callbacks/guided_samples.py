"""Guided samples while the model learns."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.figure import Cell, figure
from callbacks.prediction_writer import save_png, to_picture


class GuidedSamples(L.Callback):
    """Draws the same requests every so often, with the averaged weights, to TensorBoard and as PNGs beside the logs.

    Training goes on as if nothing had been drawn.

    Args:
        text: sentences; without any, the samples are unguided.
        guidance_weight: of each text.
        n_samples: seeds.
        seed: the first.
        every_n_steps: optimiser steps between two drawings.
    """

    def __init__(
        self,
        text: list[str] | None = None,
        guidance_weight: float = 100.0,
        n_samples: int = 4,
        seed: int = 0,
        every_n_steps: int = 1000,
    ) -> None:
        plain = [Cell(s, "", 0.0) for s in range(seed, seed + n_samples)]
        guided = [Cell(s, t, guidance_weight) for t in text or [] for s in range(seed, seed + n_samples)]
        self.cells, self.every_n_steps = plain + guided, every_n_steps
        self._drawn_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._drawn_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._drawn_step or step % self.every_n_steps:
            return
        self._drawn_step = step
        if trainer.is_global_zero:
            with isolate_rng(), trainer.precision_plugin.forward_context():
                self.draw(trainer, pl_module, step)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        images = pl_module.draw(
            [cell.text for cell in self.cells],
            [cell.seed for cell in self.cells],
            [cell.guidance_weight for cell in self.cells],
        )
        sheet = figure({cell: to_picture(image) for cell, image in zip(self.cells, images, strict=True)})
        if isinstance(trainer.logger, L.pytorch.loggers.TensorBoardLogger):
            trainer.logger.experiment.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        if trainer.log_dir is not None:
            folder = Path(trainer.log_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"{step:08d}.png", sheet, f"step {step}; {pl_module.provenance()}")
