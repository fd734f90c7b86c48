"""The solvers against diffusers' over whole walks, against an exact solution, and guided."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, metadata, randomise, tiny_module, tiny_trainer, whole_batch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

import clipward
from clipward.callbacks.progress import describe_walk
from clipward.cli import main
from clipward.datamodules.prompts import PromptDataModule
from clipward.diffusion.denoiser import NetworkDenoiser, Prediction, to_eps, to_x0
from clipward.diffusion.sampling import Noise, Update, ancestral, ddim, sample
from clipward.diffusion.schedule import Schedule, Scheduler, Step, time_travel
from clipward.diffusion.solvers import SOLVERS, DpmSolver
from clipward.editing import Edit
from clipward.errors import InputError
from clipward.guidance.core import Clamp, GuidedDenoiser, shift_eps, shift_mean, shift_x0
from clipward.networks.unet import UNet
from clipward.sampler import Sampler
from clipward.sampling_config import SamplingConfig

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def network() -> UNet:
    return randomise(UNet(TINY_UNET)).double().eval()


class Smooth(torch.nn.Module):
    """What an ideal network of Gaussian pictures would put out, and a bend, in whatever precision it is asked."""

    def __init__(self, schedule: Schedule, parametrisation: str) -> None:
        super().__init__()
        self.schedule, self.parametrisation = schedule, parametrisation

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.schedule.alpha_bar[int(t[0])].item()
        x0 = a**0.5 * 0.25 / (a * 0.25 + 1 - a) * x + 0.1 * torch.sin(3 * x)
        eps = to_eps(x0, x, a)
        return {"eps": eps, "x0": x0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x0}[self.parametrisation]


class InFloat64:
    """A network that is asked in float64, and whose answer stays so, as our denoiser makes all float32."""

    def __init__(self, network: torch.nn.Module, parametrisation: str) -> None:
        self.network, self.parametrisation = network, parametrisation

    @torch.no_grad()
    def __call__(self, x: Tensor, step: Step) -> Prediction:
        output = self.network(x.double(), torch.full((len(x),), step.t))
        x0 = to_x0(output, x, step.alpha_bar_t, self.parametrisation)
        return Prediction(x0, to_eps(x0, x, step.alpha_bar_t), x.new_tensor(step.posterior_variance))


class Noise64(Noise):
    def __call__(self, k: int | str) -> Tensor:
        return super().__call__(k).double()


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """diffusers casts to ``torch.float32`` by name."""
    single, torch.float32 = torch.float32, torch.float64
    try:
        yield
    finally:
        torch.float32 = single


def scheduler_of(solver: str, **config) -> DPMSolverMultistepScheduler | UniPCMultistepScheduler:
    if solver == "unipc":
        return UniPCMultistepScheduler(1000, solver_order=2, solver_type="bh2", final_sigmas_type="zero", **config)
    kind = {"dpmpp_2m": "dpmsolver++", "sde_dpmpp_2m": "sde-dpmsolver++"}[solver]
    return DPMSolverMultistepScheduler(
        1000,
        algorithm_type=kind,
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
        **config,
    )


def theirs_walk(scheduler, network: torch.nn.Module, noise: Noise, times: list[int], solver: str) -> Tensor:
    x, *draws = (noise(k) for k in range(len(times) + 1))
    cast = float32_is_float64 if x.dtype == torch.float64 else nullcontext
    for draw, t in zip(draws, times, strict=True):
        with torch.no_grad():
            output = network(x, torch.full((len(x),), t))
        added = {"variance_noise": draw} if solver == "sde_dpmpp_2m" else {}
        with cast():
            x = scheduler.step(output, t, x, **added).prev_sample
    return x


def set_times(scheduler, steps: list[Step]) -> None:
    """Let diffusers walk our steps: the levels of the table, in float64."""
    scheduler.set_timesteps(len(steps))
    levels = torch.tensor([step.alpha_bar_t for step in steps] + [1.0], dtype=torch.float64)
    scheduler.sigmas = ((1 - levels) / levels).sqrt()
    scheduler.timesteps = torch.tensor([step.t for step in steps])


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("skip_type", ["uniform", "trailing", "karras", "logsnr"])
@pytest.mark.parametrize("parametrisation", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_a_whole_walk_equals_diffusers(solver: str, name: str, parametrisation: str, skip_type: str, n: int) -> None:
    schedule, noise = Schedule.from_name(name), Noise64([3, 4], SHAPE)
    steps = schedule.steps(n, Scheduler(skip_type=skip_type))
    network = Smooth(schedule, parametrisation)
    *_, last = sample(InFloat64(network, parametrisation), steps, SOLVERS[solver](), noise)
    scheduler = scheduler_of(
        solver,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[name],
        prediction_type=PREDICTION_TYPES[parametrisation],
    )
    set_times(scheduler, steps)
    theirs = theirs_walk(scheduler, network, noise, [step.t for step in steps], solver)
    assert distance(last.x, theirs) < 1e-9


@pytest.mark.parametrize("spacing", ["trailing", "karras", "logsnr"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_walk_of_a_network_equals_diffusers_as_it_comes(network: UNet, solver: str, name: str, spacing: str) -> None:
    """In float32 and at diffusers' own times. Its levels are those of the times before they were rounded."""
    options = {"trailing": {}, "karras": {"use_karras_sigmas": True}, "logsnr": {"use_lu_lambdas": True}}[spacing]
    if solver == "unipc" and spacing == "logsnr":
        pytest.skip("diffusers' UniPC has none")
    schedule, noise = Schedule.from_name(name), Noise([3, 4], (3, 16, 16))
    scheduler = scheduler_of(
        solver,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[name],
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **options,
    )
    scheduler.alphas_cumprod = schedule.alpha_bar  # in float64, so that both round alike
    scheduler.set_timesteps(12)
    times = scheduler.timesteps.tolist()
    steps = schedule.steps(12, Scheduler(skip_type=spacing))
    assert [step.t for step in steps] == times
    if spacing != "trailing":
        levels = schedule.alpha_bar[times]
        scheduler.sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1)]).float()

    class InDouble(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return network(x.double(), t).float()

    *_, last = sample(
        GuidedDenoiser(NetworkDenoiser(InDouble(), "v", "fixed_small"), []), steps, SOLVERS[solver](), noise
    )
    assert distance(last.x, theirs_walk(scheduler, InDouble(), noise, times, solver)) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("share", "most"), [(0.995, 1.0), (0.7, 1.5), (0.9, 100.0)])
