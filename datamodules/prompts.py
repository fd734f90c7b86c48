"""What ``predict`` reads: requests, dealt to the processes exactly once."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set, Sized
from dataclasses import fields, replace
from typing import Any, Literal

import lightning as L
from torch.utils.data import ChainDataset, DataLoader, IterableDataset

from clipward.datamodules.edits import Edits
from clipward.datamodules.requests import Request
from clipward.datamodules.rows import Product, Requests, read_prompts, read_rows
from clipward.editing import Edit
from clipward.errors import InputError, shorten
from clipward.values import MOST_SEED, ClassLabel, check_seed, check_weight

MOST_SAMPLES = 2**31 - 1
MOST_WAITING = 64  # kinds of edits


class PromptDataModule(L.LightningDataModule):
    """Requests for every seed × init image × text × weight, numbered with the seeds outermost.

    Args:
        text: sentences that guide the pictures; without any they are unguided.
        guidance_weight: how strongly; 0 is unguided. A list draws each text with each weight.
        n_samples: pictures for each text and weight: one for each seed from ``seed`` on.
        seed: the first seed. Pictures of one seed start from the same noise.
        unguided: whether to draw each seed without guidance too, ahead of its texts.
        prompts: where requests stand, in place of ``text``: a ``.txt`` file with a text a line, used as ``text`` is; or
            rows that have ``text`` and may have ``seed``, ``guidance_weight``, ``class_label`` and the arguments of an
            edit, and nothing else, each a request (``n_samples`` seeds of it where it names no seed): a ``.jsonl``
            file, a ``.parquet`` file, a data set on the hub, or in Python what gives dictionaries whenever it is
            iterated, such as a streaming set of ``datasets``. All rows are checked before the first picture, and then
            read one by one: what is given must have an end, and give the same rows each time.
        micro_batch: pictures that are sampled at once on each device; ``auto`` is as many as fit on a GPU, and 16
            on a CPU.
        first_index: the number of the first picture, whose file has it as its name; not with ``prompts``.
        init_image: pictures to edit: a file, or a folder of them. The rows of ``prompts`` may name their own, as they
            may name all that follows; their paths are relative to the file of the rows.
        strength: see :class:`clipward.editing.Edit`, as for all that follows.
        mask: a file.
        outpaint: left, top, right and bottom.
        invert: begin at the noise that leads to the init image.
        image_prompt: a file.

    Raises:
        InputError: for a value out of range, and for a file that can't be read or has a row that is no request.
    """

    def __init__(
        self,
        text: list[str] | None = None,
        guidance_weight: list[float] | None = None,
        n_samples: int = 4,
        seed: int = 0,
        unguided: bool = True,
        prompts: str | Iterable[dict[str, Any]] | None = None,
        micro_batch: int | Literal["auto"] = 16,
        first_index: int = 0,
        init_image: str | None = None,
        strength: float | None = None,
        mask: str | None = None,
        outpaint: list[float] | None = None,
        invert: bool | None = None,
        image_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(first_index, int) or isinstance(first_index, bool) or not 0 <= first_index <= MOST_SAMPLES:
            raise InputError(
                f"first_index: got {shorten(first_index)}, expected a whole number from 0 to {MOST_SAMPLES}"
            )
        if first_index and prompts is not None:
            raise InputError("first_index: got --prompts beside it, expected one of them")
        self.micro_batch = (
            micro_batch if micro_batch == "auto" else _check_count("micro_batch", micro_batch, " or auto")
        )
        self.done: Set[int] = frozenset()
        self.before_dealing: Callable[[], None] | None = None  # called once the model is loaded; it may change `done`
        given = _check_list("guidance_weight", guidance_weight, "numbers", [100.0])
        weights = [check_weight(weight) for weight in given]
        if not weights:
            raise InputError("guidance_weight: got none, expected one or more numbers")
        seeds = range(check_seed(seed), check_seed(seed) + _check_count("n_samples", n_samples))
        if seeds[-1] > MOST_SEED:
            raise InputError(f"n_samples: got {n_samples}, expected seeds to 2**63 - 1 alone, from {seed} on")
        texts = _check_list("text", text, "sentences", [])
        if texts and prompts is not None:
            raise InputError("prompts: got --text and --prompts, expected one of them")
        edits = Edits(
            {
                "init_image": init_image,
                "strength": strength,
                "mask": mask,
                "outpaint": outpaint,
                "invert": invert,
                "image_prompt": image_prompt,
            }
        )
        self.requests: Requests
        if prompts is None:
            self.requests = Product(texts, weights, seeds, unguided, edits.default, first_index)
        elif isinstance(prompts, str | os.PathLike):
            self.requests = read_prompts(os.fspath(prompts), weights, seeds, unguided, edits)
        else:
            self.requests = read_rows(prompts, weights, seeds, edits)

    def list_kinds(self) -> list[Edit | None]:
        """One edit of each kind and margin that the requests have; None stands for pictures without any."""
        return list({edit and (edit.kind, edit.outpaint): edit for edit in self.requests.edits()}.values())

    def list_labels(self) -> list[ClassLabel]:
        """The class labels of the requests; None stands for that of the run."""
        return list(dict.fromkeys(self.requests.labels()))

    def guiding_texts(self) -> Iterator[str]:
        """The texts of all requests that are guided, each at least once."""
        return self.requests.guiding_texts()

    def all_texts(self) -> Iterator[str]:
        """The texts of all requests, each at least once, whatever their weight."""
        return self.requests.all_texts()

    def has_texts(self) -> bool:
        """Whether a picture is compared with a text, or with a picture in its place, whatever its weight."""
        return self.requests.has_texts()

    def predict_dataloader(self) -> DataLoader:
        """This process's share of what is not ``done``."""
        if self.before_dealing is not None:
            self.before_dealing()
        return DataLoader(self._deal(self.requests), batch_size=None)

    def test_dataloader(self) -> DataLoader:
        """The same, with weights outermost and a new batch for each: what a batch costs is what its weight costs.

        An unguided picture is drawn once for each seed, for it is the same whatever the text.
        """
        if any(edit is not None for edit in self.list_kinds()):
            raise InputError("init_image: test judges pictures that texts alone make, expected none; use predict")
        if self.list_labels() != [None]:
            raise InputError("class_label: test draws one class, expected --class_label and none in rows; use predict")
        plain = {request.seed: replace(request, text="") for request in self.requests if not request.guidance_weight}
        groups = {0.0: [*plain.values()]} if plain else {}
        for request in self.requests:
            if request.guidance_weight:
                groups.setdefault(request.guidance_weight, []).append(request)
        weights = sorted(groups, key=lambda weight: (weight != 0, weight))  # unguided pictures first
        return DataLoader(ChainDataset([self._deal(groups[weight]) for weight in weights]), batch_size=None)

    def transfer_batch_to_device(self, batch: dict[str, list], device: Any, dataloader_idx: int) -> dict[str, list]:
        """As it is, for requests hold no tensors."""
        return batch

    def _deal(self, requests: Iterable[Request]) -> "Dealt":
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        done, size = self.done, self.micro_batch
        if isinstance(self.requests, Sized):  # a folder may hold more, which would make the batches seem fewer
            asked = range(self.requests.first, self.requests.first + len(self.requests))
            done = {index for index in done if index in asked}
        if size == "auto":  # where memory runs out on a GPU, it is halved; a CPU would swap
            size = 256 if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda" else 16
        return Dealt(requests, size, done, rank, world, self.requests.kinds)


