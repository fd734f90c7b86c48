"""Several processes, stopped and started: the same pictures and the same weights."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import ROOT, metadata
from PIL import Image

REQUESTS = ["--text", "an old man", "a girl", "--guidance_weight", "20", "--n_samples", "3", "--unguided", "false"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def ddp(processes: int) -> list[str]:
    return ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)] if processes > 1 else []


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*command: str, launcher: list[str] | None = None, **environment: str) -> subprocess.Popen:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST"))}
    alone |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(ROOT / "cli.py"), *command],
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


def test_predict_gives_the_same_pictures_however_it_is_started(config: str, tmp_path: Path) -> None:
    def predict(name: str, *more: str, **options: str) -> subprocess.Popen:
        flags = ["predict", "-c", config, *REQUESTS, "--save_dir", str(tmp_path / name)]
        return start(*flags, *more, **options)

    two_nodes = ["--trainer.strategy", "ddp", "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    finish(predict("one", "--micro_batch", "7"))
    finish(predict("three", *ddp(3), "--micro_batch", "1"))
    torchrun = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", free_port()]
    finish(predict("torchrun", *ddp(2), "--micro_batch", "2", launcher=torchrun))
    port = free_port()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    finish(*(predict("by hand", *two_nodes, NODE_RANK=str(rank), **address) for rank in range(2)))
    for name in ("three", "torchrun", "by hand"):
        same_pictures(tmp_path / "one", tmp_path / name)
        assert not list((tmp_path / name).glob(".*")), name
