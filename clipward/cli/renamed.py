"""Names of earlier versions, and what they are called now."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

RENAMED = {
    "argument": {  # of a DDPMModule
        "opposites": "guidance.contrasts",
        **{name: f"guidance.{name}" for name in ("neutral", "clip", "clip_weights", "noisy_clip", "classifier")},
        **{
            name: f"network.{name}"
            for name in ("unet", "image_size", "schedule", "num_timesteps", "betas", "parametrisation")
        },
        "ema_decay": "optim.ema_decay",
    },
    "method": {"evidence": "contrastive"},
    "package": {name: f"clipward.{name}" for name in ("lightning_modules", "callbacks", "datamodules")},
}
CLASS_PATH = re.compile(rf"(?<![\w.])({'|'.join(RENAMED['package'])})((?:\.\w+)+\.[A-Z]\w*)")

Setting = tuple[str, Any]  # ("model.guidance.clip", a value)


def flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[Setting]:
    """Every setting of nested ones by its whole name, in which ``init_args`` is left out."""
    for key, value in settings.items():
        name = f"{prefix}{key}".removesuffix("+").replace(".init_args", "")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield name, None
                yield from flatten(each, f"{name}.")
            else:
                yield name, each


def find_renamed(settings: Iterable[Setting], module: str = "DDPMModule") -> dict[str, str]:
    """What is called otherwise now, each with its new name: ``{"model.opposites": "model.guidance.contrasts"}``.

    Args:
        settings: by their whole names.
        module: the class of the model. Other classes than DDPMModule have kept the names of their arguments.
    """
    found: dict[str, str] = {}
    for name, value in settings:
        parts = name.split(".")
        argument = parts[1] if parts[0] == "model" and len(parts) > 1 else ""
        if parts[0] == "opposites":
            argument = "opposites"
        if module == "DDPMModule" and argument in RENAMED["argument"]:
            found[f"model.{argument}"] = f"model.{RENAMED['argument'][argument]}"
        if parts[-1] == "method" and isinstance(value, str) and value in RENAMED["method"]:
            found[f"method {value}"] = RENAMED["method"][value]
        if isinstance(value, str) and parts[0] in ("model", "data", "trainer"):
            for package, rest in CLASS_PATH.findall(value):
                found[package + rest] = RENAMED["package"][package] + rest
    return found
