import torch
from torch.utils.data import DataLoader, Dataset

from clipward.datamodules.loading import training_loader


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
    whole = [number for batch in seen(loader()) for number, _ in batch]
    shares = [[number for batch in seen(loader(rank, 2)) for number, _ in batch] for rank in range(2)]
    assert not {*shares[0]} & {*shares[1]}
    assert [*shares[0][:4], *shares[1][:4]] == [*whole[:8:2], *whole[1:8:2]]


def test_it_goes_on_in_the_middle_of_an_epoch_and_then_from_the_beginning() -> None:
    whole, stopped, resumed = loader(), loader(), loader()
    resumed.sampler.seed = 99  # the state says it
    assert seen(stopped, epoch=2, count=3) == seen(whole, epoch=2)[:3]
    resumed.load_state_dict(stopped.state_dict())
    assert len(resumed) == 5
    assert seen(resumed, epoch=2) == seen(whole, epoch=2)[3:]
    assert seen(resumed, epoch=3) == seen(whole, epoch=3)


def test_at_the_end_of_an_epoch_the_next_is_whole() -> None:
    stopped, resumed = loader(), loader()
    seen(stopped, epoch=0)
    resumed.load_state_dict(stopped.state_dict())
    assert seen(resumed, epoch=1) == seen(loader(), epoch=1)
