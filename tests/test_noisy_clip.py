"""Distillation of a noise-aware CLIP."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CLIP, metadata, randomise, tiny_faces, tiny_trainer
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from clipward.cli import main
from clipward.datamodules.own_samples import OwnSamplesDataModule
from clipward.errors import InputError
from clipward.lightning_modules.noisy_clip import NoisyClipModule, alpha_bar_of, move_at_random, relational_loss
from clipward.lightning_modules.optim import OptimConfig
from clipward.networks.clip import OPENAI_PREPROCESSING, Clip, new_model, save_folder

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}


def teacher(folder: Path, tower: str) -> str:
    config = TINY_CLIP if tower == "ViT" else {**TINY_CLIP, "vision_cfg": RESNET}
    torch.manual_seed(0)
    size = config["vision_cfg"]["image_size"]
    save_folder(folder, new_model(config), config, {"size": size, **OPENAI_PREPROCESSING})
    return str(folder)


@pytest.mark.parametrize("tower", ["ViT", "ResNet"])
def test_the_student_comes_to_say_what_its_teacher_says(tmp_path: Path, tower: str) -> None:
    clip, out = teacher(tmp_path / "teacher", tower), tmp_path / "out"
    module = NoisyClipModule(
        clip, save_dir=str(out), levels=(0.3, 0.8), zero_shot="faces", optim=OptimConfig(learning_rate=3e-3)
    )
    trainer = tiny_trainer(tmp_path, max_steps=60, val_check_interval=4)
    trainer.validate(module, tiny_faces())
    before = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.fit(module, tiny_faces())
    after = trainer.callback_metrics
    assert {"val/agreement_hair/0.3", "val/right_hair/0.8", "val/agreement_hair/clean"} <= after.keys()
    assert after["val/agreement_hair/clean"] == 1
    if tower == "ViT":  # a random ResNet says the same of all pictures
        for level in ("0.3", "0.8"):
            assert after[f"val/cosine/{level}"] > before[f"val/cosine/{level}"]
    student, clean = Clip.load(str(out)), Clip.load(clip)
    assert student.noise_aware
    assert student.model.visual.conv1.film.weight.abs().max() > 0
    texts = ["a man", "a girl with red hair"]
    torch.testing.assert_close(student.encode_text(texts), clean.encode_text(texts), atol=2e-3, rtol=0)
    assert not any(name.startswith("_teacher") for name in module.state_dict())


def test_the_relational_term_is_zero_where_all_neighbours_agree() -> None:
    torch.manual_seed(0)
    target = F.normalize(torch.randn(6, 8), dim=1)
    assert relational_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    other = F.normalize(torch.randn(6, 8), dim=1)
    by_hand = []
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        p = (target[i] @ target[rest].T / 0.05).softmax(0)
        q = (other[i] @ target[rest].T / 0.05).softmax(0)
        by_hand.append((p * (p.log() - q.log())).sum())
    torch.testing.assert_close(relational_loss(other, target), torch.stack(by_hand).mean(), atol=1e-4, rtol=1e-4)
    assert relational_loss(other[:1], target[:1]).item() == 0


def test_levels_span_clean_to_noise() -> None:
    assert alpha_bar_of(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_pictures_are_moved_each_on_its_own() -> None:
    torch.manual_seed(0)
    image = torch.arange(16.0).expand(1, 16, 16).expand(8, 3, 16, 16)
    moved = move_at_random(image, 0.125)
    assert moved.shape == image.shape
    by = {int(each[0, 8, 8] - 8) for each in moved}
    assert by <= {-2, -1, 0, 1, 2}
    assert len(by) > 1
    assert torch.equal(move_at_random(image, 0.0), image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relational": -1.0}, "model.relational: got -1.0, expected a finite number from 0 on"),
        ({"shift": 0.5}, "model.shift: got 0.5, expected 0 to below 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NoisyClipModule("nothing", **arguments)


def test_a_noise_aware_teacher_is_refused(tmp_path: Path) -> None:
    module = NoisyClipModule("clipward:faces64/noisy_clip")
    with pytest.raises(InputError, match="is noise-aware already"):
        module.configure_model()


def test_fit_draws_the_samples_once_and_learns_from_them(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples, weights = tmp_path / "samples", tmp_path / "ddpm.safetensors"
    shutil.copy(tiny_weights, weights)

    def fit(name: str, *more: str) -> None:
        models = ["--weights", str(weights), "--clip", str(tiny_clip), "--model.save_dir", str(tmp_path / name)]
        data = ["--data.samples", "8", "--data.batch_size", "2", "--data.skip_steps", "2"]
        trainer = ["max_steps=2", "logger=false", "callbacks=[]", "enable_progress_bar=false", "val_check_interval=2"]
        flags = [f"--trainer.{setting}" for setting in (*trainer, "accelerator=cpu")]
        main(["fit", "-c", "noisy_clip", *models, *data, "--data.samples_dir", str(samples), *flags, *more])

    fit("one")
    drawn = {file: file.stat().st_mtime_ns for file in samples.glob("0*.png")}
    assert len(drawn) == 8
    (samples / "000003.png").unlink()
    fit("two")
    after = {file: file.stat().st_mtime_ns for file in samples.glob("0*.png")}
    assert [file.name for file in drawn if after[file] != drawn[file]] == ["000003.png"]
    assert Clip.load(str(tmp_path / "two")).noise_aware
    fit("three", "--data.path", str(samples), "--data.size", "16", "--data.samples_dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    lines = (samples / "metadata.jsonl").read_text()
    (samples / "metadata.jsonl").write_text(lines.replace('"device": "cpu"', '"device": "cuda"'))
    fit("fewer", "--data.samples", "6")  # all that are there serve
    with pytest.raises(SystemExit, match=r"data.samples_dir: .*skip_steps.*; use another folder$"):
        fit("four", "--data.skip_steps", "3")
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("<f", 0.5))
    with pytest.raises(SystemExit, match=r"error: data.samples_dir: .* of other weights .*; use another folder$"):
        fit("four")
    assert {file: file.stat().st_mtime_ns for file in samples.glob("0*.png")} == after
    assert not (tmp_path / "four").exists()


@pytest.mark.slow
def test_the_celebahq_config_draws_with_a_clip_distilled_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published model but for its width, in diffusers' format: distil from its own samples, and draw."""
    monkeypatch.chdir(tmp_path)  # where the Trainer keeps its checkpoint
    network = UNet2DModel(
        sample_size=256,
        block_out_channels=(32, 32, 64, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    weights, out = tmp_path / "ddpm", tmp_path / "noisy_clip"
    DDPMPipeline(randomise(network).eval(), DDPMScheduler(beta_end=0.02)).save_pretrained(weights)
    config = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "image_size": 224, "patch_size": 32}}
    save_folder(tmp_path / "clip", new_model(config), config, {"size": 224, **OPENAI_PREPROCESSING})
    models = ["--weights", str(weights), "--clip", str(tmp_path / "clip")]
    data = ["--data.samples", "4", "--data.skip_steps", "2", "--data.batch_size", "2", "--data.val_count", "2"]
    data += ["--data.samples_dir", str(tmp_path / "samples")]
    trainer = ["max_steps=2", "logger=false", "callbacks=[]", "enable_progress_bar=false", "val_check_interval=1"]
    flags = [f"--trainer.{setting}" for setting in (*trainer, "accelerator=cpu")]
    main(["fit", "-c", "noisy_clip", *models, *data, "--model.save_dir", str(out), *flags])
    request = ["--text", "an old man", "--n_samples", "1", "--unguided", "false", "--skip_steps", "2"]
    request += ["--trainer.accelerator", "cpu"]
    main(["predict", "-c", "celebahq", *models, "--noisy_clip", str(out), *request, "--save_dir", str(tmp_path / "a")])
    main(["predict", "-c", "celebahq", *models, *request, "--save_dir", str(tmp_path / "b")])
    (noisy,), (bare,) = metadata(tmp_path / "a"), metadata(tmp_path / "b")
    assert (noisy["method"], bare["method"]) == ("contrastive", "contrastive_denoised")
    assert ["old", "young"] in [sorted(group) for group in noisy["contrasts"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 10**30}, "data.samples: got 1000000000000000000000000000000, expected a whole number from 1 to"),
        ({"seed": -1}, "data.seed: got -1, expected a whole number from 0 to"),
        ({"skip_steps": 0}, "data.skip_steps: got 0, expected a whole number from 1 to"),
        ({"caption_column": "x"}, "data.caption_column: got 'x' for own samples, expected --data.path beside it"),
        ({"first": 4}, "data.first: got 4 for own samples, expected --data.path beside it"),
    ],
)
def test_settings_that_own_samples_have_not_are_refused_before_they_are_drawn(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        OwnSamplesDataModule(**settings)
    OwnSamplesDataModule(path="x", caption_column="y", first=4)
