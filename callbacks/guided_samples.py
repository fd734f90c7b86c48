"""Guided samples while the model learns."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipward.callbacks.figure import Cell, figure
from clipward.callbacks.gallery import save_png
from clipward.callbacks.prediction_writer import GRID_ROWS, to_picture
from clipward.evaluation.cost import Cost
from clipward.evaluation.judges import Judges, Row
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import summarise
from clipward.guidance.methods import METHODS

LOGGED = ("obey", "single", "clip_similarity", "held_out_similarity", "fid", "kid", "drift")


class GuidedSamples(L.Callback):
    """Draws the same requests every so often, with the averaged weights, to TensorBoard and as PNGs beside the logs.

    Training goes on as if nothing had been drawn.

    Args:
        text: sentences; without any, the samples are unguided.
        guidance_weight: of each text; the method's own by default.
        n_samples: seeds.
        seed: the first.
        every_n_steps: optimiser steps between two drawings; none by steps with 0.
        every_n_epochs: epochs between two drawings; none by epochs with 0.
        micro_batch: pictures drawn at once on each device.
        judge: who looks at the samples, as in ``test``: what it says of those of weight ``w`` is logged as
            ``samples/w/obey``, ``samples/w/kid``, …, and compared with the validation set. FID wants some hundred
            samples, of which the figure shows the first seeds.
        features: by which fidelity is measured, as in ``test``.
    """

    def __init__(
        self,
        text: list[str] | None = None,
        guidance_weight: float | None = None,
        n_samples: int = 4,
        seed: int = 0,
        every_n_steps: int = 1000,
        every_n_epochs: int = 0,
        micro_batch: int = 16,
        judge: list[str] | None = None,
        features: str = "judge",
    ) -> None:
        self.text, self.guidance_weight = text or [], guidance_weight
        self.every_n_steps, self.every_n_epochs, self.micro_batch = every_n_steps, every_n_epochs, micro_batch
        self.seeds = range(seed, seed + n_samples)
        self.judges = None if judge is None else Judges(judge, self.text, features)
        self._reference: Reference | None = None
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
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw a share of the cells in each process, and show all of them, once a step."""
        step = trainer.global_step
        if step == self._drawn_step:
            return
        self._drawn_step = step
        cells = self.cells(pl_module.sampling.method)
        cost = Cost(pl_module)
        with isolate_rng(), trainer.precision_plugin.forward_context():
            cost.start()
            images = self.images(cells, trainer, pl_module)
            spent = cost.stop(-(-len(cells) // trainer.world_size))
        cost.remove()
        folder, provenance = trainer.log_dir, pl_module.provenance()  # every process has a part in these
        if trainer.is_global_zero:
            self.show(trainer, cells, images, None if folder is None else Path(folder) / "samples", provenance)
            if self.judges is not None and trainer.logger is not None:
                with isolate_rng():
                    self.record(trainer, self.judge(cells, images, spent, trainer, pl_module))

    def images(self, cells: list[Cell], trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """(cells, C, H, W), in every process."""
        world, count = trainer.world_size, len(cells)
        share = -(-count // world)
        own = [cells[min(i * world + trainer.global_rank, count - 1)] for i in range(share)]
        drawn = []
        for start in range(0, share, self.micro_batch):
            chunk = own[start : start + self.micro_batch]
            requests = zip(*((cell.text, cell.seed, cell.guidance_weight) for cell in chunk), strict=True)
            drawn.append(pl_module.draw(*map(list, requests))[0])
        gathered = trainer.strategy.all_gather(torch.cat(drawn))  # (world, share, C, H, W)
        return gathered.reshape(world, share, *drawn[0].shape[1:]).transpose(0, 1).flatten(0, 1)[:count]

    def show(
        self, trainer: L.Trainer, cells: list[Cell], images: Tensor, folder: Path | None, provenance: dict[str, Any]
    ) -> None:
        """To the logger, and to ``folder`` as a PNG."""
        step, shown = trainer.global_step, set(self.seeds[:GRID_ROWS])
        pictures = {cell: image for cell, image in zip(cells, images, strict=True) if cell.seed in shown}
        sheet = figure({cell: to_picture(image) for cell, image in pictures.items()})
        if isinstance(trainer.logger, L.pytorch.loggers.TensorBoardLogger):
            trainer.logger.experiment.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"{step:08d}.png", sheet, f"step {step}; {provenance}")

    def judge(
        self,
        cells: list[Cell],
        images: Tensor,
        cost: dict[str, float],
        trainer: L.Trainer,
        pl_module: L.LightningModule,
    ) -> list[Row]:
        """An entry for each weight, as in the report of ``test``."""
        if self._reference is None and trainer.datamodule is not None:
            self._reference = Reference(trainer.datamodule.val_dataloader(), self.judges, pl_module.device)
        requests = {
            "index": list(range(len(cells))),
            "text": [cell.text for cell in cells],
            "seed": [cell.seed for cell in cells],
            "guidance_weight": [cell.guidance_weight for cell in cells],
            "valid": [True] * len(cells),
        }
        return summarise(self.judges.rows(requests, images, cost, pl_module.critics), self._reference)

    def record(self, trainer: L.Trainer, table: list[Row]) -> None:
        """What is a number in each entry, by its weight."""
        for entry in table:
            by_judge = {f"obey/{Path(path).stem}": share for path, share in entry["judges"].items()}
            numbers = {name: entry.get(name) for name in LOGGED} | by_judge | {"seconds": entry["cost"]["seconds"]}
            tags = {f"samples/{entry['guidance_weight']:g}/{name}": value for name, value in numbers.items()}
            known = {tag: value for tag, value in tags.items() if value is not None}
            trainer.logger.log_metrics(known, trainer.global_step)
