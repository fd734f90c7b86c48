"""Counts the pictures in which a held-out judge sees what their text names."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffusion.classifier import load_classifier
from diffusion.weights import whole
from errors import InputError


class Obedience(L.Callback):
    """Judges what ``test`` draws, prints a table and writes ``obedience.json``.

    A picture obeys where the judge sees every attribute that its text names.

    Args:
        judge: a classifier of labels, as ``configs/faces_judge.yaml`` trains one. It must not be what guides.
        save_dir: where ``obedience.json`` goes.
        overwrite: replace one that is there.
    """

    def __init__(self, judge: str, save_dir: str, overwrite: bool = False) -> None:
        self.judge, self.report = load_classifier(Path(judge)), Path(save_dir) / "obedience.json"
        if self.report.exists() and not overwrite:
            raise InputError(f"save_dir: {self.report} exists; another folder, or --overwrite true, would do")
        self.rows: list[dict[str, Any]] = []

    def check(self, texts: list[str]) -> None:
        """Raise where the judge knows nothing of a text."""
        for text in texts:
            self.judge.check(text, "judge")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.judge.to(pl_module.device)

    @torch.no_grad()
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, list],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits = self.judge(outputs["image"].float())
        for i, text in enumerate(batch["text"]):
            seen = {}
            for attribute, value in self.judge.named(text).items():
                values = list(self.judge.vocabulary[attribute])
                seen[attribute] = values[int(logits[attribute][i].argmax())] == value
            row = {name: values[i] for name, values in batch.items()}
            self.rows.append({**row, "seen": seen, "clip_similarity": outputs["clip_similarity"][i]})
        self.provenance = outputs["provenance"]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = self.rows
        if torch.distributed.is_initialized():
            parts: list[list[dict[str, Any]]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        if not trainer.is_global_zero:
            return
        table = summarise(rows)
        report = {"obedience": table, "provenance": self.provenance, "pictures": len(rows)}
        with whole(self.report) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{markdown(table)}\n\nwritten to {self.report}")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each text and weight: pictures, the share that obeys, the share per attribute, CLIP's mean."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["text"], row["guidance_weight"]].append(row)
    table = []
    for (text, weight), group in sorted(groups.items()):
        count = len(group)
        table.append(
            {
                "text": text,
                "guidance_weight": weight,
                "pictures": count,
                "obey": sum(all(row["seen"].values()) for row in group) / count,
                "attributes": {name: sum(row["seen"][name] for row in group) / count for name in group[0]["seen"]},
                "clip_similarity": sum(row["clip_similarity"] for row in group) / count,
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    lines = ["| text | weight | pictures | obey | by attribute | CLIP |", "|---|---|---|---|---|---|"]
    for row in table:
        each = ", ".join(f"{name} {share:.0%}" for name, share in row["attributes"].items())
        lines.append(
            f"| {row['text']} | {row['guidance_weight']:g} | {row['pictures']} | {row['obey']:.0%} | {each} "
            f"| {row['clip_similarity']:.3f} |"
        )
    return "\n".join(lines)
