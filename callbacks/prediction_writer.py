"""The callback of ``predict``: it writes the pictures, ``metadata.jsonl``, ``grid.png`` and the command's config."""

from collections.abc import Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from clipward.callbacks.figure import Cell, draw_figure
from clipward.callbacks.gallery import Gallery, Output, save_png, to_line
from clipward.errors import InputError
from clipward.files import atomic_write
from clipward.sampler import HasSampler

CONFIG_FILE = "config.predict.yaml"
PACKAGES = ("clipward", "torch", "lightning", "open_clip_torch")
HASHES = ("weights_hash", "clip_hash", "noisy_clip_hash", "classifier_hash")
# settings that do not change the pictures
WITHOUT_EFFECT = ("trainer", "data", "micro_batch", "save_dir", "overwrite", "shard_size", "seed_everything")
# fields of metadata that differ from picture to picture
PER_PICTURE = ("file_name", "index", "clip_similarity", "float32_retries", "shard")
GRID_ROWS, GRID_COLUMNS = 16, 24


class HasDone(Protocol):
    """A data module that leaves out the requests whose indices are in ``done``."""

    done: Set[int]


class PredictionWriter(BasePredictionWriter):
    """Writes each picture as soon as it is made, atomically.

    With ``files`` the folder is one that ``datasets.load_dataset("imagefolder", data_dir=…)`` opens; shards are opened
    as ``webdataset`` and ``parquet``. Processes on several machines must share the folder.

    Args:
        save_dir: the folder. It must be new, empty or written by the same command.
        config: the command as YAML. It is written first, and tells whether a folder is of the same command.
        overwrite: replace the pictures of another command.
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
            raise InputError(f"shard_size: got {shard_size}, expected 1 or more")
        self.save_dir, self.config, self.overwrite = Path(save_dir), config, overwrite
        self.gallery, self.shard_size = Gallery(self.save_dir, output), shard_size

    def finished(self) -> set[int]:
        """The indices of the requests that an earlier run of this command has finished.

        Raises:
            InputError: where the folder belongs to another command.
        """
        if not self.save_dir.exists() or not any(self.save_dir.iterdir()):
            return set()
        file = self.save_dir / CONFIG_FILE
        difference = find_difference(file.read_text(), self.config) if file.is_file() else f"it has no {CONFIG_FILE}"
        if difference:
            if self.overwrite and file.is_file():
                return set()
            advice = "another folder or --overwrite true" if file.is_file() else "another folder"
            raise InputError(
                f"save_dir: {self.save_dir} holds other files than this command's ({difference}); use {advice}"
            )
        return self.gallery.indices()

    def setup(self, trainer: L.Trainer, pl_module: HasSampler, stage: str) -> None:
        requests: HasDone = trainer.datamodule
        # One process looks at the folder, so that all leave out the same requests.
        requests.done = trainer.strategy.broadcast(self.finished() if trainer.is_global_zero else set())
        self.gallery.rank = trainer.global_rank

    def on_predict_start(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        requests: HasDone = trainer.datamodule
        provenance = pl_module.provenance()
        if trainer.is_global_zero:
            if requests.done:
                self._check_same_weights(provenance)
                self.gallery.pack_left(self.shard_size)
            else:
                self.gallery.clear()
            with atomic_write(self.save_dir / CONFIG_FILE) as aside:
                aside.write_text(self.config, encoding="utf-8")
        trainer.strategy.barrier("save_dir")

    def _check_same_weights(self, provenance: dict[str, Any]) -> None:
        before = next(self.gallery.rows())
        for name in HASHES:
            there, here = before.get(name), provenance.get(name)
            if there != here:
                raise InputError(
                    f"save_dir: {self.save_dir} holds pictures of other weights ({name}: {there} there, {here} here); "
                    "use another folder"
                )

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: HasSampler,
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

    def on_predict_end(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        trainer.strategy.barrier("written")
        if trainer.is_global_zero:
            self.finish()

    def finish(self) -> None:
        """Merge what the processes wrote and draw the grid. A second call changes nothing."""
        self.gallery.pack_left(self.shard_size)
        self.gallery.merge()
        count, shown = self.draw_grid()
        which = "all" if shown == count else "the first"
        print(f"{count} pictures in {self.save_dir}, {which} of them in {self.save_dir / 'grid.png'}")

    def draw_grid(self) -> tuple[int, int]:
        """Draw the first seeds, texts and weights as a figure.

        Returns:
            how many pictures there are, and how many of them the figure shows.
        """
        seeds: set[int] = set()
        columns: set[tuple[str, float]] = set()
        pictures: dict[Cell, Image.Image] = {}
        common: dict[str, Any] = {}
        count = 0
        for row in self.gallery.rows():
            count += 1
            cell = Cell(row["seed"], row["text"], row["guidance_weight"])
            column = cell.text, cell.guidance_weight
            if (cell.seed in seeds or len(seeds) < GRID_ROWS) and (column in columns or len(columns) < GRID_COLUMNS):
                seeds.add(cell.seed)
                columns.add(column)
                pictures[cell] = self.gallery.open(row)
                common = common or {name: value for name, value in row.items() if name not in PER_PICTURE}
        if pictures:
            save_png(self.save_dir / "grid.png", draw_figure(pictures), to_line(common))
        return count, len(pictures)


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    pixels = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def find_difference(theirs: str, ours: str) -> str:
    """The first setting of two YAML configs that makes other pictures, or ``""``."""
    there, here = (_flatten(yaml.safe_load(text) or {}) for text in (theirs, ours))
    for key in sorted({*there, *here}):
        has_effect = key.split(".")[0] not in WITHOUT_EFFECT or key == "trainer.precision"
        if has_effect and there.get(key) != here.get(key):
            return f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
    return ""


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"model": {"weights": "a"}}`` as ``{"model.weights": "a"}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
