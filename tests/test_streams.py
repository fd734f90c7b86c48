"""Training pictures that are read as they come."""

import io
import itertools
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import tiny_module, tiny_trainer
from PIL import Image
from torch import Tensor

from clipward.datamodules.streams import StreamDataModule, _Stream
from clipward.errors import InputError

VALIDATED = 2


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three files of 10 rows; the grey of picture i is 8·i, and picture 25 is damaged."""
    from datasets import Dataset

    (tmp_path / "shards").mkdir()
    for shard in range(3):
        rows = []
        for i in range(10 * shard, 10 * shard + 10):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (8 * i,) * 3).save(file, "PNG")
            image = {"bytes": b"no picture" if i == 25 else file.getvalue(), "path": None}
            rows.append({"image": image, "other": i, "text": f"grey {i}" if i % 7 else " ", "odd": i % 2})
        Dataset.from_list(rows).to_parquet(tmp_path / f"shards/{shard}.parquet")
    return str(tmp_path / "shards/*.parquet")


def stream(path: str, **kwargs) -> StreamDataModule:
    defaults = {"size": 16, "batch_size": 4, "shuffle_buffer": 6, "val_count": VALIDATED}
    return StreamDataModule(path, **{**defaults, **kwargs})


def numbers(image: Tensor) -> list[int]:
    return (((image[:, 0, 0, 0] + 1) * 127.5) / 8).round().int().tolist()


class Records(L.Callback):
    """Which pictures each training batch has."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(numbers(batch["image"]))


def run(path: str, root: Path, steps: int, ckpt: str | None = None, **kwargs) -> list[list[int]]:
    records = Records()
    trainer = tiny_trainer(root, max_steps=steps, callbacks=[records], limit_val_batches=0)
    torch.manual_seed(3)
    trainer.fit(tiny_module(), stream(path, **kwargs), ckpt_path=ckpt)
    trainer.save_checkpoint(root / f"{steps}.ckpt")
    return records.seen


@pytest.mark.filterwarnings("ignore:data.path")
def test_each_pass_has_every_picture_once_in_an_order_of_its_own(shards: str, tmp_path: Path) -> None:
    seen = [picture for batch in run(shards, tmp_path, 14) for picture in batch]
    passes = [seen[:27], seen[27:54]]
    assert [sorted(each) for each in passes] == [[i for i in range(VALIDATED, 30) if i != 25]] * 2
    assert passes[0] != passes[1]


@pytest.mark.filterwarnings("ignore:data.path")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_what_an_unbroken_one_does(workers: int, shards: str, tmp_path: Path) -> None:
    whole = run(shards, tmp_path, 12, num_workers=workers)
    first = run(shards, tmp_path, 5, num_workers=workers)
    rest = run(shards, tmp_path, 12, str(tmp_path / "5.ckpt"), num_workers=workers)
    assert len(whole) == 12
    assert first + rest == whole


@pytest.mark.filterwarnings("ignore:data.path")
@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_a_pass_whether_there_are_enough_shards_or_not(world: int, shards: str) -> None:
    data = stream(shards)
    data.setup("validate")
    rows = [list(_Stream(data, rank, world, 0)._rows(0, rank, world)) for rank in range(world)]
    assert sorted(len(each) for each in rows) in ([[10, 18], [8, 20]] if world == 2 else [[5, 5, 6, 6, 6]])
    flat = [row["image"]["bytes"] for each in rows for row in each]
    assert len(set(flat)) == len(flat) == 28


def test_the_first_pictures_validate(shards: str) -> None:
    data = stream(shards)
    data.setup("validate")
    assert [numbers(batch["image"]) for batch in data.val_dataloader()] == [[0, 1]]


@pytest.mark.filterwarnings("ignore:data.path")
def test_captions_labels_and_classes_come_with_their_pictures(shards: str) -> None:
    labels = {"size": {"small": "other", "none": None}, "parity": {"even": "not odd", "odd": "odd"}}
    data = stream(shards, caption_column="text", labels=labels, classes="parity")
    data.setup("fit")
    assert data.class_names == ["even", "odd"]
    (held_out,) = data.val_dataloader()
    assert held_out["caption"] == ["grey 1"]  # the first row has no text
    seen = []
    for batch in itertools.islice(data.train_dataloader(), 6):
        for number, caption, label, kind in zip(
            numbers(batch["image"]), batch["caption"], batch["labels"].tolist(), batch["class_label"], strict=True
        ):
            assert (caption, label, int(kind)) == (f"grey {number}", [0, number % 2], number % 2)
            seen.append(number)
    assert set(seen[:23]) == {i for i in range(VALIDATED, 30) if i % 7 and i != 25}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption_column": "odd"}, r"data\.caption_column: got 'odd', a column of 'int64', expected texts"),
        ({"caption_column": "no"}, r"data\.caption_column: got 'no', expected a column of the data"),
        ({"labels": {"a": {"b": "text", "c": None}}}, r"data\.labels: got 'text', a column of 'string', expected bool"),
        ({"classes": "a"}, r"data\.classes: got 'a', expected an attribute of data.labels"),
        ({"path": "none.parquet"}, r"data\.path: there is no file 'none.parquet'"),
        ({"path": None}, r"data\.path: got none, expected parquet files"),
        ({"image_column": "picture"}, r"data\.image_column: got 'picture', expected a column of the data"),
        ({"val_count": 0}, r"data\.val_count: got 0, expected a whole number from 1"),
        ({"channels": 2}, r"data\.channels: got 2"),
    ],
)
def test_what_can_not_be_read_is_refused(given: dict, message: str, shards: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(**{"path": shards, **given}).setup("fit")


def test_a_stream_needs_an_end_and_pictures(shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.max_steps: got -1, expected 1 or more, since a stream has no end"):
        tiny_trainer(tmp_path, max_epochs=1).fit(tiny_module(), stream(shards))
    one = shards.replace("*", "0")
    with pytest.raises(InputError, match=r"data\.val_count: got 10, expected fewer"):
        tiny_trainer(tmp_path, max_steps=1).fit(tiny_module(), stream(one, val_count=10))
