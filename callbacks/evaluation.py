"""The callback of ``test``: it judges the pictures and writes the report."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch

from clipward.callbacks.gallery import MARK, read_mark, to_line
from clipward.callbacks.signals import StopSignals
from clipward.errors import InputError
from clipward.evaluation.cost import CostMeter
from clipward.evaluation.judgements import Judgement, save_judgements
from clipward.evaluation.judges import Judges
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import Report, format_table, format_texts, plot_scores, save_report
from clipward.evaluation.scores import summarise
from clipward.files import atomic_write
from clipward.sampler import HasSampler


class HasValidationPictures(Protocol):
    """A data module whose validation batches have an ``image``, and ``labels`` where there are any."""

    def setup(self, stage: str) -> None: ...

    def val_dataloader(self) -> Iterable[Mapping[str, Any]]: ...


class Evaluation(L.Callback):
    """Judges pictures, prints tables, and writes them to ``save_dir``.

    ``report.json`` has the scores. ``pictures.parquet`` has what the judges say of each picture and its features, from
    which all scores can be computed again. ``curve.png`` and TensorBoard's events have prompt accuracy against FID.

    SIGTERM and SIGINT raise :class:`clipward.callbacks.signals.Stopped` while it draws.

    Args:
        judges: which networks look at the pictures.
        save_dir: the folder to write to.
        overwrite: replace a report that is there.
        data: generated pictures are compared with its validation pictures; without it there is no FID and KID. Where
            they have labels, in the order of the first judge's attributes, guided pictures are compared with those
            that their texts are true of. Unguided pictures are compared with all.

    Raises:
        InputError: where there is a report already, and in ``setup`` for data with other labels than the first judge's.
    """

    def __init__(
        self, judges: Judges, save_dir: str, overwrite: bool = False, data: HasValidationPictures | None = None
    ) -> None:
        self.judges, self.path, self.data = judges, Path(save_dir) / "report.json", data
        self.pictures_path, self.curve_path = self.path.with_name("pictures.parquet"), self.path.with_name("curve.png")
        if self.path.exists() and not overwrite:
            raise InputError(f"save_dir: {self.path} exists; use another folder or --overwrite true")
        for path, is_ours in (
            (self.path, is_report),
            (self.pictures_path, is_judgements),
            (self.curve_path, lambda path: bool(read_mark(path))),
        ):
            if os.path.lexists(path) and not is_ours(path):
                raise InputError(
                    f"save_dir: {path} is there and was not written by test; move it or use another folder"
                )
        self.judgements: list[Judgement] = []
        self.signals = StopSignals()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.data is not None and trainer.is_global_zero:  # what is wrong with it shows before anything is drawn
            self.judges.check_data(self.data, "judge")
            self.data.setup("validate")

    def on_test_start(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        self.signals.install()  # after the Trainer's own, which ends nothing before the next batch
        sampler = pl_module.sampler
        self.meter = CostMeter(sampler.network, sampler.models.loaded(), lambda: sampler.share_asked)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: HasSampler, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.meter.start()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: HasSampler,
        outputs: dict[str, Any],
        batch: dict[str, list],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        cost = self.meter.stop(len(batch["text"]))
        self.judgements += self.judges.judge_pictures(batch, outputs["image"], cost, pl_module.sampler.models)
        self.provenance = outputs["provenance"] | {"features": self.judges.features_name}
        self.signals.check()

    def on_test_end(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        self.meter.remove()
        judgements = self._gather(trainer.world_size)
        if trainer.is_global_zero:
            self._write(judgements, pl_module)
        self.signals.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: HasSampler, exception: BaseException) -> None:
        self.signals.restore()

    def _write(self, judgements: list[Judgement], pl_module: HasSampler) -> None:
        self.path.unlink(missing_ok=True)  # with overwrite, the report of other pictures
        save_judgements(self.pictures_path, judgements)  # first, since the drawing took longest
        reference = None
        if self.data is not None:
            sampler, batches = pl_module.sampler, self.data.val_dataloader()
            reference = Reference.from_batches(batches, self.judges, sampler.device, sampler.models)
        table = summarise(judgements, reference)
        texts = {text: summarise([each for each in judgements if each.text == text]) for text in self.judges.texts}
        save_report(self.path, Report(self.provenance, table, texts))
        if table[-1].fid is not None:
            plot = plot_scores({self.provenance["method"]: table})
            with atomic_write(self.curve_path) as aside:
                plot.savefig(aside, dpi=150, format="png", metadata={MARK: to_line({"report": self.path.name})})
            from torch.utils.tensorboard import SummaryWriter  # takes long to import

            with SummaryWriter(str(self.path.parent)) as writer:
                writer.add_figure("prompt accuracy against FID", plot)
        print(f"{format_table(table)}\n\n{format_texts(texts)}\n\nwritten to {self.path}")

    def _gather(self, world_size: int) -> list[Judgement]:
        """The judgements of all processes, by the index of their picture."""
        if not torch.distributed.is_initialized():
            return self.judgements
        parts: list[list[Judgement]] = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, self.judgements)
        return sorted((each for part in parts for each in part), key=lambda each: each.index)


def is_report(path: Path) -> bool:
    """Whether a file is a report of ``test``."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and {"provenance", "table", "texts"} <= content.keys()
    return False


def is_judgements(path: Path) -> bool:
    """Whether a file is of what the judges of ``test`` said."""
    from pyarrow import ArrowException, parquet

    with suppress(OSError, ValueError, ArrowException):
        return {"index", "verdicts", "features", "cost"} <= set(parquet.read_schema(path).names)
    return False
