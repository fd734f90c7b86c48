"""Random schedules, records and files of weights: each is what it says, or refused in one line."""

import json
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import TINY, mutate, tiny_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipward.cli.again import KINDS, NEEDED, read_record, to_settings
from clipward.diffusion.schedule import Schedule, ScheduleName, Scheduler, SkipType
from clipward.errors import InputError
from clipward.networks.classifier import load_classifier
from clipward.networks.clip import Clip
from clipward.networks.unet import UNet
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.load import load_weights, save_weights

MOST_MEMORY = 512 * 2**20  # bytes above what a process takes, for files of some kilobytes
SHARED = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(st.integers(), st.floats(), st.integers(10**300, 10**400))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def one_line(error: InputError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 500


@SHARED
@given(
    name=st.sampled_from(get_args(ScheduleName)),
    count=st.integers(2, 1500),
    betas=st.tuples(st.floats(1e-6, 0.05), st.floats(1e-6, 0.99)),
    n=st.integers(-1, 1600),
    skip_type=st.sampled_from(get_args(SkipType)),
)
def test_any_schedule_falls_to_data_in_the_steps_asked_for(
    name: Any, count: int, betas: tuple[float, float], n: int, skip_type: Any
) -> None:
    try:
        schedule = Schedule.from_name(name, count, betas)
        steps = schedule.steps(n, Scheduler(skip_type=skip_type))
    except InputError as error:
        one_line(error)
        return
    assert len(steps) == n
    assert steps[-1].s == -1
    assert all(step.alpha_bar_t < step.alpha_bar_s <= 1 for step in steps)
    assert all(0 <= after.t < before.t < count for before, after in pairwise(steps))
    assert all(step.posterior_variance >= 0 for step in steps)


@SHARED
@given(change=st.dictionaries(st.sampled_from([*KINDS, *NEEDED, "other"]), values, max_size=4))
def test_any_record_is_settings_or_a_line(change: dict[str, Any]) -> None:
    record = {"index": 0, "seed": 1, "guidance_weight": 2.0, "sampler": "ddpm", "device": "cpu", "steps": 5}
    try:
        found = to_settings(record | {"weights": "w", "weights_hash": "h"} | change, Path("x.png"), "again")
    except InputError as error:
        one_line(error)
        return
    json.dumps(found)


@SHARED
@given(content=st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode())))
def test_any_metadata_is_a_record_or_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(content)
    try:
        assert isinstance(read_record(tmp_path / "000000.png", "again"), dict)
    except InputError as error:
        one_line(error)


@SHARED
@given(
    change=st.dictionaries(st.sampled_from(sorted(TINY.to_dict())), values, max_size=3),
    unet=st.dictionaries(st.sampled_from(sorted(TINY.to_dict()["unet"])), values, max_size=3),
)
def test_any_header_is_an_architecture_or_a_line(change: dict[str, Any], unet: dict[str, Any]) -> None:
    given_values = TINY.to_dict()
    given_values["unet"] |= unet
    try:
        found = Architecture.from_dict(given_values | change)
    except InputError as error:
        one_line(error)
        return
    assert Architecture.from_dict(found.to_dict()) == found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """What each kind of file holds, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    save_weights(folder / "own.safetensors", Weights(TINY, UNet(TINY.unet).state_dict()))
    module = tiny_module()
    module.configure_model()
    torch.save({"architecture": TINY.to_dict(), "state_dict": module.state_dict()}, folder / "fit.ckpt")
    torch.save({"betas": torch.zeros(3)}, folder / "state.pt")
    return {
        "own.safetensors": ((folder / "own.safetensors").read_bytes(), load_weights),
        "fit.ckpt": ((folder / "fit.ckpt").read_bytes(), load_weights),
        "state.pt": ((folder / "state.pt").read_bytes(), load_weights),
        "judge.safetensors": ((folder / "own.safetensors").read_bytes(), load_classifier),
        "clip.pt": ((folder / "state.pt").read_bytes(), lambda path: Clip.load(str(path))),
    }


@pytest.mark.parametrize("name", ["own.safetensors", "fit.ckpt", "state.pt", "judge.safetensors", "clip.pt"])
@settings(SHARED, max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 8))
def test_mutated_files_of_weights_are_read_or_a_line(
    name: str, seed: int, count: int, files: dict[str, tuple[bytes, Callable[[Path], Any]]], tmp_path: Path
) -> None:
    content, read = files[name]
    (tmp_path / name).write_bytes(mutate(content, seed, count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        read(tmp_path / name)
    except InputError as error:
        one_line(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_MEMORY
    assert [path.name for path in tmp_path.iterdir()] == [name]
