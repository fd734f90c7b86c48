"""Measure pictures a second and memory by the number of processes, for fit and predict: one table.

    python benchmarks/scaling.py

runs the drawn faces on 1, 2 and 3 processes of one thread each, with the network replicated (DDP) and sharded (FSDP2).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli

from clipward.evaluation.cost import peak_bytes

ROOT = Path(__file__).parent.parent

FIT = ["fit", "-c", "configs/faces.yaml", "--data.train_count", "2000", "--trainer.limit_val_batches", "0"]
# the network of Ho et al. (2020), at 64×64
LARGE = {"patch": 1, "channels": [128, 128, 256, 256, 512, 512], "num_res_blocks": 2, "norm_groups": 32}
PREDICT = ["predict", "-c", "configs/faces.yaml", "--text", "an old man", "--unguided", "false"]
COMMANDS = {  # name: (command, batch size)
    "fit, 7.8 M parameters": (FIT, 32),
    "fit, 114 M parameters": ([*FIT, "--model.network.unet", json.dumps(LARGE | {"attention_levels": [4]})], 4),
    "predict, 7.8 M parameters": (PREDICT, 8),
}


class Meter(L.Callback):
    """Times all batches but the first, and writes pictures a second and the peak of memory as JSON at the end.

    Args:
        path: the file to write.
        batch_size: pictures a batch on each device.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.path, self.batch_size = Path(path), batch_size
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    on_predict_batch_end = on_train_batch_end

    def _write(self, trainer: L.Trainer) -> None:
        device = trainer.strategy.root_device
        peaks = trainer.strategy.all_gather(torch.tensor(float(peak_bytes(device)), device=device))
        if trainer.is_global_zero:
            rate = self.batch_size * trainer.world_size * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])
            self.path.write_text(json.dumps({"rate": rate, "peak": peaks.max().item()}))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)


def measure(command: list[str], batch_size: int, batches: int, strategy: str, processes: int) -> dict[str, float]:
    """Run a command on some processes, and return its ``rate`` in pictures a second and its ``peak`` in bytes.

    Args:
        command: the arguments of ``cli.py``.
        batch_size: pictures a batch on each device.
        batches: how many to time, after the first.
        strategy: ``ddp`` or ``fsdp``.
        processes: how many.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "meter.json", str(batch_size)
        meter = {"class_path": "benchmarks.scaling.Meter", "init_args": {"path": str(path), "batch_size": batch_size}}
        flags = ["--trainer.default_root_dir", folder]
        if command[0] == "fit":
            flags += ["--data.batch_size", size, "--trainer.max_steps", str(batches + 1), "--trainer.logger", "false"]
        else:
            flags += ["--micro_batch", size, "--n_samples", str(batch_size * processes * (batches + 1))]
            flags += ["--save_dir", f"{folder}/out"]
        flags += ["-c", f"configs/{strategy}.yaml"] if processes > 1 else []
        flags += ["--trainer.devices", str(processes), "--trainer.callbacks", json.dumps([meter])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "cli.py", *command, *flags]
        ran = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr)
        return json.loads(path.read_text())


def scale(processes: list[int] | None = None, batches: int = 4) -> None:
    """Print a table of what :func:`measure` finds for each command, strategy and number of processes.

    Args:
        processes: how many; 1, 2 and 3 by default.
        batches: how many to time in each run.
    """
    print("| | strategy | processes | pictures a second | peak memory a process, GiB |\n|---|---|---|---|---|")
    for name, (command, size) in COMMANDS.items():
        for strategy, count in ((s, n) for s in ("ddp", "fsdp") for n in processes or [1, 2, 3]):
            if (strategy, count) == ("fsdp", 1):
                continue
            found = measure(command, size, batches, strategy, count)
            label = strategy if count > 1 else "one device"
            print(f"| {name} | {label} | {count} | {found['rate']:.2f} | {found['peak'] / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    auto_cli(scale)
