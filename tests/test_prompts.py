from pathlib import Path

import pytest

from datamodules.prompts import PromptDataModule, Request
from errors import InputError


def test_seeds_by_texts_by_weights_with_the_unguided_first() -> None:
    data = PromptDataModule(text=["a man", "a girl"], guidance_weight=[10, 50], n_samples=2, seed=7)
    assert data.requests[:5] == [
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
    few, many = (PromptDataModule(text=["a man"], n_samples=n).requests for n in (2, 5))
    assert many[: len(few)] == few


def test_no_text_is_unguided() -> None:
    assert PromptDataModule(n_samples=2, unguided=False).requests == [Request(0, "", 0, 0.0), Request(1, "", 1, 0.0)]


def test_a_file_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a man\n\n  a girl \n")
    data = PromptDataModule(prompts=str(file), guidance_weight=[5], n_samples=1, unguided=False)
    assert [request.text for request in data.requests] == ["a man", "a girl"]


def test_a_file_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "a man", "seed": 3, "guidance_weight": 20}\n{"text": "a girl"}\n')
    data = PromptDataModule(prompts=str(file), guidance_weight=[1, 2], n_samples=2, seed=5)
    assert data.requests == [
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
        {"index": [0, 2], "text": ["a man", "a man"], "seed": [0, 2], "guidance_weight": [9, 9]}
    ]


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
    with pytest.raises(InputError, match=r"line 2 of .*bad.jsonl is no request"):
        PromptDataModule(prompts=str(file))
