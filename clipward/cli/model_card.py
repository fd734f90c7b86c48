"""What a folder of weights says of itself on the hub: a card made from the record of the run that trained them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from clipward.errors import InputError
from clipward.files import state_hash
from clipward.weights.architecture import Weights
from clipward.weights.pickles import unpickle
from clipward.yaml_files import read_mapping

CONFIG_FILE, SAMPLES = "config.fit.yaml", "samples.png"
SETTINGS = {  # of a config, which the card shows, by the words for them
    "data.class_path": "data module",
    "data.init_args.path": "pictures",
    "data.init_args.batch_size": "batch on each device",
    "trainer.accumulate_grad_batches": "batches for each step",
    "model.init_args.optim.learning_rate": "learning rate",
    "model.init_args.optim.ema_decay": "decay of the averaged weights",
    "trainer.precision": "precision",
    "model.init_args.weights": "fine-tuned from",
    "model.init_args.default_weights": "default weights",
}
PUTS_OUT = {"eps": "the noise ε", "x0": "the picture x0", "v": "v"}


@dataclass(frozen=True)
class Record:
    """What is known of a training run.

    Args:
        step: optimiser steps; None where the weights are no checkpoint.
        config: its ``config.fit.yaml``, in which a path of this machine is the file's name alone.
        scores: the last value of each score up to ``step``, as (name, value, step).
        samples: the last figure of samples up to ``step``.
    """

    step: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    scores: list[tuple[str, float, int]] = field(default_factory=list)
    samples: Path | None = None


def read_record(source: str) -> Record:
    """The record of a checkpoint that ``fit`` made, as far as its folder has one; an empty one for other weights.

    Raises:
        InputError: where the checkpoint or its config can't be read.
    """
    path = Path(source)
    if path.suffix != ".ckpt" or not path.is_file():
        return Record()
    content = unpickle(path)
    step = content.get("global_step") if isinstance(content, dict) else None
    run = path.absolute().parent.parent
    if not isinstance(step, int) or not (run / CONFIG_FILE).is_file():
        return Record(step if isinstance(step, int) else None)
    pictures = [each for each in run.glob("samples/[0-9]*.png") if each.stem.isdecimal() and int(each.stem) <= step]
    return Record(
        step,
        hide_places(read_mapping(run / CONFIG_FILE)),
        sorted(read_scores(run, step)),
        max(pictures, key=lambda each: int(each.stem), default=None),
    )


def read_scores(run: Path, step: int) -> Iterator[tuple[str, float, int]]:
    """The last value, up to a step, of each score of validation and of samples that TensorBoard's files have."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(run.glob("events.out.tfevents*")):
        return
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        values = [event for event in events.Scalars(name) if event.step <= step]
        if values and name.startswith(("val/", "samples/")):
            yield name, values[-1].value, values[-1].step


def hide_places(value: Any) -> Any:
    """A config in which each path from the root, or from the home folder, is its last part."""
    if isinstance(value, dict):
        return {name: hide_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [hide_places(each) for each in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return Path(value).name
    return value


def make_card(name: str, weights: Weights, source: str, record: Record) -> dict[str, bytes]:
    """The files beside the weights: ``README.md``, and the config and the samples where there are any.

    Args:
        name: of the repository on the hub, ``USER/NAME``.
        weights: which the folder has.
        source: where they came from.
        record: of their training.
    """
    files = {"README.md": _text(name, weights, source, record).encode()}
    if record.config:
        files[CONFIG_FILE] = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True).encode()
    if record.samples is not None:
        files[SAMPLES] = record.samples.read_bytes()
    return files


def _text(name: str, weights: Weights, source: str, record: Record) -> str:
    architecture = weights.architecture
    height, width = architecture.size
    channels = architecture.unet.image_channels
    count = sum(value.numel() for value in weights.state.values())
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["clipward", "diffusion", "ddpm"],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        f"A diffusion model of {width}×{height} pictures with {channels} channel{'s' * (channels > 1)}: a U-Net of "
        f"{count / 1e6:.1f} M parameters that puts out {PUTS_OUT[architecture.parametrisation]}, with the "
        f"{architecture.schedule} noise schedule and T = {architecture.num_timesteps}.",
    ]
    if record.samples is not None:
        parts.append(f"![samples of step {int(record.samples.stem)}]({SAMPLES})")
    parts += [
        "## Use",
        f'```python\nfrom diffusers import DDPMPipeline\n\nDDPMPipeline.from_pretrained("{name}")().images[0]\n```',
        "With Clipward, a CLIP guides it towards a text:",
        f'```python\nimport clipward\n\nmodel = clipward.load("{name}", clip="ViT-B-32/openai")\n'
        'model.sample("a smile", n_samples=1)[0].save("smile.png")\n```',
    ]
    parts += _training(record)
    if record.scores:
        rows = [f"| `{score}` | {value:.4g} | {step} |" for score, value, step in record.scores]
        parts += ["## Scores", "\n".join(["| score | value | step |", "|---|---|---|", *rows])]
    origin = Path(source).name if os.path.exists(source) else source
    parts += [
        "## Origin",
        f"Converted from `{origin}` by Clipward {version('clipward')}; hash {state_hash(weights.state)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(record: Record) -> list[str]:
    if record.step is None:
        return []
    trained = f"Trained for {record.step} steps"
    if not record.config:
        return ["## Training", f"{trained}."]
    rows = []
    for key, words in SETTINGS.items():
        value: Any = record.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            rows.append(f"| {words} | `{str(value).replace('|', chr(92) + '|').replace('`', '')}` |")
    return [
        "## Training",
        f"{trained}, by this command, whose config is in this repository:",
        f"    clipward fit -c {CONFIG_FILE}",
        "\n".join(["| setting | value |", "|---|---|", *rows]),
    ]


def check_login() -> None:
    """Raise :class:`InputError` where nobody is logged in to the hub."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # of the network, the hub or the token
        raise InputError("push_to_hub: the hub knows no login; use hf auth login, or --dry_run true") from error


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder to the hub, and make the repository where there is none; earlier versions stay in its history.

    Args:
        folder: what is uploaded.
        name: of the repository, ``USER/NAME``.
        private: let nobody else see it.

    Returns:
        the address of the commit.

    Raises:
        InputError: where the hub refuses, and where a private repository is wanted and everybody sees the one there.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise InputError(f"private: everybody sees {name}, which was there; {folder} is written and not uploaded")
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by clipward convert"))
    except InputError:
        raise
    except Exception as error:  # of the network or the hub
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"push_to_hub: {folder} is written, but the hub did not take it ({reason})") from error
