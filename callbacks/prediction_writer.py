"""Writes what predict makes: the pictures, metadata.jsonl, grid.png, and the command itself."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from clipward.callbacks.figure import Cell, figure
from clipward.callbacks.gallery import Gallery, Output, line, save_png
from clipward.errors import InputError
from clipward.files import whole

CONFIG_FILE = "config.predict.yaml"
PACKAGES = ("clipward", "torch", "lightning", "open_clip_torch")
NOT_OF_THE_PICTURE = ("trainer", "data", "micro_batch", "save_dir", "overwrite", "shard_size", "seed_everything")
OF_ONE_PICTURE = ("file_name", "index", "clip_similarity", "float32_retries", "shard")
GRID_ROWS, GRID_COLUMNS = 16, 24


class PredictionWriter(BasePredictionWriter):
    """Writes pictures as they come, each whole or not at all.

    With ``files`` the folder is one that ``datasets.load_dataset("imagefolder", data_dir=…)`` opens; shards are opened
    as ``webdataset`` and ``parquet``. Processes on several machines must share the folder.

    Args:
        save_dir: the folder. One that another command wrote to is refused, and so is one with other files.
        config: the command as YAML; written first, and what tells another command from this one.
        overwrite: begin anew in a folder that another command wrote to.
        output: a PNG for each picture, or shards.
        shard_size: pictures a shard.
    """

    def __init__(
        self,
        save_dir: str,
        config: str = "",
        overwrite: bool = False,
        output: Output = "files",
        shard_size: int = 1000,
    ) -> None:
        super().__init__("batch")
        if shard_size < 1:
            raise InputError(f"shard_size: {shard_size} given; 1 or more would do")
        self.save_dir, self.config, self.overwrite = Path(save_dir), config, overwrite
        self.gallery, self.shard_size = Gallery(self.save_dir, output), shard_size

    def finished(self) -> set[int]:
        """Indices of the requests that an earlier run of this command has finished.

        Raises:
            InputError: where the folder belongs to another command.
        """
        if not self.save_dir.exists() or not any(self.save_dir.iterdir()):
            return set()
        file = self.save_dir / CONFIG_FILE
        difference = _difference(file.read_text(), self.config) if file.is_file() else f"it has no {CONFIG_FILE}"
        if difference:
            if self.overwrite and file.is_file():
                return set()
            raise InputError(
                f"save_dir: {self.save_dir} holds another command's pictures ({difference}); "
                "another folder, or --overwrite true for one of ours, would do"
            )
        return self.gallery.indices()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # One process looks, so that all have the same to do.
        trainer.datamodule.done = trainer.strategy.broadcast(self.finished() if trainer.is_global_zero else None)
        self.gallery.rank = trainer.global_rank

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        provenance = pl_module.provenance()
        if trainer.is_global_zero:
            if trainer.datamodule.done:
                self._check_same_weights(provenance)
                self.gallery.pack_left(self.shard_size)
            else:
                self.gallery.clear()
            with whole(self.save_dir / CONFIG_FILE) as aside:
                aside.write_text(self.config, encoding="utf-8")
        trainer.strategy.barrier("save_dir")

    def _check_same_weights(self, provenance: dict[str, Any]) -> None:
        before = next(self.gallery.rows())
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
        for i, index in enumerate(batch["index"]):
            if batch["valid"][i]:
                row = {
                    "index": index,
                    "text": batch["text"][i],
                    "seed": batch["seed"][i],
                    "guidance_weight": batch["guidance_weight"][i],
                    "clip_similarity": prediction["clip_similarity"][i],
                    "float32_retries": prediction["float32_retries"][i],
                    **common,
                }
                self.gallery.add(row, to_picture(prediction["image"][i]))
        self.gallery.pack_staged(self.shard_size)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("written")
        if trainer.is_global_zero:
            self.finish()

    def finish(self) -> None:
        """Merge what the processes wrote and draw the grid; nothing changes where that is done already."""
        self.gallery.pack_left(self.shard_size)
        self.gallery.merge()
        count, shown = self.draw_grid()
        which = "all" if shown == count else "the first"
        print(f"{count} pictures in {self.save_dir}, {which} of them in {self.save_dir / 'grid.png'}")

    def draw_grid(self) -> tuple[int, int]:
        """Draw the first seeds, texts and weights; returns how many pictures there are and how many it shows."""
        seeds: dict[int, None] = {}
        columns: dict[tuple[str, float], None] = {}
        pictures, common, count = {}, {}, 0
        for row in self.gallery.rows():
            count += 1
            cell = Cell(row["seed"], row["text"], row["guidance_weight"])
            column = cell.text, cell.guidance_weight
            if (cell.seed in seeds or len(seeds) < GRID_ROWS) and (column in columns or len(columns) < GRID_COLUMNS):
                seeds[cell.seed] = columns[column] = None
                pictures[cell] = self.gallery.open(row)
                common = common or {k: v for k, v in row.items() if k not in OF_ONE_PICTURE}
        if pictures:
            save_png(self.save_dir / "grid.png", figure(pictures), line(common))
        return count, len(pictures)


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    pixels = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _difference(theirs: str, ours: str) -> str:
    """The first setting that makes other pictures, or nothing; how they are computed is left out."""
    a, b = (_flat(yaml.safe_load(text) or {}) for text in (theirs, ours))
    for key in sorted({*a, *b}):
        if (key.split(".")[0] not in NOT_OF_THE_PICTURE or key == "trainer.precision") and a.get(key) != b.get(key):
            return f"{key}: {a.get(key)!r} there, {b.get(key)!r} here"
    return ""


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