class Dealt(IterableDataset):
    """Micro-batches of one process's share.

    Each round takes world × micro_batch requests and gives every process as many as the others. What is missing to
    that is made up for by copies that are not ``valid``, so that processes which work on one network together stay in
    step: a batch is a list for each field of a :class:`Request`, and one for ``valid``. The edits
    of a round are of one kind, so what comes between waits for more of its kind, or for the end.

    Args:
        requests: all of them, in an order that is the same in every process.
        micro_batch: the most requests of a batch.
        done: indices to leave out.
        rank: which process.
        world: of how many.
        kinds: of edits, as far as it is known.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        micro_batch: int,
        done: Set[int] = frozenset(),
        rank: int = 0,
        world: int = 1,
        kinds: int = 1,
    ) -> None:
        self.requests, self.micro_batch, self.done, self.rank, self.world = requests, micro_batch, done, rank, world
        self.kinds = kinds

    def __iter__(self) -> Iterator[dict[str, list]]:
        waiting: dict[Any, list[Request]] = {}
        for request in self.requests:
            if request.index not in self.done:
                kind = request.edit and request.edit.kind
                alike = waiting.setdefault(kind, [])
                alike.append(request)
                if len(alike) == self.micro_batch * self.world:
                    yield self._deal(waiting.pop(kind))
                elif len(waiting) > MOST_WAITING:
                    yield self._deal(waiting.pop(next(iter(waiting))))
        for alike in waiting.values():
            yield self._deal(alike)

    def _deal(self, dealt: list[Request]) -> dict[str, list]:
        share = -(-len(dealt) // self.world)
        own = dealt[self.rank :: self.world]
        valid = [i < len(own) for i in range(share)]
        own += [dealt[-1]] * (share - len(own))
        return {field.name: [getattr(request, field.name) for request in own] for field in fields(Request)} | {
            "valid": valid
        }

    def __len__(self) -> int:
        """Batches.

        Raises:
            TypeError: for a stream, and for rows with edits of several kinds, which don't know it; and where all is
                done, for Lightning would then skip the hooks that look at the folder.
        """
        if not isinstance(self.requests, Sized) or self.kinds > 1:
            raise TypeError("a stream has no length")
        left = len(self.requests) - len(self.done)
        if not left:
            raise TypeError("nothing is left")
        return -(-left // (self.micro_batch * self.world))


def _check_count(name: str, value: Any, other: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_SAMPLES:
        raise InputError(f"{name}: got {shorten(value)}, expected a whole number from 1 to {MOST_SAMPLES}{other}")
    return value


def _check_list(name: str, value: Any, what: str, default: list[Any]) -> list[Any]:
    if value is None:
        return default
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InputError(f"{name}: got {shorten(value)}, expected a list of {what}")
    return list(value)
