import tracemalloc
from collections.abc import Iterable, Set
from pathlib import Path

import datasets
import pytest

from clipward.datamodules.prompts import Dealt, PromptDataModule, Request
from clipward.errors import InputError


def test_seeds_by_texts_by_weights_with_the_unguided_first() -> None:
    data = PromptDataModule(text=["a man", "a girl"], guidance_weight=[10, 50], n_samples=2, seed=7)
    assert list(data.requests)[:5] == [
        Request(0, "", 7, 0.0),
        Request(1, "a man", 7, 10),
        Request(2, "a man", 7, 50),
        Request(3, "a girl", 7, 10),
        Request(4, "a girl", 7, 50),
    ]
    assert [request.seed for request in data.requests] == [7] * 5 + [8] * 5
    assert [request.index for request in data.requests] == list(range(10))
    assert len(PromptDataModule(text=["a man"], n_samples=3, unguided=False).requests) == 3


def test_more_samples_keep_the_earlier_indices() -> None:
    few, many = (list(PromptDataModule(text=["a man"], n_samples=n).requests) for n in (2, 5))
    assert many[: len(few)] == few


def test_no_text_is_unguided() -> None:
    requests = PromptDataModule(n_samples=2, unguided=False).requests
    assert list(requests) == [Request(0, "", 0, 0.0), Request(1, "", 1, 0.0)]


def test_a_file_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a man\n\n  a girl \n")
    data = PromptDataModule(prompts=str(file), guidance_weight=[5], n_samples=1, unguided=False)
    assert [request.text for request in data.requests] == ["a man", "a girl"]


def test_a_file_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "a man", "seed": 3, "guidance_weight": 20}\n{"text": "a girl"}\n')
    data = PromptDataModule(prompts=str(file), guidance_weight=[1, 2], n_samples=2, seed=5)
    assert list(data.requests) == [
        Request(0, "a man", 3, 20),
        Request(1, "a girl", 5, 1),
        Request(2, "a girl", 5, 2),
        Request(3, "a girl", 6, 1),
        Request(4, "a girl", 6, 2),
    ]


def test_batches_are_lists_and_leave_out_what_is_done() -> None:
    data = PromptDataModule(text=["a man"], guidance_weight=[9], n_samples=3, unguided=False, micro_batch=2)
    data.done = frozenset({1})
    assert list(data.predict_dataloader()) == [
        {"index": [0, 2], "text": ["a man", "a man"], "seed": [0, 2], "guidance_weight": [9, 9], "valid": [True, True]}
    ]


def dealt(requests: Iterable[Request], micro_batch: int, world: int, done: Set[int] = frozenset()) -> list[list[dict]]:
    return [list(Dealt(requests, micro_batch, done, rank, world)) for rank in range(world)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_every_request_is_dealt_once_and_no_process_gets_out_of_step(count: int, world: int, micro_batch: int) -> None:
    requests = [Request(i, "a man", i, 1.0) for i in range(count)]
    done = {0, 5} & set(range(count))
    shares = dealt(requests, micro_batch, world, done)
    sizes = [[len(batch["index"]) for batch in share] for share in shares]
    assert all(size == sizes[0] for size in sizes)
    assert all(size <= micro_batch for size in sizes[0])
    assert len(Dealt(requests, micro_batch, done, 0, world)) == len(sizes[0])
    valid = [
        i for share in shares for batch in share for i, ok in zip(batch["index"], batch["valid"], strict=True) if ok
    ]
    assert sorted(valid) == [i for i in range(count) if i not in (0, 5)]


def test_the_lines_of_a_file_are_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    with file.open("w") as lines:
        lines.writelines(f'{{"text": "a man", "seed": {i}}}\n' for i in range(100_000))
    tracemalloc.start()
    data = PromptDataModule(prompts=str(file), guidance_weight=[5], micro_batch=2)
    batches = iter(data.predict_dataloader())
    first = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first["seed"] == [0, 1]
    assert len(data.predict_dataloader()) == 50_000
    assert peak < 2**20


def test_streaming_sets_are_requests(tmp_path: Path) -> None:
    rows = [{"text": "a man", "seed": 3}, {"text": "a girl", "seed": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "requests.parquet")
    streams = [str(tmp_path / "requests.parquet"), datasets.Dataset.from_list(rows).to_iterable_dataset(), rows]
    for prompts in streams:
        data = PromptDataModule(prompts=prompts, guidance_weight=[1], n_samples=2, seed=5, micro_batch=2)
        seen = [pair for batch in data.predict_dataloader() for pair in zip(batch["text"], batch["seed"], strict=True)]
        assert seen == [("a man", 3), ("a girl", 5), ("a girl", 6)]
    with pytest.raises(InputError, match=r"row 1 of the data set is no request \(KeyError\('text'\)\)"):
        list(PromptDataModule(prompts=[{"caption": "a man"}]).requests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples: 0 given; 1 or more would do"),
        ({"micro_batch": 0}, "micro_batch: 0 given"),
        ({"guidance_weight": []}, "guidance_weight: none given"),
        ({"text": [" "]}, "text: an empty sentence"),
        ({"prompts": "nowhere.txt"}, "prompts: there is no file nowhere.txt"),
        ({"prompts": "a.txt", "text": ["a man"]}, "both a file and --text"),
    ],
)
def test_bad_requests_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptDataModule(**arguments)


@pytest.mark.parametrize("line", ["{", '{"seed": 1}', '["a"]', '{"text": "a", "seed": "x"}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a man"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"row 2 of .*bad.jsonl is no request"):
        PromptDataModule(prompts=str(file))
