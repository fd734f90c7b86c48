"""Guided samples while the model learns."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.figure import Cell, figure
from callbacks.gallery import save_png
from callbacks.prediction_writer import to_picture
from diffusion.classifier import check_named
from diffusion.judge import load_judge, obeys
from diffusion.methods import METHODS


class GuidedSamples(L.Callback):
    """Draws the same requests every so often, with the averaged weights, to TensorBoard and as PNGs beside the logs.

    Training goes on as if nothing had been drawn.

    Args:
        text: sentences; without any, the samples are unguided.
        guidance_weight: of each text; the method's own by default.
        n_samples: seeds.
        seed: the first.
        every_n_steps: optimiser steps between two drawings.
        judge: who says how many of the guided samples obey, as for ``test``; logged as ``samples/obey``.
    """

    def __init__(
        self,
        text: list[str] | None = None,
        guidance_weight: float | None = None,
        n_samples: int = 4,
        seed: int = 0,
        every_n_steps: int = 1000,
        judge: str | None = None,
    ) -> None:
        self.text, self.guidance_weight, self.every_n_steps = text or [], guidance_weight, every_n_steps
        self.seeds = range(seed, seed + n_samples)
        self.judge = None if judge is None else load_judge(Path(judge))
        for sentence in self.text if self.judge else []:
            check_named(self.judge.vocabulary, sentence, "judge")
        self._drawn_step = 0

    def cells(self, method: str) -> list[Cell]:
        weight = METHODS[method].weight if self.guidance_weight is None else self.guidance_weight
        plain = [Cell(seed, "", 0.0) for seed in self.seeds]
        return plain + [Cell(seed, sentence, weight) for sentence in self.text for seed in self.seeds]

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
        cells = self.cells(pl_module.sampling.method)
        images = pl_module.draw(
            [cell.text for cell in cells],
            [cell.seed for cell in cells],
            [cell.guidance_weight for cell in cells],
        )
        sheet = figure({cell: to_picture(image) for cell, image in zip(cells, images, strict=True)})
        if self.judge is not None and self.text and trainer.logger is not None:
            guided = images[len(self.seeds) :].cpu()
            verdicts = obeys(self.judge, guided, [cell.text for cell in cells if cell.text])
            share = sum(all(seen.values()) for seen in verdicts) / len(verdicts)
            trainer.logger.log_metrics({"samples/obey": share}, step)
        if isinstance(trainer.logger, L.pytorch.loggers.TensorBoardLogger):
            trainer.logger.experiment.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        if trainer.log_dir is not None:
            folder = Path(trainer.log_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"{step:08d}.png", sheet, f"step {step}; {pl_module.provenance()}")
