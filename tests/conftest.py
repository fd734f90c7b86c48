"""Small things that tests share: a network, a CLIP and weights that take no time."""

import json
import os
import random
from dataclasses import fields, replace
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from clipward.datamodules.faces import FacesDataModule
from clipward.evaluation.cost import Cost
from clipward.evaluation.scores import Scores
from clipward.guidance.models import GuidanceConfig
from clipward.lightning_modules.ddpm import DDPMModule, TrainingConfig
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.clip import OPENAI_PREPROCESSING, make_noise_aware, new_model, save_folder
from clipward.networks.unet import UNet, UNetConfig
from clipward.networks.vocabulary import load_vocabulary
from clipward.sampler import Sampler
from clipward.sampling_config import SamplingConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.load import save_weights

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent

TINY_UNET = UNetConfig(patch=2, channels=(8, 16), num_res_blocks=1, attention_levels=(1,), norm_groups=4)
TINY = Architecture(TINY_UNET, image_size=16, schedule="cosine", num_timesteps=100, parametrisation="v")
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a random value, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return network


def mutate(content: bytes, seed: int, count: int) -> bytes:
    """Change some bytes, mostly among the first, which say what follows; then perhaps cut the end off."""
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(count):
        changed[rng.randrange(rng.choice([16, 2000, len(changed)])) % len(changed)] = rng.randrange(256)
    return bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Safetensors of a random 16-pixel network."""
    path = tmp_path_factory.mktemp("weights") / "ddpm.safetensors"
    network = randomise(UNet(TINY_UNET))
    save_weights(path, Weights(TINY, network.state_dict()))
    return path


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with a random CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_folder(folder, new_model(TINY_CLIP), TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    return folder


@pytest.fixture(scope="session")
def noisy_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("noisy_clip")
    torch.manual_seed(0)
    model = new_model(TINY_CLIP)
    randomise(make_noise_aware(model))
    save_folder(folder, model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    return str(folder)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    torch.manual_seed(0)
    save_classifier(path, Classifier(load_vocabulary("faces")[0], 8, noise_aware=True))
    return str(path)


def tiny_module(**kwargs) -> DDPMModule:
    """A 16-pixel model that learns in seconds; settings of its network and guidance may be given by their own names."""

    def take(config: type) -> dict:
        return {field.name: kwargs.pop(field.name) for field in fields(config) if field.name in kwargs}

    network = replace(TINY, **{"var_type": None, **take(Architecture)})
    parts = {"network": network, "guidance": GuidanceConfig(**take(GuidanceConfig))}
    defaults = {"sampling": SamplingConfig(skip_steps=5), "optim": TrainingConfig(learning_rate=2e-3, ema_decay=0.9)}
    return DDPMModule(**{**parts, **defaults, **kwargs})


def tiny_faces() -> FacesDataModule:
    return FacesDataModule(size=16, train_count=32, val_count=8, batch_size=8)


def tiny_trainer(root: Path, **kwargs) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **kwargs})


@pytest.fixture
def config(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> str:
    return write_config(tmp_path, tiny_weights, tiny_clip)


def write_config(folder: Path, tiny_weights: Path, tiny_clip: Path) -> str:
    """A config for fit and predict, in the shape of configs/faces.yaml."""
    faces = yaml.safe_load((ROOT / "configs/faces.yaml").read_text())
    model = faces["model"]["init_args"]
    unet = {"patch": 2, "channels": [8, 16], "num_res_blocks": 1, "attention_levels": [1], "norm_groups": 4}
    model["network"] |= {"unet": unet, "image_size": 16, "num_timesteps": 100}
    model["guidance"]["clip"] = str(tiny_clip)
    model["default_weights"] = str(tiny_weights)
    model["sampling"] = {"skip_steps": 4, "skip_type": "uniform"}  # at T − 1, x̂0 is flat where little is learned
    faces["data"]["init_args"] |= {"size": 16, "train_count": 32, "val_count": 8, "batch_size": 8}
    trainer = faces["trainer"] | {"max_steps": 4, "val_check_interval": 4, "accelerator": "cpu"}
    trainer |= {"enable_progress_bar": False, "log_every_n_steps": 1}
    trainer["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    for callback in trainer["callbacks"]:
        arguments = callback.get("init_args", {})
        arguments |= {name: 4 for name in ("every_n_train_steps", "every_n_steps") if name in arguments}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(faces | {"trainer": trainer}))
    return str(path)


def whole_batch(sampler: Sampler, count: int) -> list[slice]:
    """In place of ``Sampler._split``: networks see a batch at once, as they do on a GPU."""
    return [slice(0, count)]


def metadata(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def to_scores(values: dict) -> Scores:
    """Scores from a report."""
    return Scores(**{**values, "cost": Cost(**values["cost"])})


def checkpoint_of(root: Path) -> str:
    return str(next(root.rglob("*.ckpt")))
