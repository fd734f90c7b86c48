from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_module, tiny_trainer
from torch.utils.data import DataLoader, Dataset

from clipward.datamodules.faces import FacesDataModule
from clipward.datamodules.loading import (
    check_loading,
    check_training,
    load_from_hub,
    training_loader,
    validation_loader,
)
from clipward.errors import InputError


class Numbered(Dataset[dict]):
    """Pictures that say which they are on their left half."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict:
        image = torch.zeros(1, 1, 2)
        image[..., 0] = index + 1
        return {"image": image}


def loader(rank: int = 0, world: int = 1, **kwargs: int) -> DataLoader:
    torch.manual_seed(4)
    made = training_loader(Numbered(), batch_size=4, **{"num_workers": 0, **kwargs})
    made.sampler.rank, made.sampler.num_replicas = rank, world
    made.sampler.num_samples = 23 // world
    made.sampler.total_size = 23 // world * world
    return made


def seen(made: DataLoader, epoch: int = 0, count: int | None = None) -> list[list[tuple[int, bool]]]:
    """For each batch the pictures, and whether they are mirrored."""
    made.sampler.set_epoch(epoch)
    batches = []
    for batch in made:
        left, right = batch["image"][:, 0, 0].int().unbind(1)
        batches.append(list(zip((left + right - 1).tolist(), (right > 0).tolist(), strict=True)))
        if len(batches) == count:
            break
    return batches


def test_an_epoch_is_a_function_of_its_seed_and_number() -> None:
    torch.manual_seed(0)
    first, second = seen(loader()), seen(loader(), epoch=1)
    torch.manual_seed(7)
    assert seen(loader(), epoch=0) == first != second
    assert len(first) == 5
    assert len({number for batch in first for number, _ in batch}) == 20
    assert 3 < sum(mirrored for batch in first for _, mirrored in batch) < 17


def test_workers_change_nothing() -> None:
    assert seen(loader(num_workers=2), epoch=3) == seen(loader(), epoch=3)


def test_processes_share_an_epoch() -> None:
    atomic_write = [number for batch in seen(loader()) for number, _ in batch]
    shares = [[number for batch in seen(loader(rank, 2)) for number, _ in batch] for rank in range(2)]
    assert not {*shares[0]} & {*shares[1]}
    assert [*shares[0][:4], *shares[1][:4]] == [*atomic_write[:8:2], *atomic_write[1:8:2]]


def test_it_goes_on_in_the_middle_of_an_epoch_and_then_from_the_beginning() -> None:
    atomic_write, stopped, resumed = loader(), loader(), loader()
    resumed.sampler.seed = 99  # the state says it
    assert seen(stopped, epoch=2, count=3) == seen(atomic_write, epoch=2)[:3]
    resumed.load_state_dict(stopped.state_dict())
    assert len(resumed) == 5
    assert seen(resumed, epoch=2) == seen(atomic_write, epoch=2)[3:]
    assert seen(resumed, epoch=3) == seen(atomic_write, epoch=3)


def test_at_the_end_of_an_epoch_the_next_is_whole() -> None:
    stopped, resumed = loader(), loader()
    seen(stopped, epoch=0)
    resumed.load_state_dict(stopped.state_dict())
    assert seen(resumed, epoch=1) == seen(loader(), epoch=1)


class Damaged(Numbered):
    def __getitem__(self, index: int) -> dict:
        if index >= 7:
            try:
                raise OSError("broken\nfile")
            except OSError as error:
                raise InputError("data: got a damaged picture, 7.png") from error
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("serve", [training_loader, validation_loader])
def test_what_a_worker_says_is_one_line(serve: Any, num_workers: int) -> None:
    with pytest.raises(InputError, match=r"^data: got a damaged picture, 7\.png$"):
        list(serve(Damaged(), batch_size=4, num_workers=num_workers))


def test_validation_takes_all_in_order() -> None:
    batches = [batch["image"][:, 0, 0, 0].int().tolist() for batch in validation_loader(Numbered(), 4, 0)]
    assert [number for batch in batches for number in batch] == [*range(1, 24)]
    assert len(batches[-1]) == 3


@pytest.mark.parametrize(
    ("count", "batch_size", "world", "limit", "message"),
    [
        (23, 23, 1, 1.0, None),
        (23, 11, 2, 1.0, None),
        (23, 4, 1, 1, None),
        (23, 4, 1, 0.2, None),
        (23, 24, 1, 1.0, "data.batch_size: got 24, expected 23 or less, since there are 23 pictures to train on"),
        (23, 12, 2, 1.0, "data.batch_size: got 12, expected 11 or less, since there are 23 .* in 2 processes"),
        (0, 1, 1, 1.0, "data: got 0 pictures to train on, expected 1 or more"),
        (3, 1, 4, 1.0, "data: got 3 pictures to train on, expected 4 or more, one for each process"),
        (23, 4, 1, 0, "trainer.limit_train_batches: got 0, expected one or more of 5 batches"),
        (23, 4, 1, 0.0, "trainer.limit_train_batches: got 0.0"),
        (23, 4, 1, 0.1, "trainer.limit_train_batches: got 0.1"),
    ],
)
def test_training_on_nothing_is_refused(
    count: int, batch_size: int, world: int, limit: float, message: str | None
) -> None:
    trainer = SimpleNamespace(world_size=world, limit_train_batches=limit)
    if message is None:
        check_training(count, batch_size, trainer)
        made = training_loader(Numbered(), batch_size, 0)
        made.sampler.num_samples = count // world
        assert len(made) >= 1
    else:
        with pytest.raises(InputError, match=f"^{message}"):
            check_training(count, batch_size, trainer)


@pytest.mark.parametrize("value", [-1, 0.5, True, "4", None, 10**30, float("nan")])
@pytest.mark.parametrize("name", ["size", "batch_size", "num_workers"])
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^data\.{name}: got .*, expected a whole number (from [01] to \d+|or a height and a width)$"
    ):
        check_loading(**{"size": 64, "batch_size": 4, "num_workers": 0, name: value})


def test_names_on_the_hub() -> None:
    for name in ("a/b/c", "/a", "a/", "", " ", "a b", "a\n", "..", "ä/b", "x" * 300, "tests", "~/a", "./a"):
        with pytest.raises(InputError, match=r"^data\.path: got .*, expected a name$"):
            load_from_hub(name, "data.path", "a name")
    with pytest.raises(InputError, match=r"^data\.path: got 'nobody/no\.thing_-1', expected a name; the hub gives no"):
        load_from_hub("nobody/no.thing_-1", "data.path", "a name")


def test_overfitting_takes_the_first_batches(tmp_path: Path) -> None:
    data = FacesDataModule(size=16, train_count=16, val_count=4, batch_size=4)
    seen = []
    module = tiny_module()
    module.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(batch["caption"])
    trainer = tiny_trainer(tmp_path, overfit_batches=2, max_epochs=2)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(module, data)
    assert seen[:2] == seen[2:]
    assert seen[0] == [data.train_set[i]["caption"] for i in range(4)]
