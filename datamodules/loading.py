"""How training pictures are served."""

from torch.utils.data import DataLoader, Dataset


def training_loader(pictures: Dataset[dict], batch_size: int, num_workers: int) -> DataLoader:
    """Shuffled batches, all of one size."""
    return DataLoader(
        pictures,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
