"""What ``predict`` reads: requests, each a text, a seed and a weight, dealt to the processes exactly once."""

import json
from collections.abc import Iterable, Iterator, Sequence, Set, Sized
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from clipward.errors import InputError, first_line


@dataclass(frozen=True)
class Request:
    """One picture to make. It depends on what stands here and on the weights, and on nothing beside it."""

    index: int
    text: str
    seed: int
    guidance_weight: float


class PromptDataModule(L.LightningDataModule):
    """Requests for every seed × text × weight, numbered with the seeds outermost.

    Args:
        text: sentences that the pictures should obey; none of them gives unguided pictures.
        guidance_weight: how hard they should; 0 is unguided. A list draws each text with each weight.
        n_samples: pictures for each text and weight: one for each seed from ``seed`` on.
        seed: the first seed. Pictures of one seed start from the same noise.
        unguided: whether to draw each seed without guidance too, ahead of its texts.
        prompts: where requests stand, in place of ``text``: a ``.txt`` file with a text a line, used as ``text`` is; or
            rows that have ``text`` and may have ``seed`` and ``guidance_weight``, each a request (``n_samples`` seeds
            of it where it names no seed): a ``.jsonl`` file, a ``.parquet`` file, a data set on the hub, or in Python
            what gives dictionaries whenever it is iterated, such as a streaming set of ``datasets``. Rows are never
            loaded whole.
        micro_batch: pictures that are sampled at once on each device; ``auto`` is as many as fit on a GPU, and 16
            on a CPU.
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
    ) -> None:
        super().__init__()
        self.micro_batch = micro_batch
        self.done: Set[int] = frozenset()
        weights = [100.0] if guidance_weight is None else guidance_weight
        for name, value in (("n_samples", n_samples), ("micro_batch", micro_batch)):
            if value != "auto" and value < 1:
                raise InputError(f"{name}: {value} given; 1 or more would do")
        if text and prompts:
            raise InputError("prompts: both a file and --text given; one of them would do")
        if not weights:
            raise InputError("guidance_weight: none given; one or more numbers would do")
        seeds = range(seed, seed + n_samples)
        if prompts is None or (isinstance(prompts, str) and Path(prompts).suffix == ".txt"):
            texts = (text or []) if prompts is None else list(_Lines(Path(prompts)))
            if prompts is not None and not texts:
                raise InputError(f"prompts: {prompts} has no text; a sentence a line would do")
            self.requests: Iterable[Request] = Product(texts, weights, seeds, unguided)
        elif isinstance(prompts, str) and Path(prompts).suffix == ".jsonl":
            self.requests = JsonLines(Path(prompts), weights, seeds)
        else:
            rows = _stream(prompts) if isinstance(prompts, str) else prompts
            self.requests = Rows(rows, weights, seeds)

    def predict_dataloader(self) -> DataLoader:
        """This process's share of what is not ``done``."""
        return self._loader(self.requests)

    def test_dataloader(self) -> DataLoader:
        """The same, with weights outermost: what a batch costs is what its weight costs.

        An unguided picture is drawn once for each seed, for it is the same whatever the text.
        """
        plain = {request.seed: replace(request, text="") for request in self.requests if not request.guidance_weight}
        guided = [request for request in self.requests if request.guidance_weight]
        return self._loader([*plain.values(), *sorted(guided, key=lambda request: request.guidance_weight)])

    def _loader(self, requests: Iterable[Request]) -> DataLoader:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        size = self.micro_batch
        if size == "auto":  # where memory runs out on a GPU, it is halved; a CPU would swap
            size = 256 if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda" else 16
        return DataLoader(Dealt(requests, size, self.done, rank, world), batch_size=None)


class Product:
    """Every seed × (unguided, then text × weight)."""

    def __init__(self, texts: list[str], weights: Sequence[float], seeds: Sequence[int], unguided: bool) -> None:
        if any(not sentence.strip() for sentence in texts):
            raise InputError("text: an empty sentence given; leave it out for unguided pictures")
        plain = [("", 0.0)] if unguided or not texts else []
        self.seeds, self.cells = seeds, plain + [(sentence, weight) for sentence in texts for weight in weights]

    def __len__(self) -> int:
        return len(self.seeds) * len(self.cells)

    def __iter__(self) -> Iterator[Request]:
        cells = ((text, seed, weight) for seed in self.seeds for text, weight in self.cells)
        return (Request(index, *cell) for index, cell in enumerate(cells))


