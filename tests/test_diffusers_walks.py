"""A diffusers folder is walked as its own scheduler walks it, until a person says otherwise."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import randomise
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image

import clipward
from clipward.cli import main
from clipward.diffusion.sampling import Noise, State
from clipward.errors import InputError
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights

COUNT, SHAPE = 4, (3, 8, 8)


@pytest.fixture(scope="module")
def network() -> UNet2DModel:
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=None,
    )
    return randomise(network).eval()


def save(folder: Path, network: UNet2DModel, scheduler: Any) -> Path:
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def walk(folder: Path, steps: int, **sampling: Any) -> torch.Tensor:
    """(4, 3, 8, 8): the last x of seeds 0 to 3, before it is clamped."""
    states: list[State] = []
    model = clipward.load(str(folder), device="cpu")
    model.sample(n_samples=COUNT, skip_steps=steps, callback=states.append, return_tensors=True, **sampling)
    return states[-1].x


@torch.no_grad()
def walk_theirs(scheduler: Any, network: UNet2DModel, steps: int, eta: float = 0.0) -> torch.Tensor:
    noise = Noise(range(COUNT), SHAPE)
    scheduler.set_timesteps(steps)
    quiet = type(scheduler).from_config(scheduler.config)  # DDPM draws its own noise: let it draw none, and add ours
    quiet.set_timesteps(steps)
    if isinstance(scheduler, DDPMScheduler):
        quiet._get_variance = lambda t, predicted_variance=None: torch.zeros(())
    x = noise(0)
    for k, t in enumerate(scheduler.timesteps, start=1):
        output = network(x, t).sample
        if isinstance(scheduler, DDIMScheduler):
            x = scheduler.step(output, t, x, eta=eta, variance_noise=noise(k)).prev_sample
        else:
            x = quiet.step(output, t, x).prev_sample
            if k < steps:
                x = x + scheduler._get_variance(t) ** 0.5 * noise(k)
    return x


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("steps", [2, 6, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"steps_offset": 1, "clip_sample": False},
        {"timestep_spacing": "trailing", "steps_offset": 1, "beta_schedule": "scaled_linear"},
        {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=str,
)
def test_ddpm_walks_as_its_folder_says(settings: dict, steps: int, network: UNet2DModel, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, **settings)
    ours = walk(save(tmp_path, network, scheduler), steps, ddim=False)
    same(ours, walk_theirs(scheduler, network, steps))


@pytest.mark.parametrize(("steps", "eta"), [(2, 0.0), (6, 1.0), (7, 0.0)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "set_alpha_to_one": False},
        {"steps_offset": 1, "set_alpha_to_one": False},
        {"set_alpha_to_one": False, "clip_sample": False},
        {"timestep_spacing": "linspace", "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample", "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_ddim_walks_as_its_folder_says(
    settings: dict, steps: int, eta: float, network: UNet2DModel, tmp_path: Path
) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=100, **settings)
    ours = walk(save(tmp_path, network, scheduler), steps, ddim_eta=eta)
    same(ours, walk_theirs(scheduler, network, steps, eta))


def test_what_a_person_says_comes_first(network: UNet2DModel, tmp_path: Path) -> None:
    scheduler = DDIMScheduler(timestep_spacing="linspace", set_alpha_to_one=False, clip_sample=False)
    folder = save(tmp_path / "ddim", network, scheduler)
    plain = save(tmp_path / "ddpm", network, DDPMScheduler(timestep_spacing="linspace", clip_sample=False))
    torch.testing.assert_close(walk(folder, 5, ddim=False), walk(plain, 5, ddim=False))
    same(walk(folder, 5, skip_type="leading"), walk_theirs(_with(scheduler, "leading"), network, 5))
    model = clipward.load(str(folder), device="cpu", ddim=True, skip_type="trailing")
    assert [(step.t, step.s) for step in model.sampler.list_steps()][-1] == (19, -1)
    assert all(a.s == b.t for a, b in zip(model.sampler.list_steps(), model.sampler.list_steps()[1:], strict=False))
    assert model.sampler.settings()["sampler"] == "ddim(eta=0)"
    assert clipward.load(str(folder), solver="unipc").sampler.settings() | {"skip_type": ""} == {
        **clipward.load(str(plain), solver="unipc").sampler.settings(),
        "skip_type": "",
    }


def _with(scheduler: DDIMScheduler, spacing: str) -> DDIMScheduler:
    return DDIMScheduler.from_config({**scheduler.config, "timestep_spacing": spacing})


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_class_is_refused_until_other_steps_are_chosen(name: str, network: UNet2DModel, tmp_path: Path) -> None:
    folder = save(tmp_path, network, getattr(diffusers, name)())
    with pytest.raises(
        InputError, match=f"weights: got the scheduler '{name}', whose steps can't be taken here; choose"
    ):
        walk(folder, 3)
    assert walk(folder, 3, solver="dpmpp_2m").isfinite().all()
    assert walk(folder, 3, ddim=True).isfinite().all()


def test_an_offset_beyond_the_last_level_is_refused(network: UNet2DModel, tmp_path: Path) -> None:
    folder = save(tmp_path, network, DDPMScheduler(num_train_timesteps=20, steps_offset=1))
    with pytest.raises(InputError, match="skip_steps: got 20, expected fewer, since the weights add 1 to each t"):
        walk(folder, 20, ddim=False)
    assert walk(folder, 10, ddim=False).isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(timestep_spacing="trailing"),
        DDPMScheduler(steps_offset=1),
        DDIMScheduler(timestep_spacing="linspace", set_alpha_to_one=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_diffusers_wrote_can_be_written_again(scheduler: Any, network: UNet2DModel, tmp_path: Path) -> None:
    weights = load_weights(save(tmp_path / "theirs", network, scheduler))
    save_diffusers(tmp_path / "ours", weights)
    assert load_weights(tmp_path / "ours").architecture == weights.architecture
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline.scheduler) is type(scheduler)
    written = json.loads((tmp_path / "ours/scheduler/scheduler_config.json").read_text())
    spacing = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample", "num_train_timesteps")
    assert {name: written.get(name) for name in spacing} == {name: scheduler.config.get(name) for name in spacing}


def test_a_picture_is_made_again_by_the_scheduler_of_its_weights(network: UNet2DModel, tmp_path: Path) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=100, timestep_spacing="linspace", set_alpha_to_one=False)
    folder = save(tmp_path / "pipe", network, scheduler)
    flags = ["--n_samples", "2", "--skip_steps", "7", "--weights", str(folder), "--model.guidance.clip", "null"]
    for name, more in {
        "own": [],
        "ddpm": ["--model.sampling.ddim", "false"],
        "even": ["--skip_type", "trailing"],
    }.items():
        main(["predict", *flags, *more, "--save_dir", str(tmp_path / name)])
        main(["predict", "--again", str(tmp_path / name / "000001.png"), "--save_dir", str(tmp_path / f"{name} again")])
        pictures = [Image.open(tmp_path / each / "000001.png").tobytes() for each in (name, f"{name} again")]
        assert pictures[0] == pictures[1]
