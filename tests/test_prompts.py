import json
import math
import os
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from clipward.datamodules import rows as readers
from clipward.datamodules.prompts import Dealt, PromptDataModule, Request
from clipward.errors import InputError, first_line, list_names, shorten


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


@pytest.mark.parametrize(
    "content",
    ["a\rb\r\nc\n\n \u00a0 \nd", "\ufeffa man\na girl", "a | b:2\n\n1:\n", "a\n" * 9, "\x0bé\u2028e\n"],
)
def test_texts_are_counted_as_they_are_read(tmp_path: Path, content: str) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content.encode())
    data = PromptDataModule(prompts=str(file), n_samples=1, guidance_weight=[1, 2])
    assert len(data.requests) == len(list(data.requests))
    guided = dict.fromkeys(request.text for request in data.requests if request.guidance_weight)
    assert list(dict.fromkeys(data.guiding_texts())) == list(guided)
    assert list(dict.fromkeys(data.all_texts())) == list(guided)
    assert list(data.all_texts()) == list(PromptDataModule(prompts=str(file), guidance_weight=[0]).all_texts())


def test_the_texts_of_a_file_are_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"a man with the number {i}\n" for i in range(200_000)))
    tracemalloc.start()
    data = PromptDataModule(prompts=str(file), guidance_weight=[5], unguided=False, micro_batch=2)
    first = next(iter(data.predict_dataloader()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first["text"] == ["a man with the number 0", "a man with the number 1"]
    assert peak < file.stat().st_size * 3


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


def test_a_text_of_white_space_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": " ", "guidance_weight": 0}')
    requests = PromptDataModule(prompts=str(tmp_path / "rows.jsonl")).requests
    assert {request.text for request in requests} == {""}


def test_batches_are_lists_and_leave_out_what_is_done() -> None:
    data = PromptDataModule(text=["a man"], guidance_weight=[9], n_samples=3, unguided=False, micro_batch=2)
    data.done = frozenset({1})
    assert list(data.predict_dataloader()) == [
        {
            "index": [0, 2],
            "text": ["a man", "a man"],
            "seed": [0, 2],
            "guidance_weight": [9, 9],
            "edit": [None, None],
            "class_label": [None, None],
            "valid": [True, True],
        }
    ]


def test_what_is_done_beyond_the_requests_leaves_none_out() -> None:
    data = PromptDataModule(n_samples=6, micro_batch=2)
    data.done = {0, 1, 6, 7, 8}
    loader = data.predict_dataloader()
    assert [index for batch in loader for index in batch["index"]] == [2, 3, 4, 5]
    assert len(loader.dataset) == 2  # where it were less, Lightning would stop early


def test_a_batch_of_test_has_one_weight() -> None:
    texts = [f"a man {i}" for i in range(3)]
    data = PromptDataModule(text=texts, guidance_weight=[9, 0, -2], n_samples=2, micro_batch=4)
    loader = data.test_dataloader()
    batches = list(loader)
    assert [batch["guidance_weight"] for batch in batches] == [[0] * 2, [-2] * 4, [-2] * 2, [9] * 4, [9] * 2]
    assert len(loader) == len(batches)
    assert sorted(seed for batch in batches[1:3] for seed in batch["seed"]) == [0, 0, 0, 1, 1, 1]


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
    if len(done) < count:
        assert len(Dealt(requests, micro_batch, done, 0, world)) == len(sizes[0])
    else:  # Lightning must not take it for a loader that it may skip
        with pytest.raises(TypeError, match="nothing is left"):
            len(Dealt(requests, micro_batch, done, 0, world))
    valid = [
        i for share in shares for batch in share for i, ok in zip(batch["index"], batch["valid"], strict=True) if ok
    ]
    assert sorted(valid) == [i for i in range(count) if i not in (0, 5)]


def test_the_lines_of_a_file_are_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    with file.open("w") as lines:
        lines.writelines(f'{{"text": "a man", "seed": {i}}}\n' for i in range(40_000))
    tracemalloc.start()
    data = PromptDataModule(prompts=str(file), guidance_weight=[5], micro_batch=2)
    batches = iter(data.predict_dataloader())
    first = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first["seed"] == [0, 1]
    assert len(data.predict_dataloader()) == 20_000
    assert peak < 2**20


def test_a_line_without_an_end_is_not_loaded(tmp_path: Path) -> None:
    for name in ("zeros.jsonl", "zeros.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**30)
        tracemalloc.start()
        with pytest.raises(InputError, match=r"row 1 of .*zeros.* got 1048576 bytes or more"):
            PromptDataModule(prompts=str(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**23


def test_a_file_is_read_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "a man"}\n')
    opened = Mock(wraps=open)
    monkeypatch.setattr(readers, "open", opened, raising=False)
    data = PromptDataModule(prompts=str(file), n_samples=2**31 - 1)  # counted, not listed
    assert opened.call_count == 1
    assert len(data.requests) == 2**31 - 1
    next(iter(data.predict_dataloader()))
    assert opened.call_count == 2


def write_parquet(path: Path, **columns: list) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_streaming_sets_are_requests(tmp_path: Path) -> None:
    rows = [{"text": "a man", "seed": 3}, {"text": "a girl", "seed": None}]
    file = write_parquet(tmp_path / "requests.parquet", text=["a man", "a girl"], seed=[3, None])
    for prompts in (
        file,
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
        datasets.Dataset.from_list(rows),
        rows,
    ):
        data = PromptDataModule(prompts=prompts, guidance_weight=[1], n_samples=2, seed=5, micro_batch=2)
        for _ in range(2):
            dealt = list(data.predict_dataloader())
            seen = [pair for batch in dealt for pair in zip(batch["text"], batch["seed"], strict=True)]
            assert seen == [("a man", 3), ("a girl", 5), ("a girl", 6)]
    assert len(PromptDataModule(prompts=file).requests) == 5


def test_a_stream_is_checked_as_it_comes() -> None:
    rows = [{"text": "a man"}, {"text": "a man", "sede": 1}]
    data = PromptDataModule(prompts=datasets.IterableDataset.from_generator(lambda: iter(rows)), n_samples=1)
    requests = iter(data.requests)
    assert next(requests).text == "a man"
    with pytest.raises(InputError, match="row 2 of the data set: got sede, expected no other keys than text, seed"):
        next(requests)
    with pytest.raises(InputError, match="without a row"):
        list(PromptDataModule(prompts=datasets.IterableDataset.from_generator(lambda: iter([]))).requests)


def test_what_python_gives_is_checked_at_once() -> None:
    with pytest.raises(InputError, match="prompts: row 1 of the data set: got caption, expected no other keys"):
        PromptDataModule(prompts=[{"caption": "a man"}])
    for rows in (iter([{"text": "a man"}]), {"text": "a man"}, 3, b"a man"):
        with pytest.raises(InputError, match=r"prompts: got .*, expected what gives rows whenever it is iterated"):
            PromptDataModule(prompts=rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples: got 0, expected a whole number from 1"),
        ({"n_samples": -3}, "n_samples: got -3"),
        ({"n_samples": 1.5}, "n_samples: got 1.5"),
        ({"n_samples": 2**31}, "n_samples: got 2147483648"),
        ({"n_samples": True}, "n_samples: got True"),
        ({"micro_batch": 0}, "micro_batch: got 0, expected a whole number from 1 to 2147483647 or auto"),
        ({"micro_batch": "most"}, "micro_batch: got 'most'"),
        ({"seed": -1}, r"seed: got -1, expected a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "seed: got 9223372036854775808"),
        ({"seed": 10**5000}, "seed: got 0x"),
        ({"seed": 2**63 - 2, "n_samples": 3}, "n_samples: got 3, expected seeds to"),
        ({"guidance_weight": []}, "guidance_weight: got none"),
        ({"guidance_weight": 5}, "guidance_weight: got 5, expected a list of numbers"),
        ({"guidance_weight": [1, math.nan]}, "guidance_weight: got nan, expected a finite number"),
        ({"guidance_weight": [-math.inf]}, "guidance_weight: got -inf"),
        ({"guidance_weight": ["5"]}, "guidance_weight: got '5'"),
        ({"guidance_weight": [10**400]}, "guidance_weight: got 0x"),
        ({"text": [" "]}, "text: got ' ', expected a sentence; leave it out"),
        ({"text": "a man"}, "text: got 'a man', expected a list of sentences"),
        ({"text": ["a\0man"]}, r"text: got 'a\\x00man', expected one without the character U\+0000"),
        ({"text": ["\ud800"]}, r"text: .*U\+D800"),
        ({"text": ["a \ufeffman"]}, r"text: .*U\+FEFF"),
        ({"text": [None]}, "text: got None"),
        ({"text": ["a" * 10_000 + "\0"]}, "text: got 'aaa.*…aaa"),
        ({"prompts": "nowhere.txt"}, "prompts: there is no file 'nowhere.txt'; expected a .txt, .jsonl or .parquet"),
        ({"prompts": "nowhere.parquet"}, "prompts: there is no file"),
        ({"prompts": ""}, "prompts: got '', expected a .txt"),
        ({"prompts": "requests.csv"}, "prompts: got 'requests.csv', expected a .txt.* the hub gives no such data set"),
        ({"prompts": "/nowhere/requests"}, "prompts: got '/nowhere/requests', expected a .txt"),
        ({"prompts": "x" * 5000}, "prompts: got 'xxx.*…x"),
        ({"prompts": "x" * 5000 + ".jsonl"}, "prompts: there is no file 'xxx"),
        ({"prompts": "a\0.txt"}, "prompts: there is no file"),
        ({"prompts": "."}, "prompts: got '.', expected a .txt"),
        ({"prompts": "a.txt", "text": ["a man"]}, "prompts: got --text and --prompts, expected one of them"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        PromptDataModule(**arguments)
    check_line(caught.value)


def check_line(error: InputError) -> None:
    """One printable line, not much longer than what it repeats."""
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_local_names_try_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "requests.csv").touch()
    for name in ("requests.csv", "nowhere/else/requests", "~/requests", "./x", "", "."):
        with pytest.raises(InputError, match=r"^prompts: got"):
            PromptDataModule(prompts=str(tmp_path / name) if name == "requests.csv" else name)


GOOD = '{"text": "a man"}\n'
LINES = [
    ("{", "got '{', which is no JSON"),
    ("\0\0", ".*which is no JSON"),
    ("[" * 100_000, ".*which is no JSON"),
    ('{"text": ' * 100_000, ".*which is no JSON"),
    ("9" * 5000, ".*which is no JSON"),
    ('["a"]', r"got \['a'\], expected a row such as"),
    ("3", "got 3, expected a row"),
    ("null", "got None, expected a row"),
    ('"a man"', "got 'a man', expected a row"),
    ("{}", "got no key, expected a text"),
    ('{"seed": 1}', "got seed, expected a text"),
    ('{"text": "a", "sede": 1}', "got sede, expected no other keys than text, seed, guidance_weight"),
    ('{"text": "a", "weight": null}', "got weight, expected no other keys"),
    ('{"text": "a", "text": "b"}', "got 'text' twice"),
    ('{"text": "a", "seed": 1.7}', "seed: got 1.7, expected a whole number from 0 to"),
    ('{"text": "a", "seed": true}', "seed: got True"),
    ('{"text": "a", "seed": "x"}', "seed: got 'x'"),
    ('{"text": "a", "seed": -1}', "seed: got -1"),
    ('{"text": "a", "seed": 9223372036854775808}', "seed: got 9223372036854775808"),
    ('{"text": "a", "seed": 1e300}', r"seed: got 1e\+300"),
    ('{"text": "a", "seed": NaN}', "seed: got nan"),
    ('{"text": "a", "seed": Infinity}', "seed: got inf"),
    ('{"text": "a", "seed": []}', r"seed: got \[\]"),
    ('{"text": "a", "guidance_weight": NaN}', "guidance_weight: got nan, expected a finite number"),
    ('{"text": "a", "guidance_weight": -1e999}', "guidance_weight: got -inf"),
    ('{"text": "a", "guidance_weight": true}', "guidance_weight: got True"),
    ('{"text": "a", "guidance_weight": {"a": [1]}}', "guidance_weight: got {'a'"),
    ('{"text": null}', "text: got None"),
    ('{"text": ["a"]}', r"text: got \['a'\]"),
    ('{"text": ""}', "text: got '', expected a sentence; use guidance_weight 0 for an unguided picture"),
    ('{"text": " ", "guidance_weight": 3}', "text: got ' ', expected a sentence"),
    ('{"text": "\\ud83d"}', r"text: .*U\+D83D"),
    ('{"text": "a\\u0000"}', r"text: .*U\+0000"),
    ('{"text": "\\ufeffa"}', r"text: .*U\+FEFF"),
    ('\ufeff{"text": "a"}', ".*which is no JSON"),
    ('{"text": "' + "a" * 9000 + '\\u0007"}', r"text: got 'aaa.*U\+0007"),
    ('{"' + "a" * 9000 + '": 1}', "got aaa.*…aaa.*, expected no other keys"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line[:30].replace("\0", "0") for line, _ in LINES])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(GOOD + "\n" + line + "\n" + GOOD, encoding="utf-8")
    with pytest.raises(InputError, match=rf"^prompts: row 3 of '.*bad.jsonl': {message}") as caught:
        PromptDataModule(prompts=str(file))
    check_line(caught.value)


BINARY = bytes(range(256)) * 20
FILES: list[tuple[str, bytes, str]] = [
    ("empty.txt", b"", "got .* without a text"),
    ("blank.txt", b" \n\n\t\n", "got .* without a text"),
    ("bom.txt", b"\xef\xbb\xbf", "got .* without a text"),
    ("binary.txt", BINARY, r"row 1 of .* U\+0000"),
    ("binary.jsonl", BINARY, "row 1 of .*, which is no JSON"),
    (
        "utf16.txt",
        "a man\n".encode("utf-16"),
        r"row 1 of .*: got b'\\xff.*, which is not UTF-8; save the file as UTF-8",
    ),
    ("utf16le.txt", "a man\n".encode("utf-16-le"), r"row 1 of .* U\+0000"),
    ("utf16.jsonl", GOOD.encode("utf-16"), "row 1 of .*, which is not UTF-8"),
    ("latin.txt", "a man\nun garçon".encode("latin-1"), r"row 2 of .*: got b'un gar\\xe7on', which is not UTF-8"),
    ("latin.jsonl", GOOD.encode() + b'{"text": "\xe9"}', "row 2 of .*, which is not UTF-8"),
    ("inner.txt", "a man\n\ufeffa girl".encode(), r"row 2 of .*: text: .* U\+FEFF"),
    ("escape.txt", b"a man\n\x1b[31mred", r"row 2 of .* U\+001B"),
    ("empty.jsonl", b"\n\n", "got .* without a row"),
    ("empty.parquet", b"", "is no parquet file, or damaged after row 0"),
    ("binary.parquet", BINARY, "is no parquet file, or damaged after row 0"),
    ("torn.parquet", b"PAR1" + BINARY + b"PAR1", "is no parquet file, or damaged after row 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
def test_a_file_that_holds_something_else_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^prompts: (.*{name}.*)?{message}") as caught:
        PromptDataModule(prompts=str(tmp_path / name))
    assert name in str(caught.value)
    check_line(caught.value)


PLACES: list[Callable[[Path], Any]] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]


@pytest.mark.parametrize("make", PLACES, ids=["folder", "fifo", "link"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], Any], suffix: str) -> None:
    make(tmp_path / f"x.{suffix}")
    with pytest.raises(InputError, match=r"which is no regular file|there is no file"):
        PromptDataModule(prompts=str(tmp_path / f"x.{suffix}"))


TABLES: list[tuple[dict[str, list], str]] = [
    ({"caption": ["a"]}, "got caption, expected no other keys"),
    ({"text": ["a"], "sede": [1]}, "got sede, expected no other keys"),
    ({"seed": [1]}, "got seed, expected a text"),
    ({"text": []}, "without a row"),
    ({"text": ["a", None]}, "row 2 of .*: text: got None"),
    ({"text": [b"a"]}, "row 1 of .*: text: got b'a'"),
    ({"text": [1]}, "row 1 of .*: text: got 1"),
    ({"text": ["a", "b"], "seed": [1.0, 1.5]}, "row 2 of .*: seed: got 1.5"),
    ({"text": ["a"], "seed": [True]}, "row 1 of .*: seed: got True"),
    ({"text": ["a", "b"], "guidance_weight": [1.0, math.inf]}, "row 2 of .*: guidance_weight: got inf"),
    ({"text": ["a", ""], "guidance_weight": [0, 1]}, "row 2 of .*: text: got ''"),
]


@pytest.mark.parametrize(("columns", "message"), TABLES, ids=[message for _, message in TABLES])
def test_a_table_that_holds_no_requests_is_refused(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    file = write_parquet(tmp_path / "x.parquet", **columns)
    with pytest.raises(InputError, match=f"^prompts: .*{message}") as caught:
        PromptDataModule(prompts=file)
    check_line(caught.value)


def test_a_damaged_page_of_a_table_is_named(tmp_path: Path) -> None:
    file = Path(write_parquet(tmp_path / "x.parquet", text=[f"a man {i}" for i in range(5000)]))
    content = bytearray(file.read_bytes())
    content[1000:3000] = b"\xff" * 2000
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet' is no parquet file, or damaged after row \d+|^prompts: row"):
        PromptDataModule(prompts=str(file))


def test_what_people_have_is_read(tmp_path: Path) -> None:
    cases = [
        ("bom.txt", b"\xef\xbb\xbfa man\r\na girl", ["a man", "a girl"]),
        ("mac.txt", b"a man\ra girl\r", ["a man", "a girl"]),
        ("A.TXT", "ein Mädchen 👧🏽".encode(), ["ein Mädchen 👧🏽"]),
        (
            "bom.jsonl",
            b"\xef\xbb\xbf" + GOOD.encode() + b'\r\n{"text": "a\\tgirl", "seed": null}\r\n',
            ["a man", "a\tgirl"],
        ),
        ("unguided.jsonl", b'{"text": "", "guidance_weight": 0}', [""]),
        ("half.jsonl", b'{"text": "\\ud83d\\ude00"}', ["😀"]),
    ]
    for name, content, texts in cases:
        (tmp_path / name).write_bytes(content)
        data = PromptDataModule(prompts=str(tmp_path / name), n_samples=1, unguided=False)
        assert [request.text for request in data.requests] == texts, name
    floats = write_parquet(tmp_path / "floats.parquet", text=["a", "b"], seed=[3.0, None])  # as pandas writes them
    assert [request.seed for request in PromptDataModule(prompts=floats, n_samples=1).requests] == [3, 0]
    given = [{"text": np.str_("a"), "seed": np.int64(3), "guidance_weight": np.float32(2)}]
    assert list(PromptDataModule(prompts=given).requests) == [Request(0, "a", 3, 2.0)]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text() | ANYTHING,
        "seed": st.integers(-3, 2**65) | st.floats() | ANYTHING,
        "guidance_weight": st.floats() | st.integers() | ANYTHING,
        "sede": ANYTHING,
    },
)
quickly = settings(max_examples=150, deadline=None, database=None)


@quickly
@given(NEARLY | ANYTHING)
@example({"text": "a", "seed": sys.maxsize, "guidance_weight": -0.0})
def test_any_row_is_a_request_or_a_line(row: Any) -> None:
    try:
        requests = list(PromptDataModule(prompts=[row], n_samples=2).requests)
    except InputError as error:
        check_line(error)
    else:
        assert len(requests) == (2 if row.get("seed") is None else 1)
        for request in requests:
            assert type(request.seed) is int
            assert 0 <= request.seed < 2**63
            assert math.isfinite(request.guidance_weight)
            assert request.text.strip() or not request.guidance_weight
            request.text.encode()
            assert "\0" not in request.text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@quickly
@given(st.binary(max_size=300), st.sampled_from(["txt", "jsonl", "parquet"]))
def test_any_bytes_are_requests_or_a_line(place: Path, content: bytes, suffix: str) -> None:
    file = place / f"x.{suffix}"
    file.write_bytes(content)
    try:
        list(PromptDataModule(prompts=str(file)).requests)
    except InputError as error:
        check_line(error)


# without what the grammar of a text refuses: an empty part, and a weight of 0
SENTENCE = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff|:"), min_size=1)
ROW = st.fixed_dictionaries(
    {
        "text": SENTENCE.filter(str.strip),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "guidance_weight": st.none() | st.floats(-1e38, 1e38),
    }
)


@quickly
@given(st.lists(ROW, min_size=1, max_size=4))
def test_rows_survive_every_kind_of_file(place: Path, rows: list[dict]) -> None:
    with (place / "x.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows)
    kinds = {"text": pyarrow.string(), "seed": pyarrow.int64(), "guidance_weight": pyarrow.float64()}
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(kinds)), place / "x.parquet")
    expected = [(row["text"], row["seed"] or 0, row["guidance_weight"]) for row in rows]
    for prompts in (rows, str(place / "x.jsonl"), place / "x.parquet"):
        data = PromptDataModule(prompts=prompts, guidance_weight=[7.0], n_samples=1)
        made = [(request.text, request.seed, request.guidance_weight) for request in data.requests]
        assert made == [(text, seed, 7.0 if weight is None else weight) for text, seed, weight in expected]
        assert len(data.requests) == len(made)
        again = PromptDataModule(prompts=[{"text": t, "seed": s, "guidance_weight": w} for t, s, w in made])
        assert list(again.requests) == list(data.requests)


class Unprintable:
    def __repr__(self) -> str:
        raise KeyError("nothing to show")


@pytest.mark.parametrize(
    "value",
    ["a" * 300, "a\nb", "\ud800", "\x1b[31m", 10**6000, [[[[]]]] * 999, {"a" * 99: 1}, Unprintable(), np.zeros((9, 9))],
    ids=type,
)
def test_a_message_repeats_little_of_what_was_given(value: Any) -> None:
    for text in (shorten(value), first_line(ValueError(value))[:80], list_names([value])):
        assert text.isprintable()
        assert len(text) <= 80
    assert shorten("a man") == shorten(Path("a man")) == "'a man'"
    assert list_names(range(9)) == "0, 1, 2, 3, 4, 5 and 3 more"