class Rows:
    """The requests of rows that come one after another, as many as there are.

    Args:
        rows: mappings with ``text``, and ``seed`` and ``guidance_weight`` where they have their own.
        weights: of a row that has none.
        seeds: likewise.
        source: what the rows are, for an error.
    """

    def __init__(
        self, rows: Iterable[Any], weights: Sequence[float], seeds: Sequence[int], source: str = "the data set"
    ) -> None:
        self.rows, self.weights, self.seeds, self.source = rows, weights, seeds, source

    def __iter__(self) -> Iterator[Request]:
        index = 0
        for number, row in enumerate(self.rows, start=1):
            try:
                cells = self._cells(row)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"prompts: row {number} of {self.source} is no request ({error!r}); "
                    '{"text": "a man", "seed": 1} would do'
                ) from error
            for cell in cells:
                yield Request(index, *cell)
                index += 1

    def _cells(self, row: Any) -> list[tuple[str, int, float]]:
        """The (text, seed, weight) that a row asks for."""
        row = json.loads(row) if isinstance(row, str) else row
        text = row["text"]
        if not isinstance(text, str):
            raise TypeError(f"its text is {text!r}")
        weights = self.weights if row.get("guidance_weight") is None else [float(row["guidance_weight"])]
        seeds = self.seeds if row.get("seed") is None else [int(row["seed"])]
        return [(text, seed, weight) for seed in seeds for weight in weights]


class JsonLines(Rows):
    """The requests of a file with an object a line, which is read once to check it and then as it is needed."""

    def __init__(self, path: Path, weights: Sequence[float], seeds: Sequence[int]) -> None:
        super().__init__(_Lines(path), weights, seeds, str(path))
        self.count = sum(1 for _ in self)
        if self.count == 0:
            raise InputError(f"prompts: {path} has no request")

    def __len__(self) -> int:
        return self.count


class _Lines:
    """The lines of a file that are not empty, read anew by each iterator."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"prompts: there is no file {path}")
        self.path = path

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8") as file:
            yield from filter(None, map(str.strip, file))


class Dealt(IterableDataset):
    """Micro-batches of one process's share.

    Each round takes world × micro_batch requests and gives every process as many as the others. What is missing to
    that is made up for by copies that are not ``valid``, so that processes which work on one network together stay in
    step: a batch is a list for each of ``index``, ``text``, ``seed``, ``guidance_weight`` and ``valid``.

    Args:
        requests: all of them, in an order that is the same in every process.
        micro_batch: the most requests of a batch.
        done: indices to leave out.
        rank: which process.
        world: of how many.
    """

    def __init__(
        self, requests: Iterable[Request], micro_batch: int, done: Set[int] = frozenset(), rank: int = 0, world: int = 1
    ) -> None:
        self.requests, self.micro_batch, self.done, self.rank, self.world = requests, micro_batch, done, rank, world

    def __iter__(self) -> Iterator[dict[str, list]]:
        left = (request for request in self.requests if request.index not in self.done)
        while dealt := list(islice(left, self.micro_batch * self.world)):
            share = -(-len(dealt) // self.world)
            own = [asdict(request) | {"valid": True} for request in dealt[self.rank :: self.world]]
            own += [asdict(dealt[-1]) | {"valid": False}] * (share - len(own))
            yield {name: [row[name] for row in own] for name in own[0]}

    def __len__(self) -> int:
        """Batches.

        Raises:
            TypeError: for a stream, which doesn't know it.
        """
        if not isinstance(self.requests, Sized):
            raise TypeError("a stream has no length")
        return -(-(len(self.requests) - len(self.done)) // (self.micro_batch * self.world))


def _stream(name: str) -> Iterable[dict[str, Any]]:
    """The rows of a parquet file or of a data set on the hub, as ``datasets`` streams them."""
    from datasets import load_dataset

    if Path(name).suffix == ".parquet":
        if not Path(name).is_file():
            raise InputError(f"prompts: there is no file {name}")
        return load_dataset("parquet", data_files=name, split="train", streaming=True)
    try:
        return load_dataset(name, split="train", streaming=True)
    except Exception as error:
        raise InputError(
            f"prompts: {name} is no .txt, .jsonl or .parquet file, and the hub gives no such data set "
            f"({first_line(error)})"
        ) from error
