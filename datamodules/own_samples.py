"""Pictures for a network that needs no labels: one's own, or a diffusion model's own unguided samples."""

from pathlib import Path
from typing import Any

from PIL import Image

from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.datamodules.loading import MOST_PICTURES, check_whole
from clipward.datamodules.sources import open_rows
from clipward.errors import InputError, shorten
from clipward.values import MOST_SEED

OF_PICTURES = ("caption_column", "labels", "classes", "first", "count")  # what samples do not have


class OwnSamplesDataModule(CelebAHQDataModule):
    """The unguided samples of a diffusion model, or pictures of one's own where ``path`` is given.

    ``fit`` draws the samples once, before it trains, by the steps of ``clipward predict``: each exactly once, on all
    devices, and where a stopped run left off. They stay in ``samples_dir`` for the next run.

    Args:
        path: pictures to learn from instead, as in :class:`CelebAHQDataModule`.
        samples_dir: the folder of the samples. Samples of other weights need another folder.
        samples: how many to draw; where the folder holds more, all of them serve.
        seed: of the first sample.
        skip_steps: DDIM steps a sample.
        micro_batch: samples drawn at once on each device.
        size: height and width in pixels, or a pair of them; where samples are drawn, theirs.
        batch_size: pictures a batch, on each device.
        **data: the other arguments of :class:`CelebAHQDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        samples_dir: str = "runs/own_samples",
        samples: int = 1024,
        seed: int = 0,
        skip_steps: int = 20,
        micro_batch: int = 16,
        size: int | tuple[int, int] = 64,
        batch_size: int = 64,
        **data: Any,
    ) -> None:
        super().__init__(path or str(Path(samples_dir)), size=size, batch_size=batch_size, **data)
        check_whole(1, MOST_PICTURES, samples=samples, skip_steps=skip_steps, micro_batch=micro_batch)
        check_whole(0, MOST_SEED - samples, seed=seed)
        self.draws = path is None
        if self.draws:
            for name in OF_PICTURES:
                if getattr(self, name) not in (None, 0):
                    given = shorten(getattr(self, name))
                    raise InputError(f"data.{name}: got {given} for own samples, expected --data.path beside it")
        self.samples_dir, self.samples, self.seed = Path(samples_dir), samples, seed
        self.skip_steps, self.micro_batch = skip_steps, micro_batch

    def setup(self, stage: str) -> None:
        if self.draws and self.train_set is None:
            samples = open_rows(self.path, self.split, self.image_column)
            with Image.open(samples[0][self.image_column]["path"], formats=["PNG"]) as picture:
                self.size = picture.width if picture.width == picture.height else (picture.height, picture.width)
        super().setup(stage)
