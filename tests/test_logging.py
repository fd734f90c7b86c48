"""What fit logs, through whatever logger it is given."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_faces, tiny_module, tiny_trainer
from lightning import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipward.callbacks.guided_samples import GuidedSamples, log_sheet
from clipward.errors import InputError
from clipward.lightning_modules.ddpm import DDPMModule
from clipward.networks.classifier import Classifier, save_classifier

NUMBERS = {
    *("train/loss", "train/loss_t1", "train/loss_t2", "train/loss_t3", "train/loss_t4", "train/learning_rate"),
    *("train/gradient_norm", "train/ema_decay", "train/pictures_per_second"),
}


def fit(root: Path, logger: Logger | list[Logger], module: DDPMModule | None = None, **kwargs: object) -> DDPMModule:
    module = module or tiny_module()
    samples = GuidedSamples(n_samples=2, every_n_steps=2)
    trainer = tiny_trainer(root, logger=logger, callbacks=[samples], log_every_n_steps=2, **{"max_steps": 4, **kwargs})
    trainer.fit(module, tiny_faces())
    return module


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 0}, "GuidedSamples.n_samples: got 0, expected a whole number from 1 on"),
        ({"micro_batch": 0}, "GuidedSamples.micro_batch: got 0, expected a whole number from 1 on"),
        ({"every_n_steps": -1}, "GuidedSamples.every_n_steps: got -1, expected a whole number from 0 on"),
        ({"every_n_epochs": 1.5}, "GuidedSamples.every_n_epochs: got 1.5, expected a whole number from 0 on"),
        ({"seed": -1}, "GuidedSamples.seed: got -1, expected a whole number"),
        ({"guidance_weight": float("nan")}, "GuidedSamples.guidance_weight: got nan, expected a finite number"),
        ({"text": ["a\ud800"]}, "GuidedSamples.text: .* expected one without the character"),
        ({"text": ["a man", " "]}, "GuidedSamples.text: got an empty one"),
    ],
)
def test_samples_that_can_not_be_drawn_are_refused_before_training(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GuidedSamples(**settings)


def test_samples_that_no_model_can_draw_are_refused_before_training(tiny_clip: Path) -> None:
    with pytest.raises(InputError, match=r"^GuidedSamples.text: .* tokens too long for this CLIP"):
        GuidedSamples(text=["a man", "a very " * 90]).prepare(tiny_module(clip=str(tiny_clip)))
    with pytest.raises(InputError, match=r"^clip: got none, expected the name of a CLIP"):
        GuidedSamples(text=["a man"]).prepare(tiny_module())
    with pytest.raises(InputError, match=r"trainer.callbacks: got GuidedSamples for LightningModule, expected a model"):
        GuidedSamples().prepare(LightningModule())


def test_samples_are_not_compared_with_pictures_of_other_labels(tmp_path: Path, tiny_clip: Path) -> None:
    vocabulary = {"age": {"young": ["young"], "old": ["old"]}, "gender": {"woman": ["woman"], "man": ["man"]}}
    save_classifier(tmp_path / "judge.safetensors", Classifier(vocabulary, 8))
    samples = GuidedSamples(text=["a man"], judge=[str(tmp_path / "judge.safetensors")])
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[samples])
    expected = r"^data.labels: got gender, age, .*, expected age, gender, as in GuidedSamples.judge$"
    with pytest.raises(InputError, match=expected):
        trainer.fit(tiny_module(clip=str(tiny_clip)), tiny_faces())
    with pytest.raises(InputError, match=expected):  # as the command line does
        samples.prepare(tiny_module(clip=str(tiny_clip)), tiny_faces())


def test_a_monitor_that_is_not_logged_stops_before_training(tmp_path: Path) -> None:
    options = {"num_sanity_val_steps": 1, "max_epochs": 1}
    trainer = tiny_trainer(tmp_path, callbacks=[EarlyStopping("val_loss")], **options)
    with pytest.raises(InputError, match="got the monitor 'val_loss' of EarlyStopping, expected one of val/loss, or"):
        trainer.fit(tiny_module(), tiny_faces())
    assert trainer.global_step == 0
    tiny_trainer(tmp_path, callbacks=[EarlyStopping("val/loss")], **options).fit(tiny_module(), tiny_faces())


class Recorded(DDPMModule):
    """Keeps what is logged, by other means."""

    def losses(self, x0, t, *args):  # noqa: ANN201
        losses = super().losses(x0, t, *args)
        self.seen = [*getattr(self, "seen", []), (t, losses.detach())]
        return losses

    def on_after_backward(self) -> None:
        super().on_after_backward()
        norm = sum(p.grad.double().square().sum() for p in self.unet.parameters()).sqrt().item()
        self.norms = [*getattr(self, "norms", []), norm]


def test_the_numbers_are_what_they_say(tmp_path: Path) -> None:
    module = tiny_module()
    module.__class__ = Recorded
    fit(tmp_path, CSVLogger(tmp_path, "csv"), module, limit_val_batches=0, gradient_clip_val=1e-3)
    rows = read_csv(tmp_path / "csv/version_0")
    assert rows[0].keys() >= NUMBERS
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert [float(row["train/gradient_norm"]) for row in rows] == pytest.approx(
        [module.norms[1], module.norms[3]], 1e-4
    )
    assert float(rows[1]["train/ema_decay"]) == pytest.approx(5 / 14)
    assert float(rows[1]["train/learning_rate"]) == pytest.approx(2e-3)
    for row, steps in zip(rows, (module.seen[:2], module.seen[2:]), strict=True):
        t, losses = (torch.cat(each) for each in zip(*steps, strict=True))
        for quarter in range(4):
            inside = (t >= 25 * quarter) & (t < 25 * (quarter + 1))
            assert float(row[f"train/loss_t{quarter + 1}"]) == pytest.approx(losses[inside].mean().item(), 1e-4)
        assert float(row["train/pictures_per_second"]) > 0


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module = tiny_module()
    module.__class__ = Recorded
    fit(tmp_path, CSVLogger(tmp_path, "csv"), module, limit_val_batches=0, accumulate_grad_batches=2, max_steps=2)
    (row,) = read_csv(tmp_path / "csv/version_0")
    t, losses = (torch.cat(each) for each in zip(*module.seen[:4], strict=True))
    assert float(row["train/loss_t2"]) == pytest.approx(losses[(t >= 25) & (t < 50)].mean().item(), 1e-4)
    assert float(row["train/gradient_norm"]) == pytest.approx(module.norms[3], 1e-4)


def test_loggers_change_no_weight(tmp_path: Path) -> None:
    weights = []
    for logger in (CSVLogger(tmp_path), False):
        torch.manual_seed(0)
        weights.append(list(fit(tmp_path, logger).parameters()))
    assert all(torch.equal(loud, quiet) for loud, quiet in zip(*weights, strict=True))


def test_tensorboard_and_csv_get_numbers_and_samples(tmp_path: Path) -> None:
    fit(tmp_path, [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "csv")])
    events = EventAccumulator(str(tmp_path / "board/version_0")).Reload()
    assert set(events.Tags()["scalars"]) >= NUMBERS
    assert [image.step for image in events.Images("samples")] == [2, 4]
    with Image.open(tmp_path / "board/version_0/samples/00000004.png") as sheet:
        assert sheet.width > 300
    fit(tmp_path, CSVLogger(tmp_path, "alone"))
    assert {path.name for path in (tmp_path / "alone/version_0/samples").iterdir()} == {"00000002.png", "00000004.png"}


def test_mlflow_gets_numbers_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow")
    logger = MLFlowLogger("clipward", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit(tmp_path, logger)
    run = next((tmp_path / "mlruns").glob(f"*/{logger.run_id}"))
    found = {str(path.relative_to(run / "metrics")) for path in (run / "metrics").rglob("*") if path.is_file()}
    assert found >= NUMBERS
    with Image.open(run / "artifacts/samples/00000004.png") as sheet:
        assert sheet.width > 300


def test_wandb_gets_numbers_and_samples_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=str(tmp_path), project="clipward", offline=True)
    fit(tmp_path, logger)
    logger.experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert len(list((run / "files/media/images").glob("samples_*.png"))) == 2


def test_any_logger_with_log_image_gets_the_samples() -> None:
    class Fake:
        def log_image(self, key: str, images: list, step: int) -> None:
            self.got = key, [image.size for image in images], step

    logger = Fake()
    log_sheet(logger, Image.new("RGB", (8, 4)), 7)
    assert logger.got == ("samples", [(8, 4)], 7)
    assert "wandb" in sys.modules or log_sheet(object(), Image.new("RGB", (8, 4)), 7) is None
