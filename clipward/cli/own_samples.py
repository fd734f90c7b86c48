"""The samples that ``fit`` draws from a diffusion model before it trains on them."""

from typing import Any

import lightning as L
import yaml

from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.datamodules.loading import check_training
from clipward.datamodules.own_samples import OwnSamplesDataModule
from clipward.datamodules.prompts import PromptDataModule
from clipward.errors import InputError
from clipward.lightning_modules.ddpm import DDPMModule
from clipward.sampling_config import SamplingConfig


def draw_own_samples(trainer: L.Trainer, weights: str | None, data: OwnSamplesDataModule) -> None:
    """Draw what is missing of a data module's samples, as ``clipward predict`` would: restartable, on all devices.

    Args:
        trainer: of the fit that follows.
        weights: the diffusion model's.
        data: whose samples they are.

    Raises:
        InputError: where there are no weights, or the folder holds something else.
    """
    if weights is None:
        raise InputError("weights: got none, expected a diffusion model to draw samples from, or --data.path PICTURES")
    settings: dict[str, Any] = {"skip_steps": data.skip_steps, "ddim": True}
    made_by: dict[str, Any] = {"weights": weights, "seed": data.seed, "unguided": True, "sampling": settings}
    writer: Any = PredictionWriter(str(data.samples_dir), yaml.safe_dump(made_by), of_samples=True)
    requests = PromptDataModule(n_samples=data.samples, seed=data.seed, micro_batch=data.micro_batch)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    try:
        requests.done = writer.check(requests.requests)
        count = max(data.samples, len(requests.done))
        check_training(count - data.count_held_out(count), data.batch_size, trainer)
        callbacks.append(writer)
        module = DDPMModule(weights=weights, sampling=SamplingConfig(**settings))
        trainer.predict(module, datamodule=requests, return_predictions=False)
    except InputError as error:
        if not str(error).startswith("save_dir: "):
            raise
        reason = str(error).partition(": ")[2].removesuffix(" or --overwrite true")
        raise InputError(f"data.samples_dir: {reason}") from error
    finally:
        callbacks[:] = [each for each in callbacks if each is not writer]
