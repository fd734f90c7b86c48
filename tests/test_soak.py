"""A long run of ``predict`` takes no more memory and no more open files at its end than after its first pictures."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TINY, TINY_UNET, metadata, randomise

from clipward.networks.unet import UNet
from clipward.weights.architecture import Weights
from clipward.weights.load import save_weights

REQUESTS, STEPS = 400, 300


def memory(process: int) -> float:
    """The resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are(config: str, tmp_path: Path, tiny_clip: Path) -> None:
    weights = tmp_path / "ddpm.safetensors"
    save_weights(weights, Weights(replace(TINY, num_timesteps=STEPS), randomise(UNet(TINY_UNET)).state_dict()))
    flags = ["-c", config, "--weights", str(weights), "--text", "a man", "--n_samples", str(REQUESTS // 2)]
    flags += ["--skip_steps", str(STEPS), "--method", "clip_guidance_pixel", "--clip", str(tiny_clip)]
    flags += ["--model.sampling.batch_multiple", "16"]  # one pass of the network for each batch
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "predict", *flags, "--save_dir", str(tmp_path / "x")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    found: list[tuple[int, float, int]] = []  # pictures, MiB and open files
    while process.poll() is None:
        try:
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            found.append((len(list((tmp_path / "x").glob("0*.png"))), memory(process.pid), handles))
        except (OSError, IndexError):  # it ends at this moment
            break
        time.sleep(0.5)
    assert process.wait() == 0
    assert len(metadata(tmp_path / "x")) == REQUESTS
    early = [each for each in found if REQUESTS / 8 < each[0] <= REQUESTS / 4]
    late = [each for each in found if REQUESTS * 3 / 4 <= each[0] < REQUESTS]
    most = [max(each[place] for each in found) for place in (1, 2)]
    print(f"{REQUESTS} requests, {STEPS} steps: at most {most[0]:.0f} MiB and {most[1]} open files")
    for place, slack in ((1, 16), (2, 2)):  # a picture and its metadata may be open at that moment
        assert max(each[place] for each in late) <= max(each[place] for each in early) + slack
