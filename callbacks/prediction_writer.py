"""Writes what predict makes: a PNG a request, metadata.jsonl, grid.png, and the command itself."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from callbacks.figure import Cell, figure
from diffusion.weights import whole
from errors import InputError

CONFIG_FILE = "config.predict.yaml"
PACKAGES = ("clipward", "torch", "lightning", "open_clip_torch")
NOT_OF_THE_PICTURE = ("trainer", "data", "micro_batch", "save_dir", "overwrite", "seed_everything")
GRID_ROWS, GRID_COLUMNS = 16, 24


class PredictionWriter(BasePredictionWriter):
    """Writes pictures as they come, each whole or not at all.

    The folder is one that ``datasets.load_dataset("imagefolder", data_dir=…)`` opens.

    Args:
        save_dir: the folder. One that another command wrote to is refused, and so is one with other files.
        config: the command as YAML; written first, and what tells another command from this one.
        overwrite: begin anew in a folder that another command wrote to.
    """

    def __init__(self, save_dir: str, config: str = "", overwrite: bool = False) -> None:
        super().__init__("batch")
        self.save_dir, self.config, self.overwrite = Path(save_dir), config, overwrite

    def finished(self) -> frozenset[int]:
        """Indices of the requests that an earlier run of this command has finished.

        Raises:
            InputError: where the folder belongs to another command.
        """
        if not self.save_dir.exists() or not any(self.save_dir.iterdir()):
            return frozenset()
        file = self.save_dir / CONFIG_FILE
        difference = _difference(file.read_text(), self.config) if file.is_file() else f"it has no {CONFIG_FILE}"
        if difference:
            if self.overwrite and file.is_file():
                return frozenset()
            raise InputError(
                f"save_dir: {self.save_dir} holds another command's pictures ({difference}); "
                "another folder, or --overwrite true for one of ours, would do"
            )
        return frozenset(row["index"] for row in self.rows() if (self.save_dir / row["file_name"]).is_file())

    def rows(self) -> list[dict[str, Any]]:
        """What has been written so far, by index."""
        rows: dict[int, dict[str, Any]] = {}
        for file in [self.save_dir / "metadata.jsonl", *sorted(self.save_dir.glob(".metadata.*.jsonl"))]:
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:  # the run was killed while it wrote this line
                        continue
                    rows[row["index"]] = row
        return [rows[index] for index in sorted(rows)]

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            if self.finished():
                self._check_same_weights(pl_module.provenance())
            else:
                for stale in [*self.save_dir.glob("*.png"), *self.save_dir.glob("*metadata*.jsonl")]:
                    stale.unlink()
            with whole(self.save_dir / CONFIG_FILE) as aside:
                aside.write_text(self.config, encoding="utf-8")
        trainer.strategy.barrier("save_dir")

    def _check_same_weights(self, provenance: dict[str, Any]) -> None:
        before = self.rows()[0]
        for name in ("weights_hash", "clip_hash", "noisy_clip_hash", "classifier_hash"):
            there, here = before.get(name), provenance.get(name)
            if there != here:
                raise InputError(
                    f"save_dir: {self.save_dir} holds pictures by other weights ({name} {there} there, {here} here); "
                    "another folder would do"
                )

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[str, Any],
        batch_indices: Any,
        batch: dict[str, list],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        common = prediction["provenance"] | {name: version(name) for name in PACKAGES}
        with open(self.save_dir / f".metadata.{trainer.global_rank}.jsonl", "a", encoding="utf-8") as metadata:
            for i, index in enumerate(batch["index"]):
                row = {
                    "file_name": f"{index:06d}.png",
                    "index": index,
                    "text": batch["text"][i],
                    "seed": batch["seed"][i],
                    "guidance_weight": batch["guidance_weight"][i],
                    "clip_similarity": prediction["clip_similarity"][i],
                    **common,
                }
                save_png(self.save_dir / row["file_name"], to_picture(prediction["image"][i]), _line(row))
                metadata.write(_line(row) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("written")
        if trainer.is_global_zero:
            self.finish()

    def finish(self) -> None:
        """Merge what the processes wrote and draw the grid; nothing changes where that is done already."""
        rows = self.rows()
        with whole(self.save_dir / "metadata.jsonl") as aside:
            aside.write_text("".join(_line(row) + "\n" for row in rows), encoding="utf-8")
        for part in [*self.save_dir.glob(".metadata.*.jsonl"), *self.save_dir.glob(".*.png.*")]:
            part.unlink()
        if rows:
            self.draw_grid(rows)
        print(f"{len(rows)} pictures in {self.save_dir}, all of them in {self.save_dir / 'grid.png'}")

    def draw_grid(self, rows: list[dict[str, Any]]) -> None:
        seeds = list(dict.fromkeys(row["seed"] for row in rows))[:GRID_ROWS]
        columns = list(dict.fromkeys((row["text"], row["guidance_weight"]) for row in rows))[:GRID_COLUMNS]
        pictures = {}
        for row in rows:
            cell = Cell(row["seed"], row["text"], row["guidance_weight"])
            if cell.seed in seeds and (cell.text, cell.guidance_weight) in columns:
                with Image.open(self.save_dir / row["file_name"]) as picture:
                    pictures[cell] = picture.convert("RGB")
        common = {k: v for k, v in rows[0].items() if k not in ("file_name", "index", "clip_similarity")}
        save_png(self.save_dir / "grid.png", figure(pictures), _line(common))


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    pixels = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_png(path: Path, picture: Image.Image, made: str) -> None:
    """Write a PNG that says how it was made, whole or not at all."""
    info = PngInfo()
    info.add_itxt("clipward", made)
    with whole(path) as aside:
        picture.save(aside, "png", pnginfo=info)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _difference(theirs: str, ours: str) -> str:
    """The first setting that makes other pictures, or nothing; how they are computed is left out."""
    a, b = (_flat(yaml.safe_load(text) or {}) for text in (theirs, ours))
    for key in sorted({*a, *b}):
        if key.split(".")[0] not in NOT_OF_THE_PICTURE and a.get(key) != b.get(key):
            return f"{key}: {a.get(key)!r} there, {b.get(key)!r} here"
    return ""


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
