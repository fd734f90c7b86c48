"""Which numbers the settings of Lightning's Trainer may have; it checks few of them itself, and some late."""

import os
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from clipward.errors import InputError, shorten

MOST = 2**31 - 1
COUNTS = {  # the least whole number
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_nodes": 1,
    "max_epochs": 1,
    "max_steps": 1,
    "min_epochs": 0,
    "min_steps": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
BATCHES = {  # the least number of batches; a number with a point is a share of all
    "limit_train_batches": 1,
    "limit_val_batches": 0,
    "limit_test_batches": 1,
    "limit_predict_batches": 1,
    "overfit_batches": 0,
    "val_check_interval": 1,
}
ENDLESS = {"max_epochs", "max_steps", "num_sanity_val_steps"}  # where -1 is no limit


def check_trainer(settings: Any) -> None:
    """Check the numbers among a Trainer's settings.

    Raises:
        InputError: for the first one that is out of its range, by its name.
    """
    if settings is None:
        raise InputError("trainer: got null, expected settings")
    for name, least in (COUNTS | BATCHES).items():
        value = settings.get(name)
        if type(value) is int and (least <= value <= MOST or (value == -1 and name in ENDLESS)):
            continue
        if type(value) is float and name in BATCHES and (0 < value <= 1 or value == least):
            continue
        if type(value) in (int, float):
            words = f"a whole number from {least} to {MOST}"
            words += ", or -1 for no limit" if name in ENDLESS else ""
            words += ", or a share above 0 and up to 1.0" if name in BATCHES else ""
            raise InputError(f"trainer.{name}: got {shorten(value)}, expected {words}")
    _check_time(settings.get("max_time"))
    _check_processes(settings.get("devices"), settings.get("accelerator", "auto"))
    clip = settings.get("gradient_clip_val")
    if type(clip) in (int, float) and not 0 <= clip <= MOST:
        raise InputError(f"trainer.gradient_clip_val: got {shorten(clip)}, expected a number from 0 to {MOST}")


def _check_processes(devices: Any, accelerator: Any) -> None:
    """Lightning itself counts the devices of every accelerator but the CPU."""
    most = max(os.cpu_count() or 1, 8)
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and str(devices).isdecimal() and not 1 <= int(devices) <= most:
        raise InputError(f"trainer.devices: got {shorten(devices)}, expected 1 to {most} on the CPU of this machine")


def _check_time(given: Any) -> None:
    try:
        seconds = 1.0 if given is None else Timer(given).time_remaining() or 0.0
    except (MisconfigurationException, OverflowError, TypeError):
        seconds = 0.0
    if seconds <= 0:
        raise InputError(
            f"trainer.max_time: got {shorten(given)}, expected a time above 0, such as 00:12:00:00 (12 hours)"
        )
