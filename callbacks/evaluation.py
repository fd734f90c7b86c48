"""Scores what ``test`` draws."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.tensorboard import SummaryWriter

from clipward.errors import InputError
from clipward.evaluation.cost import Cost
from clipward.evaluation.judges import Judges, Row
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import curve, markdown, markdown_of_texts, save_rows, summarise
from clipward.files import whole


class Evaluation(L.Callback):
    """Judges pictures, prints a table, and writes ``report.json`` and the curve over the weights, for TensorBoard too.

    ``pictures.parquet`` has what was said of each picture, and its features, from which all of it can be told anew.

    Args:
        judges: who looks at the pictures.
        save_dir: where ``report.json`` goes.
        overwrite: replace one that is there.
        data: what pictures are compared with, by its validation set; without one, fidelity is left out. Where its
            pictures have labels, in the order of the classifier's attributes, guided ones are compared with those that
            their texts are true of, in equal shares; unguided ones with all.
    """

    def __init__(
        self, judges: Judges, save_dir: str, overwrite: bool = False, data: L.LightningDataModule | None = None
    ) -> None:
        self.judges, self.report, self.data = judges, Path(save_dir) / "report.json", data
        if self.report.exists() and not overwrite:
            raise InputError(f"save_dir: {self.report} exists; another folder, or --overwrite true, would do")
        self.rows: list[Row] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cost = Cost(pl_module)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.cost.start()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, list],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        cost = self.cost.stop(len(batch["text"]))
        self.rows += self.judges.rows(batch, outputs["image"], cost, pl_module.critics)
        self.provenance = outputs["provenance"]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cost.remove()
        rows = self.rows
        if torch.distributed.is_initialized():
            parts: list[list[Row]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, rows)
            rows = sorted((row for part in parts for row in part), key=lambda row: row["index"])
        if not trainer.is_global_zero:
            return
        reference = None
        if self.data is not None:
            self.data.setup("validate")
            reference = Reference(self.data.val_dataloader(), self.judges, pl_module.device)
        table = summarise(rows, reference)
        texts = [
            {"text": text, **entry}
            for text in self.judges.texts
            for entry in summarise([row for row in rows if row["text"] == text])
        ]
        report = {"provenance": self.provenance, "table": table, "texts": texts}
        save_rows(self.report.with_name("pictures.parquet"), rows)
        with whole(self.report) as aside:
            aside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if "fid" in table[-1]:
            drawn = curve({self.provenance["method"]: table})
            drawn.savefig(self.report.with_name("curve.png"), dpi=150)
            with SummaryWriter(str(self.report.parent)) as writer:
                writer.add_figure("obedience against fidelity", drawn)
        print(f"{markdown(table)}\n\n{markdown_of_texts(texts)}\n\nwritten to {self.report}")