def test_x0_is_thresholded_as_by_diffusers(solver: str, share: float, most: float) -> None:
    """Where the threshold may not leave 1, dynamic thresholding is a clamp."""
    schedule, noise = Schedule.from_name("linear"), Noise64([3, 4], SHAPE)
    steps, network = schedule.steps(10), Smooth(schedule, "eps")
    clamp = Clamp() if most == 1 else Clamp(share=share, most=most)
    denoise = GuidedDenoiser(InFloat64(network, "eps"), [clamp])
    *_, last = sample(denoise, steps, SOLVERS[solver](), noise)
    theirs_config = {"thresholding": True, "dynamic_thresholding_ratio": share, "sample_max_value": most}
    scheduler = scheduler_of(solver, beta_start=1e-4, beta_end=0.02, prediction_type="epsilon", **theirs_config)
    set_times(scheduler, steps)
    theirs = theirs_walk(scheduler, network, noise, [step.t for step in steps], solver)
    assert last.x.abs().max() == pytest.approx(1, abs=1e-9)
    assert distance(last.x, theirs) < 1e-9


def test_thresholding_is_a_setting(tiny_weights: Path) -> None:
    config = SamplingConfig(skip_steps=5, solver="dpmpp_2m", dynamic_thresholding_ratio=0.9)
    pictures = []
    for sampling in (config, replace(config, dynamic_thresholding_ratio=None)):
        module = tiny_module(weights=str(tiny_weights), clip_denoised=False, sampling=sampling)
        module.configure_model()
        module.sampler.check()
        pictures.append(module.sampler.sample([""], [0], [0.0])[0])
        assert ("dynamic_thresholding_ratio" in module.sampler.settings()) == (sampling is config)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01
    for field, value in (("dynamic_thresholding_ratio", 0.0), ("sample_max_value", 2.0)):
        with pytest.raises(InputError, match=f"^{field}: got "):
            SamplingConfig(**{field: value})


# an exact solution


VARIANCE = 0.25


def ideal(x: Tensor, step: Step) -> Prediction:
    """E[x0 | x_t] of Gaussian pictures."""
    a = step.alpha_bar_t
    x0 = a**0.5 * VARIANCE / (a * VARIANCE + 1 - a) * x
    return Prediction(x0, to_eps(x0, x, a), x.new_tensor(step.posterior_variance))


