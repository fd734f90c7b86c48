"""The callback of ``predict``: it writes pictures, ``metadata.jsonl``, a figure, a page and the command's config."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from clipward.callbacks.figure import Cell, draw_figure
from clipward.callbacks.gallery import (
    CONFIG_FILE,
    GRID,
    LOCK,
    METADATA,
    PAGE,
    PER_PICTURE,
    PROGRESS,
    Gallery,
    Output,
    is_hidden_of_ours,
    save_png,
    to_line,
)
from clipward.callbacks.gallery_page import write_page
from clipward.callbacks.progress import Frames, format_rows
from clipward.callbacks.signals import StopSignals
from clipward.diffusion.sampling import State
from clipward.editing import EDIT_FIELDS, PICTURES, Edit
from clipward.errors import InputError, shorten
from clipward.files import FolderLock, atomic_write, check_writable
from clipward.sampler import HasSampler, Sampler, to_picture
from clipward.values import ClassLabel
from clipward.yaml_files import read_yaml

PACKAGES = ("clipward", "torch", "lightning", "open_clip_torch")
# fields that all pictures of a run have in common and its config doesn't tell, and what they are of
SOURCES = {
    "weights_hash": "other weights",
    "clip_hash": "other weights",
    "noisy_clip_hash": "other weights",
    "classifier_hash": "other weights",
    "contrasts": "other contrasts",
    "device": "another device",  # whose noise is another; `auto` in a config may become either
}
# settings that do not change the pictures
WITHOUT_EFFECT = ("trainer", "data", "micro_batch", "save_dir", "overwrite", "shard_size", "seed_everything")
GRID_ROWS, GRID_COLUMNS = 16, 24
HEADER = "# lightning.pytorch=="  # of a config that a command wrote


class Request(Protocol):
    """What one picture is made of."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def guidance_weight(self) -> float: ...
    @property
    def class_label(self) -> ClassLabel: ...
    @property
    def edit(self) -> Edit | None: ...


class HasFirst(Protocol):
    """All requests of a command, whose indices begin with ``first``; their number need not be known."""

    first: int

    def __iter__(self) -> Iterator[Request]: ...


class HasDone(Protocol):
    """A data module that leaves out the requests whose indices are in ``done``, of all ``requests``.

    It calls ``before_dealing`` first, when the model is loaded, which may change ``done``.
    """

    done: Set[int]
    requests: HasFirst
    before_dealing: Callable[[], None] | None


