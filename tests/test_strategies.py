"""Several processes, stopped and started: the same pictures and the same weights."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, metadata, write_config
from PIL import Image

from clipward.callbacks.checkpoints import last_checkpoint
from clipward.callbacks.gallery import Gallery
from clipward.cli import main

REQUESTS = ["--text", "an old man", "a girl", "--guidance_weight", "20", "--n_samples", "3", "--unguided", "false"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_NODES = ["--trainer.strategy", "ddp", "--trainer.devices", "1", "--trainer.num_nodes", "2"]


def ddp(processes: int) -> list[str]:
    return ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)] if processes > 1 else []


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(
    *command: str, launcher: list[str] | None = None, program: Path = ROOT / "cli.py", **environment: str
) -> subprocess.Popen:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST"))}
    alone |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(program), *command],
        cwd=ROOT,
        env=alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen) -> str:
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return "\n".join(said)


def until(seen: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for something that a process does."""
    while not seen():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def same_pictures(a: Path, b: Path) -> None:
    names = sorted(path.name for path in a.glob("0*.png"))
    assert names == sorted(path.name for path in b.glob("0*.png"))
    assert names
    for name in names:
        assert np.abs(pixels(a / name) - pixels(b / name)).max() <= 2, name
    rows = [metadata(folder) for folder in (a, b)]
    for row in (*rows[0], *rows[1]):
        row["clip_similarity"] = row["clip_similarity"] and round(row["clip_similarity"], 4)
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_predict_gives_the_same_pictures_however_it_is_started(config: str, tmp_path: Path) -> None:
    def predict(name: str, *more: str, **options: str) -> subprocess.Popen:
        flags = ["predict", "-c", config, *REQUESTS, "--save_dir", str(tmp_path / name)]
        return start(*flags, *more, **options)

    finish(predict("one", "--micro_batch", "7"))
    finish(predict("three", *ddp(3), "--micro_batch", "1"))
    torchrun = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", free_port()]
    finish(predict("torchrun", *ddp(2), "--micro_batch", "2", launcher=torchrun))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    finish(*(predict("by hand", *TWO_NODES, NODE_RANK=str(rank), **address) for rank in range(2)))
    for name in ("three", "torchrun", "by hand"):
        same_pictures(tmp_path / "one", tmp_path / name)
        assert not list((tmp_path / name).glob(".*")), name


