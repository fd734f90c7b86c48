"""``--again PICTURE`` and ``--vary PICTURE``: the command that makes a picture again, from what it says of itself."""

import json
import os
import re
from collections.abc import Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipward.cli.flags import FLAGS, MODEL_FLAGS, TRAINER_FLAGS
from clipward.editing import EDIT_FIELDS, PICTURES, find_changed
from clipward.errors import InputError, list_names, shorten
from clipward.values import MOST_SEED, describe, fits

AGAIN, VARY = "again", "vary"
MODULE = "clipward.lightning_modules.ddpm.DDPMModule"
ACCELERATORS = {"cuda": "gpu"}  # by the names that torch gives them, where Lightning has others
DDIM = re.compile(r"ddim\(eta=(.+)\)")
HASHES = {  # what a record must agree with, and the flag that names it
    "weights_hash": "weights",
    "clip_hash": "clip",
    "noisy_clip_hash": "noisy_clip",
    "classifier_hash": "model.guidance.classifier",
}
# fields of a record, and the settings that they are
SETTINGS = {
    "weights": "model.weights",
    "use_ema": "model.use_ema",
    "clip": "model.guidance.clip",
    "clip_weights": "model.guidance.clip_weights",
    "noisy_clip": "model.guidance.noisy_clip",
    "classifier": "model.guidance.classifier",
    "contrasts": "model.guidance.contrasts",
    "neutral": "model.guidance.neutral",
    "negative_text": "model.guidance.negative_text",
    "method": "model.sampling.method",
    "steps": "model.sampling.skip_steps",
    "skip_type": "model.sampling.skip_type",
    "repeats": "model.sampling.repeats",
    "candidates": "model.sampling.candidates",
    "interval": "model.sampling.interval",
    "weight_schedule": "model.sampling.weight_schedule",
    "solver": "model.sampling.solver",
    "ddim": "model.sampling.ddim",
    "ddim_eta": "model.sampling.ddim_eta",
    "var_type": "model.sampling.var_type",
    "class_label": "model.sampling.class_label",
    "class_weight": "model.sampling.class_weight",
    "clip_denoised": "model.sampling.clip_denoised",
    "dynamic_thresholding_ratio": "model.sampling.dynamic_thresholding_ratio",
    "sample_max_value": "model.sampling.sample_max_value",
    "compile": "model.compile",
    "batch_multiple": "model.sampling.batch_multiple",
    "precision": "trainer.precision",
    "accelerator": "trainer.accelerator",
    "text": "text",
    "guidance_weight": "guidance_weight",
    "seed": "seed",
}
# and their types, so that nothing in a picture becomes another flag, or a class
KINDS: dict[str, Any] = {
    **dict.fromkeys(("weights", "clip", "noisy_clip", "classifier", "neutral", "negative_text", "text"), str | None),
    **dict.fromkeys(
        ("method", "skip_type", "sampler", "weight_schedule", "var_type", "precision", "device"), str | None
    ),
    **dict.fromkeys(("use_ema", "clip_denoised", "invert"), bool | None),
    **dict.fromkeys(("steps", "repeats", "candidates", "batch_multiple"), int | None),
    **dict.fromkeys(("index", "seed"), int),
    "guidance_weight": float,
    **dict.fromkeys(("class_weight", "strength"), float | None),
    **dict.fromkeys(PICTURES, str | None),
    **dict.fromkeys(HASHES, str | None),
    "clips": tuple[str, ...],
    "clip_weights": tuple[float, ...] | None,
    "contrasts": tuple[tuple[str, ...], ...] | None,
    "interval": tuple[float, float] | None,
    "outpaint": tuple[float, float, float, float] | None,
    "class_label": str | int | None,
    "ddim_eta": float,
    "by_weights": tuple[str, ...],
}
NEEDED = (
    "index",
    "weights",
    "weights_hash",
    "method",
    "steps",
    "sampler",
    "seed",
    "guidance_weight",
    "precision",
    "device",
)


