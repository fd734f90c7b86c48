"""The folder that a logger makes for a run, which goes again where the run fails before it begins."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

BEGUN = "config.fit.yaml"  # is written when a training begins
WRITTEN = re.compile(r"events\.out\.tfevents\..*|hparams\.yaml|metrics\.csv")  # by a logger before that


class RunFolder:
    """Knows which folders of loggers are not there yet.

    Args:
        loggers: those of TensorBoard and CSV files have folders of their own.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.folders = [Path(each.log_dir) for each in loggers if isinstance(each, TensorBoardLogger | CSVLogger)]
        with_parents = {folder for run in self.folders for folder in (run, *run.parents)}
        self._new = {folder for folder in with_parents if not folder.exists()}

    def remove_unbegun(self) -> None:
        """Remove what loggers wrote since then, unless a training has begun; anything else stays, and so its folder."""
        for run in self.folders:
            if run in self._new and run.is_dir() and not (run / BEGUN).exists():
                for file in run.iterdir():
                    if WRITTEN.fullmatch(file.name):
                        file.unlink()
        for folder in sorted(self._new, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