def error(update: Update, n: int) -> float:
    """How far from the exact solution a walk of ``n`` steps, even in λ from −3 to 3, comes out."""
    levels = torch.sigmoid(2 * torch.linspace(-3, 3, n + 1, dtype=torch.float64)).tolist()
    steps = [Step(n - i, n - i - 1, a, b) for i, (a, b) in enumerate(pairwise(levels))]
    start = Noise64([0], SHAPE)(0)
    *_, last = sample(ideal, steps, update, lambda k: start)
    scale = [(a * VARIANCE + 1 - a) ** 0.5 for a in (levels[0], levels[-1])]
    return distance(last.x, start * scale[1] / scale[0])


def error_falls(update: Update | str) -> float:
    """By how much, from 20 steps to 40."""
    make = SOLVERS[update] if isinstance(update, str) else lambda: update
    return error(make(), 20) / error(make(), 40)


def test_the_error_falls_with_the_square_of_the_steps_or_faster() -> None:
    assert error_falls(ddim(0.0)) == pytest.approx(2, abs=0.2)
    assert error_falls("dpmpp_2m") == pytest.approx(4, abs=0.5)
    assert error_falls("unipc") > 5
    assert error(SOLVERS["unipc"](), 40) < 0.5 * error(SOLVERS["dpmpp_2m"](), 40)
    assert error(SOLVERS["dpmpp_2m"](), 40) < 0.1 * error(ddim(0.0), 40)


def test_the_solver_with_noise_keeps_the_variance_in_few_steps() -> None:
    steps = Schedule.from_name("linear").steps(25, Scheduler(skip_type="logsnr"))
    spread = {}
    for name, update in (("ddpm", ancestral), ("sde", DpmSolver(noisy=True))):
        *_, last = sample(ideal, steps, update, Noise(range(64), (3, 16, 16)))
        spread[name] = last.x.var().item()
    assert abs(spread["sde"] - VARIANCE) < 0.5 * abs(spread["ddpm"] - VARIANCE)


# memory


class Watched:
    """An update that keeps what each step began from and came to."""

    def __init__(self, update: Update) -> None:
        self.update = update
        self.taken: list[tuple[Tensor, Prediction, Step, Tensor]] = []

    def __call__(self, x: Tensor, pred: Prediction, step: Step, draw) -> Tensor:
        result = self.update(x, pred, step, draw)
        self.taken.append((x, pred, step, result))
        return result


FIRST_ORDER = {"dpmpp_2m": ddim(0.0), "sde_dpmpp_2m": ddim(1.0), "unipc": ddim(0.0)}