class PredictionWriter(BasePredictionWriter):
    """Writes each picture as soon as it is made, atomically.

    With ``files`` the folder is one that ``datasets.load_dataset("imagefolder", data_dir=…)`` opens; shards are opened
    as ``webdataset`` and ``parquet``. Processes on several machines must share the folder.

    The first write waits for the first pictures, so that a command which fails before them leaves nothing. One run at a
    time writes to a folder. Files that are not of ``predict`` stay as they are.

    SIGTERM and SIGINT raise :class:`clipward.callbacks.signals.Stopped` while it draws.

    Args:
        save_dir: the folder. It must be new, empty or written by the same command.
        config: the command as YAML. It is written first, and tells whether a folder is of the same command.
        overwrite: replace the pictures of another command.
        output: a PNG for each picture, or shards.
        shard_size: pictures a shard.
        expected: hashes of weights, by their names in the metadata, which a picture that is made again must have.
        save_progress: write a filmstrip and an animation of each picture on its way, too.
        of_samples: the pictures are samples to learn from: more than are asked for may be there, of any device.
    """

    def __init__(
        self,
        save_dir: str,
        config: str = "",
        overwrite: bool = False,
        output: Output = "files",
        shard_size: int = 1000,
        expected: Mapping[str, str] | None = None,
        save_progress: bool = False,
        of_samples: bool = False,
    ) -> None:
        super().__init__("batch")
        if save_progress and output != "files":
            raise InputError(f"save_progress: got --output {output} beside it, expected files")
        if shard_size < 1:
            raise InputError(f"shard_size: got {shard_size}, expected 1 or more")
        self.save_dir, self.config, self.overwrite = Path(save_dir), config, overwrite
        self.gallery, self.shard_size = Gallery(self.save_dir, output, progress=save_progress), shard_size
        self.expected, self.of_samples = dict(expected or {}), of_samples
        self.lock = FolderLock(self.save_dir / LOCK)
        self.signals = StopSignals()
        self.begun = False
        self.replaces = False  # pictures of the same command that were made from something else

    def finished(self) -> set[int]:
        """The indices of the requests that an earlier run of this command has finished.

        Raises:
            InputError: where the folder belongs to another command, or can't be written.
        """
        check_writable(self.save_dir, "save_dir", folder=True)
        irregular = self.gallery.find_irregular()
        if irregular is not None:  # reading or writing it would lead elsewhere, or wait forever
            raise InputError(
                f"save_dir: {self.save_dir / irregular} has a name that predict uses, and is no file or folder of its "
                "own but a link, a pipe or the like; move it or use another folder"
            )
        there = [] if not self.save_dir.exists() else list(self.save_dir.iterdir())
        if all(is_hidden_of_ours(path) for path in there):
            return set()  # also where a run was killed before it had written its config
        file = self.save_dir / CONFIG_FILE
        if not file.is_file() or file.is_symlink():
            raise InputError(
                f"save_dir: {self.save_dir} holds other files than this command's (it has no {CONFIG_FILE}); use "
                "another folder"
            )
        difference = find_difference(read_config(file), self.config)
        if difference and not self.overwrite and any(True for _ in self.gallery.rows()):
            raise InputError(
                f"save_dir: {self.save_dir} holds other files than this command's ({difference}); use another folder "
                "or --overwrite true"
            )
        if difference:
            if self.config.startswith(HEADER) and not read_config(file).startswith(HEADER):
                raise InputError(f"save_dir: {file} was not written by predict; move it or use another folder")
            return set()
        if self.replaces:
            return set()
        self.gallery.drop_damaged(row for _, row in self._shown())
        return self.gallery.indices()

    def check(self, requests: HasFirst) -> set[int]:
        """Find what is finished, and check that no file of another one has a name that will be written.

        Raises:
            InputError: as :meth:`finished` does, and for such a file.
        """
        done = self.finished()
        if self.save_dir.exists():
            count = requests.first + len(requests) if isinstance(requests, Sized) else None
            stranger = self.gallery.find_stranger(done, count, requests.first)
            if stranger is not None:
                raise InputError(
                    f"save_dir: {self.save_dir / stranger} is there and was not written by predict; move it or use "
                    "another folder"
                )
        return done

    def setup(self, trainer: L.Trainer, pl_module: HasSampler, stage: str) -> None:
        requests: HasDone = trainer.datamodule
        self.begun = self.replaces = False
        # One process looks at the folder, so that all leave out the same requests.
        done = self.check(requests.requests) if trainer.is_global_zero else set()
        requests.done = trainer.strategy.broadcast(done)
        # What a picture was made from is known once the model is loaded, and what is done must be by then.
        requests.before_dealing = lambda: self._compare(trainer, pl_module)
        self.gallery.rank = trainer.global_rank

    def _compare(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        """Compare what the finished pictures were made from with what this run would make them from.

        Raises:
            InputError: where that differs, unless they are replaced.
        """
        self.signals.install()  # again, for the Trainer has its own by now, which nothing looks at while it predicts
        requests: HasDone = trainer.datamodule
        provenance = pl_module.provenance()
        self._check_expected(provenance)
        candidates = provenance.get("candidates", 1)
        if self.gallery.progress and candidates > 1:
            raise InputError(f"save_progress: got --candidates {candidates} beside it, expected 1")
        if trainer.is_global_zero:
            if (self.save_dir / CONFIG_FILE).is_file():
                self._take_lock()
            asked = requests.requests
            difference = self.find_other_source(asked, provenance, pl_module.sampler) if requests.done else ""
            if difference and not self.overwrite:
                raise InputError(
                    f"save_dir: {self.save_dir} holds pictures {difference}; use another folder or --overwrite true"
                )
            self.replaces = bool(difference)
            if self.replaces:
                self.check(asked)  # for more names will be written by now
        if trainer.strategy.broadcast(self.replaces):
            requests.done = set()

    def find_other_source(self, requests: Iterable[Request], provenance: dict[str, Any], sampler: Sampler) -> str:
        """Say how the first finished picture that this run would make otherwise was made; ``""`` where there is none.

        Rows and requests are read one at a time, for there may be millions.
        """
        asked = iter(requests)
        for row in self.gallery.rows():
            for name, what in SOURCES.items():
                if name == "device" and self.of_samples:
                    continue
                there, here = row.get(name), provenance.get(name)
                if there is not None and here is not None and there != here:  # None had no part in the pictures
                    return f"of {what} ({name}: {describe_difference(there, here)})"
            request = next((each for each in asked if each.index == row["index"]), None)
            if request is None and self.of_samples:
                return ""
            if request is None:
                return f"of other requests (index {row['index']}: {shorten(row.get('text'))} there, none here)"
            difference = find_other_request(row, request, sampler)
            if difference:
                return difference
        return ""

    def _begin(self, requests: HasDone) -> None:
        """Prepare the folder for this command's pictures. Only one process does, and the others wait."""
        self._take_lock()
        if self.check(requests.requests) != requests.done:
            raise InputError(f"save_dir: another run has written to {self.save_dir}; use the same command again")
        if requests.done:
            self.gallery.merge()
            self.gallery.take_staged(self.shard_size)
        else:
            self.gallery.clear()
        with atomic_write(self.save_dir / CONFIG_FILE) as aside, aside.open("w", encoding="utf-8") as file:
            file.write(self.config)
            file.flush()
            os.fsync(file.fileno())

    def _take_lock(self) -> None:
        if not self.lock.acquire():
            raise InputError(f"save_dir: another run is writing to {self.save_dir}; wait for it or use another folder")

    def _check_expected(self, provenance: dict[str, Any]) -> None:
        for name, there in self.expected.items():
            here, model = provenance.get(name), name.removesuffix("_hash")
            if here is not None and here != there:
                raise InputError(
                    f"{model}: {provenance[model]} has the hash {here}, but the picture says {there}; give the file "
                    f"that made it with --{'model.guidance.' if model == 'classifier' else ''}{model}"
                )

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: HasSampler, batch: Any, *_: Any) -> None:
        if self.gallery.progress:
            self.frames = Frames(len(batch["index"]), len(pl_module.sampler.list_steps(batch["edit"][0])))
            pl_module.watchers[:] = [*(each for each in pl_module.watchers if each != self._watch), self._watch]

    def _watch(self, state: State) -> None:
        self.frames.watch(state)

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
        if not self.begun:  # all processes have their first batch at the same time
            if trainer.is_global_zero:
                self._begin(trainer.datamodule)
            trainer.strategy.barrier("save_dir")
            self.begun = True
        common = prediction["provenance"] | {name: version(name) for name in PACKAGES}
        for i, index in enumerate(batch["index"]):
            if batch["valid"][i]:
                row = {
                    "index": index,
                    "text": batch["text"][i],
                    "seed": batch["seed"][i],
                    "guidance_weight": batch["guidance_weight"][i],
                    **prediction["own"][i],
                    "clip_similarity": prediction["clip_similarity"][i],
                    "float32_retries": prediction["float32_retries"][i],
                    **{name: value for name, value in common.items() if name not in prediction["own"][i]},
                }
                picture = to_picture(prediction["image"][i])
                self.gallery.add(row, picture, [*self.frames.of[i], picture] if self.gallery.progress else ())
        self.gallery.pack_staged(self.shard_size)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(*args, **kwargs)
        self.signals.check()

    def on_predict_end(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        trainer.strategy.barrier("written")
        if trainer.is_global_zero:
            self.finish()
        self.signals.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: HasSampler, exception: BaseException) -> None:
        self.signals.restore()
        self.lock.release()

    def finish(self) -> None:
        """Merge what the processes wrote and draw the grid. A second call changes nothing."""
        self._take_lock()
        try:
            if not self.begun:
                self.gallery.merge()
            self.gallery.pack_left(self.shard_size)
            self.gallery.merge()
            count, shown = self.draw_grid()
            if count:
                write_page(self.gallery)
        finally:
            self.lock.release()
        which = "all of them" if shown == count else f"the first {shown}"
        rows = [("pictures", f"{count} in {self.save_dir}")]
        if count:
            rows.append(("figure", f"{self.save_dir / GRID}, {which}"))
            rows.append(("page", f"{self.save_dir / PAGE}, to open in a browser"))
        if self.gallery.progress:
            rows.append(("progress", f"{self.save_dir / PROGRESS}, filmstrips and animations"))
        rows.append(("metadata", f"{self.save_dir / METADATA}"))
        print(format_rows(rows))

    def _shown(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Yield the first rows of metadata with their places in the figure: the first seeds and edits by columns."""
        places: set[tuple[int, str]] = set()
        columns: set[tuple[str, float | None]] = set()
        for row in self.gallery.rows():
            with suppress(KeyError, TypeError):  # a line that another one has changed
                edit = {name: row[name] for name in ("class_label", *EDIT_FIELDS) if row.get(name) is not None}
                label = json.dumps(edit, sort_keys=True) if edit else ""
                cell = Cell(row["seed"], row["text"], row["guidance_weight"], label)
                place, column = (cell.seed, cell.edit), (cell.text, cell.guidance_weight)
                if (place in places or len(places) < GRID_ROWS) and (column in columns or len(columns) < GRID_COLUMNS):
                    places.add(place)
                    columns.add(column)
                    yield cell, row

    def draw_grid(self) -> tuple[int, int]:
        """Draw the first seeds, texts and weights as a figure, beside the init images that were edited.

        Returns:
            how many pictures there are, and how many of them the figure shows.
        """
        pictures: dict[Cell, Image.Image] = {}
        originals: dict[Cell, Image.Image] = {}
        common: dict[str, Any] = {}
        for cell, row in self._shown():
            pictures[cell] = self.gallery.open(row)
            if isinstance(row.get("init_image"), str):
                with suppress(InputError):  # a file that is gone by now
                    size = pictures[cell].size
                    original = Edit(row["init_image"]).read_image((3, size[1], size[0]))
                    originals[replace(cell, text="", guidance_weight=None)] = to_picture(original)
            common = common or {name: value for name, value in row.items() if name not in PER_PICTURE}
        if pictures:
            save_png(self.save_dir / GRID, draw_figure(originals | pictures), to_line(common))
        return len(self.gallery.indices()), len(pictures)


def read_config(path: Path) -> str:
    """A command's config.

    Raises:
        InputError: where it is none.
    """
    try:
        content = read_yaml(path, "save_dir")
        text = path.read_text(encoding="utf-8")
    except (InputError, OSError, ValueError) as error:
        raise InputError(f"{error}; use another folder") from error
    if content is not None and not isinstance(content, dict):
        raise InputError(f"save_dir: {path} is {shorten(content)}, not a command; use another folder")
    return text


def find_difference(theirs: str, ours: str) -> str:
    """The first setting of two YAML configs that makes other pictures, or ``""``."""
    there, here = (_flatten(yaml.safe_load(text) or {}) for text in (theirs, ours))
    for key in sorted({*there, *here}):
        has_effect = key.split(".")[0] not in WITHOUT_EFFECT or key == "trainer.precision"
        if has_effect and there.get(key) != here.get(key):
            return f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
    return ""


def find_other_request(row: dict[str, Any], request: Request, sampler: Sampler) -> str:
    """Say how a finished picture's request differs from the one of its index now; ``""`` where it does not."""
    asked = {
        "text": request.text,
        "seed": request.seed,
        "guidance_weight": request.guidance_weight,
        **sampler.describe(None, request.class_label),
        **({} if request.edit is None else request.edit.to_record()),
    }
    for name in ("text", "seed", "guidance_weight", "class_label", *EDIT_FIELDS):
        key = f"{name}_sha256" if name in PICTURES else name
        if row.get(key) != asked.get(key):
            there, here = row.get(name), asked.get(name)
            if name in PICTURES and there == here:
                return f"made from an earlier {there} ({name})"
            return f"of other requests (index {request.index}, {name}: {describe_difference(there, here)})"
    return ""


def describe_difference(there: Any, here: Any) -> str:
    """Two values for a message; of lists, the first items that differ."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = next(pair for pair in zip_longest(there, here) if pair[0] != pair[1])
    return f"{shorten(there)} there, {shorten(here)} here"


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"model": {"weights": "a"}}`` as ``{"model.weights": "a"}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
