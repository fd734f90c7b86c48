"""The callback of ``fit`` that draws guided samples while the model learns."""

import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from clipward.callbacks.evaluation import HasValidationPictures
from clipward.callbacks.figure import Cell, draw_figure
from clipward.callbacks.gallery import save_png
from clipward.callbacks.prediction_writer import GRID_ROWS
from clipward.errors import InputError, shorten
from clipward.evaluation.cost import Cost, CostMeter
from clipward.evaluation.judges import Judges
from clipward.evaluation.reference import Reference
from clipward.evaluation.scores import Scores, summarise
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import METHODS, Method
from clipward.guidance.models import GuidanceModels, choose_method
from clipward.networks.channels import check_shown
from clipward.sampler import HasSampler, to_picture
from clipward.sampling_config import SamplingConfig
from clipward.texts import check_text
from clipward.values import check_seed, check_weight


@runtime_checkable
class HasGuidance(Protocol):
    """A module that draws pictures, before it has its network."""

    models: GuidanceModels
    sampling: SamplingConfig


class GuidedSamples(L.Callback):
    """Draws the same requests every so often with the averaged weights.

    The samples go to the loggers that take pictures (TensorBoard, W&B and MLflow), and to ``samples`` in the log folder
    as PNGs. The callback restores the states of all random generators, so that training does not change. Where a model
    that has hardly learned gives the guidance nothing to see, the samples stay grey, a warning says why, and training
    goes on.

    Args:
        text: sentences; without any, the samples are unguided.
        guidance_weight: of each text; the method's own by default.
        n_samples: seeds for each text. Each seed has an unguided sample too.
        seed: the first seed.
        every_n_steps: optimiser steps between two drawings; 0 turns this off.
        every_n_epochs: epochs between two drawings; 0 turns this off.
        micro_batch: pictures drawn at once on each device.
        judge: which networks judge the samples, as in ``test``. The scores of weight ``w`` are logged as
            ``samples/w/prompt_accuracy``, ``samples/w/kid``, …; FID and KID compare with the validation set. FID needs
            some hundred samples; the figure shows the first seeds only.
        features: which network's features FID and KID compare, as in ``test``.
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
        counts = {"n_samples": n_samples, "micro_batch": micro_batch}
        for name, value in {**counts, "every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}.items():
            least = 1 if name in counts else 0
            if type(value) is not int or value < least:
                raise InputError(f"GuidedSamples.{name}: got {shorten(value)}, expected a whole number from {least} on")
        try:
            check_seed(seed)
            self.text = [check_text(each) for each in text or []]
            self.guidance_weight = None if guidance_weight is None else check_weight(guidance_weight)
        except InputError as error:
            raise InputError(f"GuidedSamples.{error}") from error
        if not all(each.strip() for each in self.text):
            raise InputError("GuidedSamples.text: got an empty one, expected sentences; leave it out for none")
        self.every_n_steps, self.every_n_epochs, self.micro_batch = every_n_steps, every_n_epochs, micro_batch
        self.seeds = range(seed, seed + n_samples)
        self.judge_names, self.features = judge, features
        self.judges: Judges | None = None  # loaded where a fit begins
        self._reference: Reference | None = None
        self._drawn_step = 0

    def list_cells(self, method: Method) -> list[Cell]:
        """The requests: each seed unguided, then each text with each seed."""
        weight = method.weight if self.guidance_weight is None else self.guidance_weight
        unguided = [Cell(seed, "", 0.0) for seed in self.seeds]
        return unguided + [Cell(seed, sentence, weight) for sentence in self.text for seed in self.seeds]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.prepare(pl_module, trainer.datamodule)

    def prepare(self, pl_module: L.LightningModule, data: Any = None) -> None:
        """Load the judges and what guides, once; the command line does so before a logger writes.

        Args:
            pl_module: the model.
            data: with whose validation pictures the judges compare the samples.

        Raises:
            InputError: where the model draws no pictures, a network can't be loaded, a text is too long for a CLIP, a
                judge knows no attribute that it names, or the data has other labels than the first judge's.
        """
        if self.judge_names is not None and self.judges is None:
            with isolate_rng():  # a network is made with random weights before it has its own
                self.judges = Judges(self.judge_names, self.text, self.features)
        if self.judges is not None:
            self.judges.check_data(data, "GuidedSamples.judge")
        if not isinstance(pl_module, HasGuidance):
            name = type(pl_module).__name__
            raise InputError(f"trainer.callbacks: got GuidedSamples for {name}, expected a model that draws pictures")
        if self.text:
            models = pl_module.models
            method = METHODS[choose_method(pl_module.sampling.method, models.config)]
            with isolate_rng():
                models.load(method.guided_by)
            try:
                models.check_texts(self.text, method)
            except InputError as error:
                raise InputError(f"GuidedSamples.{error}") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        self._drawn_step = trainer.global_step
        check_shown(pl_module.sampler.architecture.unet.image_channels)
        pl_module.sampler.check()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: HasSampler, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        """Draw, show and judge the samples of the current step, unless that is done."""
        step = trainer.global_step
        if step == self._drawn_step:
            return
        self._drawn_step = step
        sampler = pl_module.sampler
        cells = self.list_cells(sampler.method)
        meter = CostMeter(sampler.network, sampler.models.loaded(), lambda: sampler.share_asked)
        with isolate_rng(), trainer.precision_plugin.forward_context():
            meter.start()
            images = self.sample(cells, trainer, pl_module)
            cost = meter.stop(-(-len(cells) // trainer.world_size))
        meter.remove()
        log_dir, provenance = trainer.log_dir, pl_module.provenance()  # all processes must take part in these
        if trainer.is_global_zero:
            self.show(trainer, cells, images, None if log_dir is None else Path(log_dir) / "samples", provenance)
            if self.judges is not None and trainer.loggers:
                with isolate_rng():
                    table = self.judge(self.judges, cells, images, cost, trainer, pl_module)
                    for logger in trainer.loggers:
                        log_scores(logger, table, step)

    def sample(self, cells: list[Cell], trainer: L.Trainer, pl_module: HasSampler) -> Tensor:
        """Sample a share of the cells in each process, and return all: (cells, C, H, W) in [-1, 1]."""
        world, count, sampler = trainer.world_size, len(cells), pl_module.sampler
        share = -(-count // world)
        own = [cells[min(i * world + trainer.global_rank, count - 1)] for i in range(share)]
        images = []
        for start in range(0, share, self.micro_batch):
            chunk = own[start : start + self.micro_batch]
            texts, seeds = [cell.text for cell in chunk], [cell.seed for cell in chunk]
            try:
                image, _ = sampler.best_of_n(texts, seeds, [cell.guidance_weight for cell in chunk])
            except GuidanceError as error:
                if sampler.is_shared:  # the other processes wait for this one
                    raise
                warnings.warn(
                    f"samples of step {trainer.global_step}: {error.reason}; {len(chunk)} samples stay grey",
                    stacklevel=2,
                )
                image = torch.zeros(len(chunk), *sampler.shape, device=pl_module.device)
            images.append(image)
        gathered = trainer.strategy.all_gather(torch.cat(images))  # (world, share, C, H, W)
        return gathered.reshape(world, share, *images[0].shape[1:]).transpose(0, 1).flatten(0, 1)[:count]

    def show(
        self, trainer: L.Trainer, cells: list[Cell], images: Tensor, folder: Path | None, provenance: dict[str, Any]
    ) -> None:
        """Draw the first seeds as a figure, for the loggers and as a PNG in ``folder``."""
        step, shown = trainer.global_step, set(self.seeds[:GRID_ROWS])
        pictures = {cell: image for cell, image in zip(cells, images, strict=True) if cell.seed in shown}
        sheet = draw_figure({cell: to_picture(image) for cell, image in pictures.items()})
        for logger in trainer.loggers:
            log_sheet(logger, sheet, step)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_png(folder / f"{step:08d}.png", sheet, f"step {step}; {provenance}")

    def judge(
        self, judges: Judges, cells: list[Cell], images: Tensor, cost: Cost, trainer: L.Trainer, pl_module: HasSampler
    ) -> list[Scores]:
        """The scores of each weight, as in the report of ``test``."""
        data: HasValidationPictures | None = trainer.datamodule
        if self._reference is None and data is not None:
            sampler = pl_module.sampler
            self._reference = Reference.from_batches(data.val_dataloader(), judges, sampler.device, sampler.models)
        requests = {
            "index": list(range(len(cells))),
            "text": [cell.text for cell in cells],
            "seed": [cell.seed for cell in cells],
            "guidance_weight": [cell.guidance_weight for cell in cells],
            "valid": [True] * len(cells),
        }
        judgements = judges.judge_pictures(requests, images, cost, pl_module.sampler.models)
        return summarise(judgements, self._reference)


def log_sheet(logger: Logger, sheet: Image.Image, step: int) -> None:
    """Give a figure to a logger that takes pictures: TensorBoard, W&B, MLflow, and others that have ``log_image``."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, sheet, artifact_file=f"samples/{step:08d}.png")
    elif hasattr(logger, "log_image"):  # as W&B's
        logger.log_image("samples", [sheet], step)


def log_scores(logger: Logger, table: list[Scores], step: int) -> None:
    """Log the scores of each weight that are known."""
    for scores in table:
        numbers = {
            "prompt_accuracy": scores.prompt_accuracy,
            # not below prompt_accuracy, which is a file to MLflow and so can't be a folder too
            **{f"prompt_accuracy_{Path(judge).stem}": share for judge, share in scores.judges.items()},
            "attribute_accuracy": scores.attribute_accuracy,
            "clip_similarity": scores.clip_similarity,
            "held_out_similarity": scores.held_out_similarity,
            "fid": scores.fid,
            "kid": scores.kid,
            "precision": scores.precision,
            "recall": scores.recall,
            "cmmd": scores.cmmd,
            "twin_distance": scores.twin_distance,
            "seconds": scores.cost.seconds,
        }
        tags = {f"samples/{scores.guidance_weight:g}/{name}": value for name, value in numbers.items()}
        known = {tag: value for tag, value in tags.items() if value is not None}
        logger.log_metrics(known, step)
