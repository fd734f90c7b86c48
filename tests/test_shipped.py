"""What ships works: the configs fit, and the weights draw faces that match their texts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as ImageFeature
from layouts import Pesser
from PIL import Image

import clipward
from clipward.cli import main
from clipward.datamodules.faces import ATTRIBUTES, Faces, caption
from clipward.guidance.contrasts import contrast_captions, load_contrasts
from clipward.networks.classifier import load_classifier
from clipward.networks.clip import Clip
from clipward.networks.unet import UNet, UNetConfig
from clipward.networks.vocabulary import find_attributes
from clipward.weights.architecture import Architecture
from clipward.weights.load import load_weights

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints/faces64"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


FRAGMENTS = {"figure", "ddp", "fsdp", "slurm"}  # which are added to others
FITTED = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} - FRAGMENTS)


@pytest.mark.parametrize("name", FITTED)
def test_each_config_fits_and_saves(name: str, tmp_path: Path, tiny_clip: Path) -> None:
    flags = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "1"]
    flags += ["--trainer.logger.init_args.save_dir", str(tmp_path / "runs"), "--data.batch_size", "4"]
    if name.startswith("celeba"):
        for i in range(4):
            Image.effect_noise((80, 90), 60).convert("RGB").save(tmp_path / f"{i}.png")
        has_columns = name in ("celebahq_noisy_clip", "celeba64_clip", "celeba64_judge")
        flags += ["--data.path", str(captioned(tmp_path) if has_columns else tmp_path)]
    if name in ("celeba64_clip", "celeba64_judge"):
        flags += ["--data.first", "0", "--data.count", "null", "--data.val_count", "0"]
    if name.startswith("celebahq") and not name.endswith("64"):  # the same at a size that takes no time
        flags += ["--data.size", "32", "--data.num_workers", "0", "--trainer.accumulate_grad_batches", "1"]
        flags += ["--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "1"]
    if name == "celebahq_noisy_clip":
        flags += ["--model.clip", str(tiny_clip), "--data.val_count", "0", "--trainer.precision", "32-true"]
    if name in ("celebahq", "celebahq_finetune"):  # whose samples are guided by a CLIP that is downloaded
        flags += ["--clip", str(tiny_clip)]
    if name == "celebahq":
        unet = {"channels": [32, 32, 32, 32, 32, 32], "attention_levels": [4]}
        flags += ["--model.network.image_size", "32", "--model.network.unet", json.dumps(unet)]
    if name == "noisy_clip":
        flags += ["--data.samples", "6", "--data.skip_steps", "2", "--data.samples_dir", str(tmp_path / "samples")]
    if name == "celebahq_finetune":
        torch.save(Pesser().make(), tmp_path / "theirs.ckpt")
        flags += ["--weights", str(tmp_path / "theirs.ckpt")]
    main(["fit", "-c", f"configs/{name}.yaml", *flags])
    assert list(tmp_path.rglob("last.ckpt"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def captioned(folder: Path) -> Path:
    rows = {"image": [str(folder / f"{i}.png") for i in range(4)], "caption": ["a man", "a girl", "a boy", "a woman"]}
    hair = ["black_hair", "brown_hair", "blond_hair", "gray_hair"]
    rows |= {name: [i % 2 == 0 for i in range(4)] for name in ("male", "young", "smiling", "eyeglasses", *hair)}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(folder / "pictures.parquet")
    return folder / "pictures.parquet"


def test_the_celebahq_config_is_the_published_model() -> None:
    """A file of theirs says the same of the network, the schedule and the variance as the config does."""
    given = yaml.safe_load((ROOT / "configs/celebahq.yaml").read_text())["model"]["init_args"]
    network = {name: tuple(value) if isinstance(value, list) else value for name, value in given["network"].items()}
    unet = {name: tuple(value) if isinstance(value, list) else value for name, value in network["unet"].items()}
    architecture = Architecture(**{**network, "unet": UNetConfig(**unet)})
    assert architecture == Architecture()
    assert sum(p.numel() for p in meta_unet(architecture.unet).parameters()) == 113_673_219


def meta_unet(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("name", ["faces", "celebahq"])
def test_the_configs_have_contrasts_for_all_that_a_caption_names(name: str) -> None:
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["model"]["init_args"]
    groups = load_contrasts(config["guidance"]["contrasts"])
    vocabulary = load_classifier(SHIPPED / "judge.safetensors").vocabulary
    for text in {caption(7, i) for i in range(300)}:
        text = re.sub("young (girl|boy)", r"\1", text)  # the judge reads "an old girl" as young
        wanted = find_attributes(vocabulary, text)
        others = [find_attributes(vocabulary, each) for group in groups for each in contrast_captions(text, group)]
        for attribute, value in wanted.items():
            assert any(other.get(attribute, value) != value for other in others), (text, attribute)


def test_the_files_are_small_enough_to_ship() -> None:
    assert load_weights(SHIPPED).architecture.image_size == 64
    assert (SHIPPED / "ddpm.safetensors").stat().st_size < 16 * 2**20
    assert sum(file.stat().st_size for file in (SHIPPED / "clip").iterdir()) < 16 * 2**20


def test_the_weights_for_photographs_are_guided_by_their_clip() -> None:
    folder = ROOT / "checkpoints/celeba64"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 32 * 2**20
    model = clipward.load("celeba64", clip="clipward:celeba64/clip", skip_steps=8)
    drawn = [model.sample(["a man"], guidance_weight=w, n_samples=4, return_tensors=True) for w in (0, 20)]
    with torch.no_grad():
        plain, guided = (load_classifier(folder / "judge.safetensors")(image)["gender"].argmax(1) for image in drawn)
    assert plain.sum() < guided.sum() == 4


def test_the_judge_and_the_clip_know_faces_that_they_never_saw() -> None:
    faces = [Faces(seed=999, count=200)[i] for i in range(200)]
    image = torch.stack([face["image"] for face in faces])
    labels = torch.stack([face["labels"] for face in faces])
    judge = load_classifier(SHIPPED / "judge.safetensors")
    clip = Clip.load(str(SHIPPED / "clip"))
    texts = {
        "gender": ["a woman", "a man"],
        "age": ["a young person", "an old person"],
        "hair": [f"a person with {hair} hair" for hair in ATTRIBUTES["hair"]],
        "smile": ["a person with a serious face", "a person with a smile"],
        "glasses": ["a person with no glasses", "a person with glasses"],
    }
    with torch.no_grad():
        answers, features = judge(image), clip.encode_image(image)
        for i, name in enumerate(ATTRIBUTES):
            assert (answers[name].argmax(1) == labels[:, i]).float().mean() > 0.97, name
            found = (features @ clip.encode_text(texts[name]).T).argmax(1)
            assert (found == labels[:, i]).float().mean() > 0.97, name


def test_guidance_makes_pictures_match_their_text(tmp_path: Path) -> None:
    flags = ["--judge", str(SHIPPED / "judge.safetensors"), "--save_dir", str(tmp_path), "--n_samples", "8"]
    texts = ["--text", "an old man with a smile", "--guidance_weight", "0", "100", "--skip_steps", "25"]
    main(["test", "-c", "configs/faces.yaml", *flags, *texts])
    plain, guided = json.loads((tmp_path / "report.json").read_text())["table"]
    assert guided["prompt_accuracy"] > plain["prompt_accuracy"]
    assert guided["clip_similarity"] > plain["clip_similarity"]


def test_the_micro_batch_does_not_matter_to_strongly_guided_pictures(tmp_path: Path) -> None:
    texts = ["an old man with a smile", "a girl", "a picture of a tree"]
    flags = ["--text", *texts, "--guidance_weight", "100", "--skip_steps", "20", "--n_samples", "1"]
    flags += ["--unguided", "false"]
    for size in ("1", "3"):
        main(["predict", "-c", "configs/faces.yaml", *flags, "--micro_batch", size, "--save_dir", str(tmp_path / size)])
    for i in range(3):
        pictures = [np.asarray(Image.open(tmp_path / size / f"{i:06d}.png"), dtype=int) for size in ("1", "3")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2
