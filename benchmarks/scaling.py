"""Pictures a second and memory by the number of processes, for fit and predict: one table.

    python benchmarks/scaling.py

runs the drawn faces on 1, 2 and 3 processes of one thread each, whole (DDP) and in parts (FSDP2).
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
# Ho et al.'s network, on 64 pixels
LARGE = {"patch": 1, "channels": [128, 128, 256, 256, 512, 512], "num_res_blocks": 2, "norm_groups": 32}
PREDICT = ["predict", "-c", "configs/faces.yaml", "--text", "an old man", "--unguided", "false"]
COMMANDS = {  # and the pictures of a batch
    "fit, 7.8 M parameters": (FIT, 32),
    "fit, 114 M parameters": ([*FIT, "--model.unet", json.dumps(LARGE | {"attention_levels": [4]})], 4),
    "predict, 7.8 M parameters": (PREDICT, 8),
}


class Meter(L.Callback):
    """Times all batches but the first, and writes a line to ``path`` at the end.

    Args:
        path: of the file.
        batch_size: pictures a batch on each device.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.path, self.batch_size, self.ends = Path(path), batch_size, []

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


def measured(flags: list[str], batch_size: int, batches: int, strategy: str, processes: int) -> dict[str, float]:
    """What the meter wrote of one command."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "meter.json", str(batch_size)
        meter = {"class_path": "benchmarks.scaling.Meter", "init_args": {"path": str(path), "batch_size": batch_size}}
        command = [sys.executable, "cli.py", *flags, "--trainer.default_root_dir", folder]
        if flags[0] == "fit":
            command += ["--data.batch_size", size, "--trainer.max_steps", str(batches + 1), "--trainer.logger", "false"]
        else:
            command += ["--micro_batch", size, "--n_samples", str(batch_size * processes * (batches + 1))]
            command += ["--save_dir", f"{folder}/out"]
        command += ["-c", f"configs/{strategy}.yaml"] if processes > 1 else []
        command += ["--trainer.devices", str(processes), "--trainer.callbacks", json.dumps([meter])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr)
        return json.loads(path.read_text())


def scale(processes: list[int] | None = None, batches: int = 4) -> None:
    """Print the table.

    Args:
        processes: how many; 1, 2 and 3 by default.
        batches: timed batches of each run.
    """
    print("| | strategy | processes | pictures a second | peak memory a process, GiB |\n|---|---|---|---|---|")
    for name, (command, size) in COMMANDS.items():
        for strategy, count in ((s, n) for s in ("ddp", "fsdp") for n in processes or [1, 2, 3]):
            if (strategy, count) == ("fsdp", 1):
                continue
            found = measured(command, size, batches, strategy, count)
            label = strategy if count > 1 else "one device"
            print(f"| {name} | {label} | {count} | {found['rate']:.2f} | {found['peak'] / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    auto_cli(scale)