class Again:
    """The settings of a picture that is made again.

    Attributes:
        args: the command line, in which the flag is replaced by the settings of the record.
        hashes: what the weights must agree with.
        notes: lines to print.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.args, self.hashes, self.notes = list(args), dict[str, str](), list[str]()
        name, place = next(
            ((flag, i) for i, arg in enumerate(args) for flag in (AGAIN, VARY) if arg.partition("=")[0] == f"--{flag}"),
            ("", 0),
        )
        if not name:
            return
        _, equals, value = self.args.pop(place).partition("=")
        if not equals:
            value = self.args.pop(place) if place < len(self.args) and not self.args[place].startswith("-") else ""
        rest = [arg.partition("=")[0] for arg in self.args]
        if f"--{AGAIN}" in rest or f"--{VARY}" in rest:
            raise InputError(f"{name}: got --{AGAIN} or --{VARY} twice, expected one of them with one picture")
        if not value:
            raise InputError(f"{name}: got nothing, expected a picture that predict wrote, such as out/x/000003.png")
        path = Path(value)
        record = read_record(path, name)
        settings = to_settings(record, path, name)
        given = {full_name(arg[2:].partition("=")[0]) for arg in self.args if arg.startswith("--")}
        check_pictures(record, given)
        if "prompts" in given:
            for request in ("text", "guidance_weight", "seed"):
                settings.pop(request, None)
        elif name == VARY:
            settings["seed"] += 1
        else:
            settings |= {"n_samples": 1, "first_index": record["index"]}
        if "save_dir" not in given:
            settings["save_dir"] = f"out/{name}/{path.absolute().parent.name}_{path.stem}"
        flags = [flag for key, value in settings.items() for flag in to_flags(key, value)]
        self.hashes = {
            field: record[field] for field, flag in HASHES.items() if record.get(field) and full_name(flag) not in given
        }
        own = {"n_samples", "save_dir", "first_index", *(["seed"] if name == VARY else [])}
        changed = sorted(key for key in given if key in settings and key not in own)
        if "config" in given or "c" in given:
            changed.append("what the config says")
        others = f", but for {', '.join(changed)}" if changed else ""
        self.notes = [f"{name}: as {path} says{others}", *differences(record)]
        self.args = [f"--model={MODULE}", *flags, *self.args]


def to_flags(name: str, value: Any) -> list[str]:
    """A setting as it stands on the command line."""
    known = FLAGS["predict"].get(name)
    if known is not None and not known.value:
        return [f"--{name}"] if value else []
    if known is not None and known.several and isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


def check_pictures(record: dict[str, Any], given: Set[str]) -> None:
    """Check that the pictures which were edited are the ones that the record knows, but for those ``given`` again.

    Raises:
        InputError: where one has changed, or was in memory alone.
    """
    for name in PICTURES:
        if f"{name}_sha256" in record and name not in record and name not in given:
            raise InputError(f"{name}: the picture was made from one without a file; give it with --{name}")
    kept = {field: value for field, value in record.items() if field not in given}
    changed = find_changed(kept)
    if changed is not None:
        raise InputError(
            f"{changed}: {record[changed]} is not the file that the picture was made from; give --{changed}"
        )


def full_name(flag: str) -> str:
    """The name of a setting that a flag, perhaps a short one, sets."""
    known = MODEL_FLAGS.get(flag)
    if flag in TRAINER_FLAGS:
        return f"trainer.{flag}"
    return f"model.{known.sets}" if known is not None and known.sets else flag.replace(".init_args", "")


def read_record(path: Path, field: str) -> dict[str, Any]:
    """What a picture says of itself: in its PNG, or in the ``metadata.jsonl`` beside it.

    Raises:
        InputError: where there is no such picture, or nothing is known of it.
    """
    from clipward.callbacks.gallery import METADATA, read_mark

    is_file = os.path.isfile(path)  # false too where the name is too long
    record = read_mark(path) if is_file else {}
    metadata = path.parent / METADATA
    if not record and path.stem.isdecimal() and len(path.stem) < 20 and os.path.isfile(metadata):
        for line in metadata.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may have other breaks
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and row.get("index") == int(path.stem):
                record = row
    if not record:
        what = "says nothing of how it was made" if is_file else "is no file"
        raise InputError(f"{field}: {shorten(path)} {what}; expected a picture that predict wrote, or its metadata")
    missing = [name for name in NEEDED if record.get(name) is None]
    if missing:
        raise InputError(f"{field}: {shorten(path)} does not say its {missing[0]}; expected a picture of predict")
    return record


def to_settings(record: dict[str, Any], path: Path, field: str) -> dict[str, Any]:
    """The settings that made a picture, by their whole names.

    Raises:
        InputError: where the record has a value that no setting has.
    """
    for name, kind in KINDS.items():
        if name in record and not fits(kind, record[name]):
            given, expected = shorten(record[name]), describe(kind)
            raise InputError(f"{field}: {shorten(path)} has the {name} {given}, expected {expected}")
    for name in ("index", "seed"):
        if not 0 <= record[name] <= MOST_SEED:
            raise InputError(f"{field}: {shorten(path)} has the {name} {shorten(record[name])}, expected 0 or more")
    if record.get("clips") == []:
        raise InputError(f"{field}: {shorten(path)} has an empty list of clips, expected their names")
    known = dict(record)
    sampler, by_weights = record["sampler"], record.get("by_weights")
    eta = DDIM.fullmatch(str(sampler))
    if eta:
        known = {"ddim_eta": eta[1], **known, "ddim": True}
    elif sampler != "ddpm":
        known["solver"] = sampler
    else:
        known["ddim"] = False
    if isinstance(by_weights, list):
        known |= {"ddim" if name == "sampler" else "skip_type": None for name in by_weights}
    if "clips" in record:  # several
        known["clip"] = record["clips"]
    device = record["device"]
    known["accelerator"] = ACCELERATORS.get(device, device)
    settings = {key: known[name] for name, key in SETTINGS.items() if known.get(name) is not None}
    settings |= {name: known[name] for name in EDIT_FIELDS if known.get(name) is not None}
    settings |= {"trainer.devices": 1, "unguided": False}
    if not record.get("text"):
        settings.pop("text", None)
        settings["unguided"] = True
    return settings


def differences(record: dict[str, Any]) -> list[str]:
    """What is other here than where the picture was made, and may change its pixels."""
    import torch

    here = {"torch": version("torch"), "threads": torch.get_num_threads()}
    found = [
        f"{name} {list_names([record[name]])} there, {value} here"
        for name, value in here.items()
        if record.get(name, value) != value and not (name == "threads" and record["device"] != "cpu")
    ]
    return [f"the pixels may differ: {', '.join(found)}"] if found else []