@pytest.mark.slow
@pytest.mark.parametrize("output", ["files", "webdataset"])
def test_a_killed_predict_makes_what_is_missing_and_nothing_else(config: str, tmp_path: Path, output: str) -> None:
    flags = ["predict", "-c", config, "--text", "a man", "--guidance_weight", "20", "--n_samples", "12"]
    flags += ["--skip_steps", "30", "--micro_batch", "1", "--output", output, "--shard_size", "3"]
    atomic_write, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(*flags, "--save_dir", str(atomic_write)))
    for count, processes in ((3, 2), (7, 1)):  # killed on two processes, then on one, then finished on two
        process = start(*flags, *ddp(processes), "--save_dir", str(stopped))
        gallery = Gallery(stopped, output)
        until(lambda count=count, gallery=gallery: stopped.is_dir() and len(gallery.indices()) >= count, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in stopped.glob("[0-9]*.png")}
    assert len(gallery.indices()) < 24
    finish(start(*flags, *ddp(2), "--save_dir", str(stopped)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = [list(Gallery(folder, output).rows()) for folder in (atomic_write, stopped)]
    assert [row["index"] for row in rows[1]] == list(range(24))
    for one, other in zip(*rows, strict=True):
        a, b = (
            np.asarray(Gallery(f, output).open(row)).astype(int) for f, row in ((atomic_write, one), (stopped, other))
        )
        assert np.abs(a - b).max() <= 2
    assert not list(stopped.glob(".*"))


def test_fewer_requests_than_processes(config: str, tmp_path: Path) -> None:
    flags = ["predict", "-c", config, "--n_samples", "1"]
    main([*flags, "--save_dir", str(tmp_path / "one")])
    finish(start(*flags, *ddp(2), "--save_dir", str(tmp_path / "two")))
    same_pictures(tmp_path / "one", tmp_path / "two")


FIT = """
trainer:
  max_steps: 26
  val_check_interval: 4
  check_val_every_n_epoch: null
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: EVERY, save_last: true, save_on_exception: true, save_top_k: -1}
    - class_path: clipward.callbacks.guided_samples.GuidedSamples
      init_args: {text: [an old man], n_samples: 1, every_n_steps: 7}
data:
  init_args: {train_count: 80}
"""


def fit_flags(config: str, runs: Path, every: int = 3) -> list[str]:
    """Epochs of 10 batches on one process, 5 on two; every third step a checkpoint, within them and at their ends."""
    second = Path(config).with_name("fit.yaml")
    second.write_text(FIT.replace("EVERY", str(every)))
    return ["fit", "-c", config, "-c", str(second), "--trainer.logger.init_args.save_dir", str(runs)]


def fit(config: str, runs: Path, *more: str, every: int = 3, **options: str) -> subprocess.Popen:
    return start(*fit_flags(config, runs, every), *more, **options)


def fit_here(config: str, runs: Path, *more: str) -> None:
    """The same on one process, without the time that a process of its own takes to start."""
    main([*fit_flags(config, runs), *more])


def state(runs: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds that must be equal to the bit."""
    checkpoint = torch.load(last_checkpoint(runs), weights_only=True)
    state = {f"average {name}": value for name, value in checkpoint["state_dict"].items()}
    state |= {f"raw {name}": value for name, value in checkpoint["current_model_state"].items()}
    for i, slots in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"optimiser {i} {name}": value for name, value in slots.items()}
    return state | {"step": torch.tensor(checkpoint["global_step"])}


def same_state(a: Path, b: Path) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_samples_during_fit_are_drawn_by_all_and_the_same(config: str, tmp_path: Path, tiny_weights: Path) -> None:
    still = ["--weights", str(tiny_weights), "--model.optim.learning_rate", "0", "--trainer.max_steps", "7"]
    sheets = []
    fit_here(config, tmp_path / "one", *still)
    finish(fit(config, tmp_path / "three", *still, *ddp(3)))
    for name in ("one", "three"):
        (sheet,) = (tmp_path / name).rglob("samples/*.png")
        assert sheet.name == "00000007.png"
        sheets.append(pixels(sheet))
    assert np.abs(sheets[0] - sheets[1]).max() <= 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, tiny_clip: Path) -> Path:
    """The runs of a fit on one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    fit_here(write_config(folder, tiny_weights, tiny_clip), folder / "runs")
    return folder / "runs"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_fit_ends_as_one_that_was_not(
    whole: Path, config: str, tmp_path: Path, processes: int, capsys: pytest.CaptureFixture
) -> None:
    if processes > 1:
        whole = tmp_path / "whole"
        finish(fit(config, whole, *ddp(processes)))
    stopped = tmp_path / "stopped"
    for step in (3, 12):  # within the first epoch, and after the second or in the third
        process = fit(config, stopped, *ddp(processes), "--ckpt_path", "last")
        until(lambda step=step: list(stopped.rglob(f"*step={step}.ckpt")), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert state(stopped)["step"] < 26
    if processes > 1:
        said = finish(fit(config, stopped, *ddp(processes), "--ckpt_path", "last"))
    else:
        fit_here(config, stopped, "--ckpt_path", "last")
        said = capsys.readouterr().out
    assert "ckpt_path: " in said
    same_state(whole, stopped)


@pytest.mark.slow
def test_fit_ends_the_same_however_it_is_started(config: str, tmp_path: Path) -> None:
    finish(fit(config, tmp_path / "lightning", *ddp(2)))
    torchrun = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", free_port()]
    finish(fit(config, tmp_path / "torchrun", *ddp(2), launcher=torchrun))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    finish(*(fit(config, tmp_path / "by hand", *TWO_NODES, NODE_RANK=str(rank), **address) for rank in range(2)))
    nodes = [*TORCHRUN, "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    launchers = [[*nodes, "--node_rank", str(rank)] for rank in range(2)]
    finish(*(fit(config, tmp_path / "nodes", *TWO_NODES, launcher=launcher) for launcher in launchers))
    for name in ("torchrun", "by hand", "nodes"):
        same_state(tmp_path / "lightning", tmp_path / name)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_first(whole: Path, config: str, tmp_path: Path, processes: int) -> None:
    if processes > 1:
        whole = tmp_path / "whole"
        finish(fit(config, whole, *ddp(processes)))
    stopped = tmp_path / "stopped"
    process = fit(config, stopped, *ddp(processes), every=1000)
    until(lambda: list(stopped.rglob("samples/*.png")), process)  # after step 7
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert 7 <= state(stopped)["step"] < 26
    if processes > 1:
        finish(fit(config, stopped, *ddp(processes), "--ckpt_path", "last"))
    else:
        fit_here(config, stopped, "--ckpt_path", "last")
    same_state(whole, stopped)


def test_slurms_signal_saves_and_requeues(whole: Path, config: str, tmp_path: Path) -> None:
    """A job of one process, with an scontrol that writes down what it is asked."""
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tools / "scontrol").chmod(0o755)
    job = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "77", "LOCALID": "0", "NODEID": "0", "PROCID": "0"}
    job |= {"NTASKS_PER_NODE": "1", "NNODES": "1", "NODELIST": "localhost", "JOB_NODELIST": "localhost"}
    slurm = {f"SLURM_{name}": value for name, value in job.items()} | {"PATH": f"{tools}:{os.environ['PATH']}"}
    stopped, more = tmp_path / "stopped", ["-c", str(ROOT / "configs/slurm.yaml"), "--ckpt_path", "last"]
    process = fit(config, stopped, *more, every=1000, **slurm)
    until(lambda: list(stopped.rglob("samples/*.png")), process)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert asked.read_text() == "requeue 77\n", said
    assert process.returncode == 128 + signal.SIGTERM
    assert list(stopped.rglob("requeue.ckpt"))
    assert "/checkpoints/" in finish(fit(config, stopped, *more, **slurm))
    same_state(whole, stopped)


SHARDED = ["-c", str(ROOT / "configs/fsdp.yaml"), "--trainer.devices", "2"]


@pytest.mark.slow
def test_a_sharded_network_learns_and_draws_as_a_whole_one(config: str, tmp_path: Path) -> None:
    finish(fit(config, tmp_path / "ddp", *ddp(2)))
    finish(fit(config, tmp_path / "sharded", *SHARDED))
    one, other = state(tmp_path / "ddp"), state(tmp_path / "sharded")
    assert [name for name in one if "raw" in name] == [name for name in other if "raw" in name]
    for name in (name for name in one if "raw" in name or "average" in name):
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)
    samples = [next((tmp_path / name).rglob("samples/00000014.png")) for name in ("ddp", "sharded")]
    assert np.abs(pixels(samples[0]) - pixels(samples[1])).mean() < 1


@pytest.mark.slow
def test_a_sharded_fit_is_resumed_and_its_checkpoint_serves_one_device(config: str, tmp_path: Path) -> None:
    finish(fit(config, tmp_path / "sharded", *SHARDED))
    process = fit(config, tmp_path / "stopped", *SHARDED)
    until(lambda: list((tmp_path / "stopped").rglob("*step=12.ckpt")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(fit(config, tmp_path / "stopped", *SHARDED, "--ckpt_path", "last"))
    same_state(tmp_path / "sharded", tmp_path / "stopped")
    checkpoint = ["--ckpt_path", str(last_checkpoint(tmp_path / "sharded"))]
    flags = ["predict", "-c", config, *REQUESTS, *checkpoint, "--unguided", "true"]
    finish(start(*flags, "--save_dir", str(tmp_path / "whole pictures")))
    finish(start(*flags, *SHARDED, "--save_dir", str(tmp_path / "sharded pictures"), "--micro_batch", "2"))
    same_pictures(tmp_path / "whole pictures", tmp_path / "sharded pictures")


def test_a_large_clip_is_sharded_too(config: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from clipward.cli import main\nfrom clipward.guidance import models\nshard, models.LARGE = models.shard, 0\n"
        "models.shard = lambda *arguments: (print('a CLIP in parts'), shard(*arguments))\nmain()\n"
    )
    flags = ["predict", "-c", config, *REQUESTS, "--method", "mpgd", "--micro_batch", "2"]
    main([*flags, "--save_dir", str(tmp_path / "one")])
    said = finish(start(*flags, *SHARDED, "--save_dir", str(tmp_path / "sharded"), program=program))
    assert said.count("a CLIP in parts") == 2
    same_pictures(tmp_path / "one", tmp_path / "sharded")
