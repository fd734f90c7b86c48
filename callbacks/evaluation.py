"""Scores what ``test`` draws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from callbacks.judging import Cost, Judges, Reference, Row, save_rows, summarise
from diffusion.weights import whole
from errors import InputError


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


def curve(tables: dict[str, list[Row]]) -> Figure:
    """Obedience against fidelity: a line over its weights for each method, and a star for what nothing guides."""
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.add_subplot()
    for number, (name, entries) in enumerate(tables.items()):
        points = [(entry["fid"], 100 * entry["obey"], entry["guidance_weight"]) for entry in entries if "fid" in entry]
        guided = [point for point in points if point[2]]
        if guided:
            axes.plot([fid for fid, _, _ in guided], [obey for _, obey, _ in guided], "o-", label=name)
        for fid, obey, weight in guided:
            beside = (5, 4 if number % 2 else -10)  # above one line, below the next
            axes.annotate(f"{weight:g}", (fid, obey), textcoords="offset points", xytext=beside, fontsize=8)
        for fid, obey, _ in (point for point in points if not point[2]):
            axes.plot(
                fid, obey, "*", color="black" if guided else None, markersize=11, label="unguided" if guided else name
            )
    axes.set(xlabel="FID (lower is better)", ylabel="pictures that obey their whole text, %", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def _shown(value: float | None, form: str, error: float | None = None) -> str:
    if value is None:
        return ""
    return format(value, form) + ("" if error is None else f" ± {format(error, form)}")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "weight": lambda entry: _shown(entry["guidance_weight"], "g"),
    "pictures": lambda entry: f"{entry['pictures']}",
    "obey": lambda entry: _shown(entry["obey"], ".1%", entry["obey_error"]),
    "other judges": lambda entry: ", ".join(f"{share:.1%}" for share in list(entry["judges"].values())[1:]),
    "attributes": lambda entry: _shown(entry["single"], ".1%"),
    "CLIP": lambda entry: _shown(entry["clip_similarity"], ".3f"),
    "held-out CLIP": lambda entry: _shown(entry["held_out_similarity"], ".3f"),
    "FID": lambda entry: _shown(entry.get("fid"), ".3f", entry.get("fid_error")),
    "FID, alike": lambda entry: _shown(entry.get("fid_alike"), ".3f"),
    "1000 KID": lambda entry: _shown(1000 * entry["kid"] if "kid" in entry else None, ".2f"),
    "drift": lambda entry: _shown(entry.get("drift"), ".2f"),
    "passes per success": lambda entry: _shown(entry["per_success"], ".0f"),
    "CLIP passes": lambda entry: f"{entry['cost']['critic_passes']:.0f}",
    "seconds": lambda entry: f"{entry['cost']['seconds']:.2f}",
    "peak GiB": lambda entry: f"{entry['cost']['peak_bytes'] / 2**30:.1f}",
}


def markdown(table: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(entry) for cell in COLUMNS.values())} |" for entry in table)])


def markdown_of_texts(texts: list[Row]) -> str:
    lines = ["| text | weight | pictures | obey | by attribute | CLIP |", "|---|---|---|---|---|---|"]
    for row in texts:
        each = ", ".join(f"{name} {share:.0%}" for name, share in row["attributes"].items())
        lines.append(
            f"| {row['text']} | {row['guidance_weight']:g} | {row['pictures']} | {row['obey']:.0%} | {each} "
            f"| {_shown(row['clip_similarity'], '.3f')} |"
        )
    return "\n".join(lines)
