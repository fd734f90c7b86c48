"""What ``predict`` reads: requests, each a text, a seed and a weight."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from errors import InputError


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
        prompts: a file: ``.txt`` with a text a line, used as ``text`` is, or ``.jsonl`` with an object a line that has
            ``text`` and may have ``seed`` and ``guidance_weight``, each line a request (``n_samples`` seeds of it
            where it names no seed).
        micro_batch: pictures that are sampled at once on each device.
    """

    def __init__(
        self,
        text: list[str] | None = None,
        guidance_weight: list[float] | None = None,
        n_samples: int = 4,
        seed: int = 0,
        unguided: bool = True,
        prompts: str | None = None,
        micro_batch: int = 16,
    ) -> None:
        super().__init__()
        self.micro_batch = micro_batch
        self.done: frozenset[int] = frozenset()
        weights = [100.0] if guidance_weight is None else guidance_weight
        for name, value in (("n_samples", n_samples), ("micro_batch", micro_batch)):
            if value < 1:
                raise InputError(f"{name}: {value} given; 1 or more would do")
        if text and prompts:
            raise InputError("prompts: both a file and --text given; one of them would do")
        if not weights:
            raise InputError("guidance_weight: none given; one or more numbers would do")
        seeds = range(seed, seed + n_samples)
        if prompts is not None and Path(prompts).suffix == ".jsonl":
            rows = _read_jsonl(Path(prompts), weights, seeds)
        else:
            texts = text or []
            if prompts is not None:
                texts = [line.strip() for line in _read(Path(prompts)).splitlines() if line.strip()]
                if not texts:
                    raise InputError(f"prompts: {prompts} has no text; a sentence a line would do")
            if any(not sentence.strip() for sentence in texts):
                raise InputError("text: an empty sentence given; leave it out for unguided pictures")
            plain = [("", 0.0)] if unguided or not texts else []
            cells = plain + [(sentence, weight) for sentence in texts for weight in weights]
            rows = [(sentence, s, weight) for s in seeds for sentence, weight in cells]
        self.requests = [Request(i, *row) for i, row in enumerate(rows)]

    def predict_dataloader(self) -> DataLoader:
        left = [request for request in self.requests if request.index not in self.done]
        return DataLoader(left, batch_size=self.micro_batch, collate_fn=_collate)

    def test_dataloader(self) -> DataLoader:
        """The same, with weights outermost: what a batch costs is what its weight costs."""
        ordered = sorted(self.requests, key=lambda request: request.guidance_weight)
        return DataLoader(ordered, batch_size=self.micro_batch, collate_fn=_collate)


def _collate(requests: list[Request]) -> dict[str, list]:
    """A list per field: ``{"index": […], "text": […], "seed": […], "guidance_weight": […]}``."""
    rows = [asdict(request) for request in requests]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"prompts: there is no file {path}")
    return path.read_text(encoding="utf-8")


def _read_jsonl(path: Path, weights: Sequence[float], seeds: Sequence[int]) -> list[tuple[str, int, float]]:
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            own_weights = [float(row["guidance_weight"])] if "guidance_weight" in row else weights
            own_seeds = [int(row["seed"])] if "seed" in row else seeds
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'prompts: line {number} of {path} is no request ({error}); {{"text": "a man", "seed": 1}} would do'
            ) from error
        rows += [(text, seed, weight) for seed in own_seeds for weight in own_weights]
    if not rows:
        raise InputError(f"prompts: {path} has no request")
    return rows