def is_first_order(solver: str, taken: tuple, draw) -> bool:
    x, pred, step, result = taken
    return torch.equal(result, FIRST_ORDER[solver](x, pred, step, draw))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_and_the_last_are_first_order_and_a_new_walk_begins_anew(solver: str) -> None:
    noise = Noise([1, 2], SHAPE)
    steps = Schedule.from_name("linear").steps(4)
    shared = SOLVERS[solver]()
    for update in (shared, shared, SOLVERS[solver]()):
        watched = Watched(update)
        list(sample(ideal, steps, watched, noise))
        order = [is_first_order(solver, one, lambda k=k: noise(k + 1)) for k, one in enumerate(watched.taken)]
        assert order == [True, False, False, True]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_walk_that_was_left_halfway_leaves_nothing_behind(solver: str) -> None:
    noise, steps = Noise([1], SHAPE), Schedule.from_name("linear").steps(6)
    used = SOLVERS[solver]()
    abandoned = sample(ideal, steps, used, Noise([8], SHAPE))
    for _ in range(3):
        next(abandoned)
    *_, again = sample(ideal, steps, used, noise)
    *_, fresh = sample(ideal, steps, SOLVERS[solver](), noise)
    assert torch.equal(again.x, fresh.x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_time_travel_clears_the_memory(solver: str) -> None:
    noise, watched = Noise([1, 2], SHAPE), Watched(SOLVERS[solver]())
    steps = time_travel(Schedule.from_name("linear").steps(3), 2)
    number = [k for k, step in enumerate(steps, start=1) if step.s < step.t]
    list(sample(ideal, steps, watched, noise))
    order = [is_first_order(solver, one, lambda k=k: noise(k)) for k, one in zip(number, watched.taken, strict=True)]
    # down, (up,) down again: first-order; down from there: not; (up,) down again: first-order; to the data: first-order
    assert order == [True, True, False, True, True]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_that_is_computed_again_in_float32_goes_on_as_if_nothing_had_been(solver: str) -> None:
    exact = False

    @contextmanager
    def in_float32() -> Iterator[None]:
        nonlocal exact
        exact = True
        yield
        exact = False

    class Fragile:
        def needs_graph(self, step: Step) -> bool:
            return False

        def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
            moved = pred._replace(x0=pred.x0 + 0.1)
            if not exact and step.number in broken:
                moved.x0[1] = torch.nan
            return moved

    steps, noise = Schedule.from_name("linear").steps(6), Noise([1, 2, 3], SHAPE)
    broken: tuple[int, ...] = ()
    *_, whole = sample(GuidedDenoiser(ideal, [Fragile()], in_float32), steps, SOLVERS[solver](), noise)
    broken = (2, 3)
    denoise = GuidedDenoiser(ideal, [Fragile()], in_float32)
    *_, mended = sample(denoise, steps, SOLVERS[solver](), noise)
    assert denoise.retries.tolist() == [0, 2, 0]
    assert torch.equal(whole.x, mended.x)


# guidance


class Push:
    """A guidance by a gradient that never changes."""

    def __init__(self, shift, weight: float, unless: tuple[int, ...] = ()) -> None:
        self.shift, self.weight, self.unless = shift, weight, unless

    def needs_graph(self, step: Step) -> bool:
        return False

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        return pred if step.number in self.unless else self.shift(pred, self.weight * torch.ones_like(x), step)


@pytest.mark.parametrize("shift", [shift_mean, shift_eps, shift_x0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_of_weight_0_is_unguided(solver: str, shift) -> None:
    steps, noise = Schedule.from_name("cosine").steps(7), Noise([1, 2], SHAPE)
    *_, guided = sample(GuidedDenoiser(ideal, [Clamp(), Push(shift, 0.0)]), steps, SOLVERS[solver](), noise)
    *_, plain = sample(GuidedDenoiser(ideal, [Clamp()]), steps, SOLVERS[solver](), noise)
    assert torch.equal(guided.x, plain.x)


@pytest.mark.parametrize("shift", [shift_mean, shift_eps, shift_x0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_moves_a_step_as_far_as_a_first_order_step(solver: str, shift) -> None:
    steps, noise = Schedule.from_name("linear").steps(6), Noise64([1, 2], SHAPE)
    watched = {}
    for weight in (0.0, 0.3):
        watched[weight] = Watched(SOLVERS[solver]())
        denoise = GuidedDenoiser(ideal, [Push(shift, weight, unless=(1, 2))])
        states = list(sample(denoise, steps, watched[weight], noise))
        assert len(states) == 6
    (x, plain, step, _), (_, moved, _, _) = watched[0.0].taken[2], watched[0.3].taken[2]
    results = [watched[weight].taken[2][3] for weight in (0.3, 0.0)]
    by_first_order = [FIRST_ORDER[solver](x, pred, step, lambda: noise(3)) for pred in (moved, plain)]
    torch.testing.assert_close(results[0] - results[1], by_first_order[0] - by_first_order[1])
    assert (results[0] - results[1]).abs().min() > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_memory_holds_what_is_not_guided(solver: str) -> None:
    """One step that is guided: the next is moved by where it begins, and by nothing that it remembers."""
    step, after = (Schedule.from_name("linear").step(t, t - 100) for t in (700, 600))
    x, draw = torch.randn(2, *SHAPE, dtype=torch.float64), lambda: torch.zeros(2, *SHAPE, dtype=torch.float64)
    results = []
    for weight in (0.0, 5.0):
        update = SOLVERS[solver]()
        update(x, GuidedDenoiser(ideal, [Push(shift_x0, weight)])(x, step), step, draw)
        results.append(update(x, ideal(x, after), after, draw))
    assert torch.equal(*results)


def test_a_clamp_is_no_guidance() -> None:
    x, step = 3 * torch.randn(2, *SHAPE), Schedule.from_name("linear").step(20, 0)
    for guidances in ([Clamp(), Push(shift_x0, 0.5)], [Push(shift_x0, 0.5), Clamp()]):
        pred = GuidedDenoiser(ideal, guidances)(x, step)
        assert torch.equal(pred.unguided_x0, ideal(x, step).x0.clamp(-1, 1))
    assert GuidedDenoiser(ideal, [Clamp()])(x, step).unguided_x0 is None


# through a model


def drawn(tmp_path: Path, weights: Path, clip: Path, solver: str | None, micro_batch: int = 16, **sampling) -> Tensor:
    config = SamplingConfig(**{"method": "clip_guidance", "skip_steps": 5, "solver": solver, **sampling})
    module = tiny_module(weights=str(weights), clip=str(clip), sampling=config)
    data = PromptDataModule(text=["a man", "a girl"], guidance_weight=[50], n_samples=3, micro_batch=micro_batch)
    batches = tiny_trainer(tmp_path).predict(module, data)
    return torch.cat([batch["image"] for batch in batches])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_picture_does_not_depend_on_its_batch(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, solver: str
) -> None:
    one, many = (drawn(tmp_path, tiny_weights, tiny_clip, solver, micro_batch) for micro_batch in (1, 7))
    torch.testing.assert_close(one, many, atol=1 / 255, rtol=0)
    assert not torch.equal(one, drawn(tmp_path, tiny_weights, tiny_clip, None))


@pytest.mark.parametrize("solver", SOLVERS)
def test_where_memory_runs_out_the_walk_begins_anew(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    module = tiny_module(weights=str(tiny_weights), sampling=SamplingConfig(skip_steps=5, solver=solver))
    module.configure_model()
    request = [""] * 8, list(range(8)), [0.0] * 8
    whole, _ = module.sampler.sample_in_chunks(*request)
    forward, passes = UNet.forward, []

    def scarce(self: UNet, x: Tensor, t: Tensor) -> Tensor:
        passes.append(len(x))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, t)

    monkeypatch.setattr(Sampler, "_split", whole_batch)
    monkeypatch.setattr(UNet, "forward", scarce)
    halves, _ = module.sampler.sample_in_chunks(*request)
    assert passes == [8] * 3 + [4] * 10
    torch.testing.assert_close(whole, halves, atol=1e-5, rtol=0)
    assert module.sampler.make_update() is not module.sampler.make_update()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_flag_reaches_the_record(config: str, tmp_path: Path, solver: str) -> None:
    flags = ["--solver", solver, "--skip_steps", "3", "--skip_type", "trailing", "--save_dir", str(tmp_path / "x")]
    main(["predict", "-c", config, "--text", "a man", "--n_samples", "1", *flags])
    row = metadata(tmp_path / "x")[1]
    assert {name: row[name] for name in ("steps", "skip_type", "sampler")} == {
        "steps": 3,
        "skip_type": "trailing",
        "sampler": solver,
    }


@pytest.mark.parametrize(
    ("settings", "edit", "expected"),
    [
        ({"method": "contrastive"}, None, ("sde_dpmpp_2m", "trailing", 20)),
        ({"method": "contrastive_denoised"}, None, ("sde_dpmpp_2m", "trailing", 40)),
        ({}, ["image_prompt"], ("sde_dpmpp_2m", "trailing", 40)),
        ({}, ["init_image"], ("ddpm", "uniform", 50)),
        ({}, ["init_image", "invert"], ("ddim(eta=0)", "uniform", 50)),
        ({"method": "glide"}, None, ("ddpm", "uniform", 50)),
        ({"skip_steps": 7, "skip_type": "logsnr"}, None, ("sde_dpmpp_2m", "logsnr", 7)),
        ({"ddim": False}, None, ("ddpm", "uniform", 50)),
        ({"ddim": True}, None, ("ddim(eta=0)", "uniform", 50)),
        ({"solver": "unipc"}, None, ("unipc", "trailing", 50)),
        ({"solver": "unipc"}, ["init_image"], ("unipc", "trailing", 50)),
    ],
)
def test_steps_are_those_of_the_method_unless_others_are_given(
    settings: dict, edit: list[str] | None, expected: tuple, tiny_weights: Path
) -> None:
    face = Image.new("RGB", (16, 16), "red")
    given = edit and Edit(**{name: True if name == "invert" else face for name in edit})
    sampler = clipward.load(tiny_weights, **settings).sampler
    record = sampler.settings() | sampler.describe(given)
    assert (record["sampler"], record["skip_type"], record["steps"]) == expected
    name, skip_type, steps = expected
    assert describe_walk(sampler, given) == f"{steps} of {name}, spaced by {skip_type}"


def test_a_solver_and_ddim_exclude_each_other() -> None:
    with pytest.raises(InputError, match="solver: got unipc and ddim, expected one of the two"):
        SamplingConfig(solver="unipc", ddim=True)
    with pytest.raises(InputError, match="solver: got 'euler', expected one of dpmpp_2m, sde_dpmpp_2m, unipc"):
        SamplingConfig(solver="euler")
