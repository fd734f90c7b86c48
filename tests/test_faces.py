import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_module, tiny_trainer
from lightning.pytorch.loggers import TensorBoardLogger

from clipward.datamodules.faces import ATTRIBUTES, Faces, FacesDataModule, attributes, caption, describe, draw
from clipward.errors import InputError


def test_a_face_is_a_function_of_seed_and_index() -> None:
    assert np.array_equal(draw(1, 2), draw(1, 2))
    assert not np.array_equal(draw(1, 2), draw(1, 3))
    assert not np.array_equal(draw(1, 2), draw(2, 2))
    assert draw(0, 0, size=48).size == (48, 48)
    assert caption(1, 2) == caption(1, 2)


def test_attributes_are_balanced() -> None:
    faces = [attributes(0, i) for i in range(3000)]
    for name, values in ATTRIBUTES.items():
        for value in values:
            share = sum(face[name] == value for face in faces) / len(faces)
            assert share == pytest.approx(1 / len(values), abs=0.04)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_shows(name: str) -> None:
    """The same face with another value differs, and not by a hair's breadth."""
    from clipward.datamodules.faces import _Pen

    base = attributes(0, 5)
    pictures = []
    for value in ATTRIBUTES[name][:2]:
        pictures.append(np.asarray(_Pen(random.Random(3), 64).face({**base, name: value}), dtype=float))
    assert (np.abs(pictures[0] - pictures[1]).max(axis=-1) > 40).sum() > 25


def test_the_documents_texts_are_among_the_captions() -> None:
    captions = {caption(0, i) for i in range(60_000)}
    assert {"a young girl with brown hair", "an old man with a smile"} <= captions
    assert len(captions) > 3000


def test_a_caption_says_nothing_that_is_not_so() -> None:
    words = {
        "gender": {"woman": ("woman", "lady", "girl"), "man": ("man", "gentleman", "boy")},
        "age": {"young": ("young", "girl", "boy"), "old": ("old",)},
        "hair": {hair: (f"{hair} hair",) for hair in ATTRIBUTES["hair"]},
        "smile": {"smiling": ("smile", "smiling"), "serious": ("serious",)},
    }
    for i in range(2000):
        face, sentence = attributes(7, i), f" {caption(7, i)} ".replace(",", "")
        for name, values in words.items():
            for value, phrases in values.items():
                if any(f" {phrase} " in sentence for phrase in phrases):
                    assert face[name] == value, (sentence, face)
        if "glasses" in sentence:
            assert (face["glasses"] == "without") == ("no glasses" in sentence or "without glasses" in sentence)


def test_captions_read_as_english() -> None:
    for i in range(500):
        sentence = describe(attributes(3, i), random.Random(i))
        assert "  " not in sentence
        assert " a old" not in f" {sentence}"
        assert not sentence.endswith(("with", "and", ","))


def test_items_and_batches() -> None:
    faces = Faces(seed=1, count=3, size=32)
    item = faces[2]
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].abs().max() <= 1
    expected = torch.from_numpy(np.asarray(draw(1, 2, 32)).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(item["image"], expected)
    assert [values[label] for values, label in zip(ATTRIBUTES.values(), item["labels"], strict=True)] == list(
        attributes(1, 2).values()
    )

    data = FacesDataModule(size=16, train_count=10, val_count=5, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert len(batch["caption"]) == 4
    assert batch["labels"].shape == (4, 5)
    assert len(data.val_dataloader()) == 2


BAD_ARGUMENTS: list[tuple[dict, str]] = [
    ({"size": 0}, "data.size: got 0, expected a whole number from 1 to"),
    ({"size": -64}, "data.size: got -64"),
    ({"train_count": -1}, "data.train_count: got -1, expected a whole number from 0 to"),
    ({"val_count": -1}, "data.val_count: got -1"),
    ({"val_count": 1.5}, "data.val_count: got 1.5"),
    ({"batch_size": 0}, "data.batch_size: got 0, expected a whole number from 1 to"),
    ({"num_workers": -2}, "data.num_workers: got -2"),
    ({"seed": -1}, "data.seed: got -1"),
    ({"seed": 10**5000}, "data.seed: got 0x"),
    ({"caption_detail": 1.1}, "data.caption_detail: got 1.1, expected a number from 0 to 1"),
    ({"caption_detail": float("nan")}, "data.caption_detail: got nan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        FacesDataModule(**arguments)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("fit", {"train_count": 0}, "data: got 0 pictures to train on, expected 1 or more"),
        ("fit", {"train_count": 63}, "data.batch_size: got 64, expected 63 or less"),
        ("fit", {"size": 2**14, "train_count": 2**40}, "data.size: got 16384, expected less, or fewer than"),
        (
            "validate",
            {"val_count": 0},
            "data.val_count: got 0, expected 1 or more, since there is nothing to validate on",
        ),
    ],
)
def test_a_set_that_cannot_serve_is_refused(stage: str, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        FacesDataModule(**arguments).setup(stage)


def test_what_does_not_train_needs_no_training_faces() -> None:
    data = FacesDataModule(size=16, train_count=0, val_count=3)
    data.setup("validate")
    assert len(next(iter(data.val_dataloader()))["caption"]) == 3
    FacesDataModule(size=16, train_count=64, val_count=0).setup("fit")


def test_faces_are_kept_from_stage_to_stage() -> None:
    data = FacesDataModule(size=16, train_count=64, val_count=3)
    data.setup("fit")
    kept = data.val_set
    data.setup("validate")
    assert data.val_set is kept


def test_fit_ends_before_it_starts_where_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", max_steps=1, logger=TensorBoardLogger(tmp_path / "run"))
    with pytest.raises(InputError, match=r"^data\.batch_size: got 64, expected 9 or less"):
        trainer.fit(tiny_module(), FacesDataModule(size=16, train_count=9))
    assert trainer.global_step == 0
    assert not (tmp_path / "run").exists()
