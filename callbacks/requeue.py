"""The callback of ``fit`` that answers SLURM's warning: it saves, requeues the job and stops."""

import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)


class Requeue(L.Callback):
    """At a signal, finishes the training step in all processes, saves ``requeue.ckpt`` and requeues the job.

    The job continues with ``--ckpt_path last``. Lightning's own requeueing may save in the middle of a step.

    Args:
        signal_name: the signal that ``sbatch --signal`` sends some time before the job ends.
    """

    def __init__(self, signal_name: Literal["SIGUSR1", "SIGUSR2"] = "SIGUSR1") -> None:
        self.signal_name, self.warned = signal_name, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.signal(signal.Signals[self.signal_name], self._warn)

    def _warn(self, number: int, frame: Any) -> None:
        self.warned = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The signal may reach the processes in different steps.
        if not trainer.strategy.reduce_boolean_decision(self.warned, all=False):
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints/requeue.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            job = os.environ.get("SLURM_JOB_ID")
            logger.warning(f"{self.signal_name}: saved {path}; requeueing job {job}")
            if job is not None:
                subprocess.run(["scontrol", "requeue", job], check=True)
        raise SIGTERMException
