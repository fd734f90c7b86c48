"""Particles against a Gaussian prior with a Gaussian likelihood, whose posterior is known in closed form."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_module, whole_batch
from test_ddpm import predictions
from test_guidance import RHO2, SCHEDULE, TAU2, Y, ideal, log_likelihood
from torch import Tensor

from clipward.datamodules.prompts import PromptDataModule
from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.particles import Resampling, resample, uniform
from clipward.diffusion.sampling import Noise, ancestral, sample
from clipward.diffusion.schedule import Step, time_travel
from clipward.diffusion.solvers import SOLVERS
from clipward.errors import InputError
from clipward.networks.unet import UNet
from clipward.sampler import Sampler, is_out_of_memory
from clipward.sampling_config import SamplingConfig

COUNT = 65536
WEIGHTS = [1.0, 0.0, 3.0]  # one request each
GROUPS = [slice(i * COUNT, (i + 1) * COUNT) for i in range(len(WEIGHTS))]


class Scalars(Noise):
    """Noise for many scalars at once: one generator for each request and draw."""

    def __call__(self, k: int | str) -> Tensor:
        parts = [Noise([seed], (COUNT,))(k).reshape(COUNT, 1, 1, 1) for seed in self.seeds]
        return torch.cat(parts)


def land(of_noisy: bool, make_update=lambda: ancestral, repeats: int = 1) -> Tensor:
    """(requests, COUNT) at the end of an unguided walk of which particles are resampled."""
    weight = torch.tensor(WEIGHTS).repeat_interleave(COUNT)

    def log_potential(x: Tensor, pred: Prediction, step: Step) -> Tensor:
        if of_noisy and step.s >= 0:  # log p(y | x_s), as a model that was trained on noisy pictures knows it
            at = SCHEDULE.step(step.s, -1)
            return weight * log_likelihood(ideal(x, at).x0, at)
        seen = pred.x0 if step.s >= 0 else x
        return weight * -((Y - seen) ** 2).flatten(1).sum(dim=1) / (2 * RHO2)

    steps = time_travel(SCHEDULE.steps(200), repeats)
    update = Resampling(make_update(), log_potential, GROUPS, [5, 6, 7], steps)
    *_, last = sample(ideal, steps, update, Scalars([5, 6, 7], ()))
    return last.x.reshape(len(WEIGHTS), COUNT)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_errors_of_memory_are_known(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("of_noisy", [True, False], ids=["of x_t", "of x̂0"])
def test_resampled_candidates_follow_the_posterior(of_noisy: bool) -> None:
    for weight, x in zip(WEIGHTS, land(of_noisy), strict=True):
        precision = 1 / TAU2 + weight / RHO2
        assert x.mean().item() == pytest.approx(Y * weight / RHO2 / precision, abs=0.02)
        assert x.var().item() == pytest.approx(1 / precision, rel=0.05)


def test_without_a_weight_the_walk_is_unguided_to_the_bit() -> None:
    *_, last = sample(ideal, SCHEDULE.steps(200), ancestral, Scalars([5, 6, 7], ()))
    x = land(True)
    assert torch.equal(x[1], last.x[GROUPS[1]].flatten())
    assert not torch.equal(x[0], last.x[GROUPS[0]].flatten())


def test_solvers_that_remember_and_time_travel_land_there_too() -> None:
    x = land(False, SOLVERS["sde_dpmpp_2m"], repeats=2)[0]
    precision = 1 / TAU2 + 1 / RHO2
    assert x.mean().item() == pytest.approx(Y / RHO2 / precision, abs=0.02)
    assert x.var().item() == pytest.approx(1 / precision, rel=0.05)


def test_systematic_resampling_is_unbiased_and_keeps_equal_weights() -> None:
    weights = torch.tensor([0.05, 0.5, 0.0, 0.45])
    counts = torch.stack([resample(weights, u / 1000).bincount(minlength=4) for u in range(1000)]).double()
    torch.testing.assert_close(counts.mean(dim=0), 4 * weights.double(), atol=2e-3, rtol=0)
    assert ((counts - 4 * weights).abs() < 1).all()
    for count in (1, 3, 4, 7, 100):
        equal = torch.full((count,), 1 / count)
        assert torch.equal(resample(equal, 0.5), torch.arange(count))
    assert 0 <= uniform(3, 10) < 1
    assert uniform(3, 10) != uniform(3, 20) != uniform(4, 20)


def test_what_remembers_follows_its_candidate() -> None:
    """After a resampling that moves candidate 2 to all places, a solver goes on as if it had been there always."""
    noise, steps = Noise([1, 2, 3], (1, 2, 2)), SCHEDULE.steps(10)

    def best_is_last(x: Tensor, pred: Prediction, step: Step) -> Tensor:
        return torch.tensor([0.0, 0.0, 1e4])

    solver = SOLVERS["sde_dpmpp_2m"]()
    update = Resampling(solver, best_is_last, [slice(0, 3)], [1], steps, [solver.follow])
    states = list(sample(ideal, steps, update, noise))
    alone = SOLVERS["sde_dpmpp_2m"]()
    x = states[1].x
    assert torch.equal(x, x[2:].expand(x.shape))  # the first of five resamplings comes after two of ten steps
    (one, *_), two = sample(ideal, steps, SOLVERS["sde_dpmpp_2m"](), noise), steps[2]
    alone(noise(0)[2:], ideal(noise(0)[2:], steps[0]), steps[0], lambda: noise(1)[2:])
    alone(one.x[2:], ideal(one.x[2:], steps[1]), steps[1], lambda: noise(2)[2:])
    torch.testing.assert_close(states[2].x[:1], alone(x[2:], ideal(x[2:], two), two, lambda: noise(3)[:1]))


def drawn(root: Path, weights: Path, clip: Path, text: list[str], micro_batch: int = 16, **settings) -> Tensor:
    """The pictures of the last text."""
    sampling = SamplingConfig(**{"skip_steps": 5, **settings})
    module = tiny_module(weights=str(weights), clip=str(clip), sampling=sampling, contrasts=[["man", "girl"]])
    data = PromptDataModule(text=text, guidance_weight=[0, 40], n_samples=2, micro_batch=micro_batch, unguided=False)
    images, requests = predictions(module, data, root), list(data.requests)
    return torch.stack([images[i] for i, request in enumerate(requests) if request.text == text[-1]])


def test_candidates_depend_on_no_other_request(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    settings = {"candidates": 3, "var_type": "fixed_small", "ddim": False}
    both = drawn(tmp_path, tiny_weights, tiny_clip, ["a man", "a girl"], **settings)
    one = drawn(tmp_path, tiny_weights, tiny_clip, ["a girl"], micro_batch=1, **settings)
    torch.testing.assert_close(both, one, atol=1 / 255, rtol=0)
    chosen = drawn(tmp_path, tiny_weights, tiny_clip, ["a girl"], **settings | {"ddim": True, "ddim_eta": 1.0})
    torch.testing.assert_close(chosen, one, atol=1e-4, rtol=0)  # DDIM with η = 1 is DDPM, and is resampled too


def test_a_batch_of_memory_is_shared_by_candidates(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = [], UNet.forward

    def count(self: UNet, x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", count)
    monkeypatch.setattr(Sampler, "_split", whole_batch)
    room = 100
    whole = drawn(tmp_path, tiny_weights, tiny_clip, ["a man"], candidates=4, micro_batch=8)
    assert max(sizes) == 4
    room = 4
    halves = drawn(tmp_path, tiny_weights, tiny_clip, ["a man"], candidates=2, micro_batch=16)
    assert sizes[-1] == 4
    assert len(whole) == len(halves) == 4
    with pytest.raises(InputError, match="candidates"):
        drawn(tmp_path, tiny_weights, tiny_clip, ["a man"], candidates=8)
    room, handled = 2, []  # an error that is handled holds what should be freed
    monkeypatch.setattr("clipward.sampler.free_memory", lambda: handled.append(sys.exc_info()[0]))
    drawn(tmp_path, tiny_weights, tiny_clip, ["a man"], micro_batch=16, batch_multiple=1)
    assert handled == [None]
    assert sizes[-1] == 2
