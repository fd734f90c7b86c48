"""The folder that a logger makes for a run, which goes again where the run fails before it begins."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

BEGUN = "config.fit.yaml"  # is written when a training begins
WRITTEN = re.compile(r"events\.out\.tfevents\..*|hparams\.yaml|metrics\.csv")  # by a logger before that


@contextmanager
def removing_unbegun(loggers: Iterable[Logger]) -> Iterator[None]:
    """After an error, remove what loggers wrote meanwhile to folders that were not there, unless a training has begun.

    Anything else stays, and so its folder.

    Args:
        loggers: those of TensorBoard and CSV files have folders of their own.
    """
    runs = [Path(each.log_dir) for each in loggers if isinstance(each, TensorBoardLogger | CSVLogger)]
    with_parents = {folder for run in runs for folder in (run, *run.parents)}
    new = {folder for folder in with_parents if not folder.exists()}
    try:
        yield
    except Exception:
        for run in runs:
            if run in new and run.is_dir() and not (run / BEGUN).exists():
                for file in run.iterdir():
                    if WRITTEN.fullmatch(file.name):
                        file.unlink()
        for folder in sorted(new, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
        raise
