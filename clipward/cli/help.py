"""The short helps. They import nothing, so that they are there at once; ``--help.all`` has every flag."""

from dataclasses import dataclass, field
from textwrap import wrap

from clipward.cli.flags import DEFAULTS, FLAGS

WIDTH, LEFT = 80, 28  # of the page, and of its column of flags
GLUE = "\N{NO-BREAK SPACE}"  # where no line may break


@dataclass(frozen=True)
class Command:
    """What a person reads of a command.

    Args:
        does: one sentence.
        examples: three commands.
        groups: flags by what they are for; those with a text are none of our own.
    """

    does: str
    examples: tuple[str, str, str]
    groups: dict[str, dict[str, str | None]] = field(default_factory=dict)


def own(*names: str) -> dict[str, str | None]:
    """Flags of ours, which :mod:`clipward.cli.flags` describes."""
    return dict.fromkeys(names)


CONFIG, DATA = "-c, --config NAME", "--data.path PICTURES"
PICTURES = "a folder, a parquet file, or a data set on the hub"
CONTRASTS = {"--model.guidance.contrasts X": "faces, photographs, a YAML file or groups such as '[[old, young]]'"}
DEVICES: dict[str, str | None] = {
    "--trainer.devices N": "processes; add -c ddp or -c fsdp for more than one",
    **own("precision"),
}

COMMANDS = {
    "fit": Command(
        "Train or fine-tune a diffusion model, a CLIP or a classifier.",
        (
            "clipward fit -c faces",
            "clipward fit -c celebahq_finetune --data.path PICTURES",
            "clipward fit -c faces --ckpt_path last",
        ),
        {
            "What to learn": {
                CONFIG: "a YAML file, or the name of a config that ships; several are merged",
                DATA: PICTURES,
                "--data.size N": "height and width in pixels, or '[HEIGHT, WIDTH]'",
                "--data.channels N": "1 for grey, 3 for RGB, 4 for RGBA",
                "--data.classes NAME": "the attribute that unet.num_classes counts",
                "--data.batch_size N": "pictures in a batch on each device",
                "--data.num_workers N": "processes that read pictures",
            },
            "Where to begin": {
                **own("weights"),
                "--ckpt_path FILE": "go on from a checkpoint; last finds the newest",
                "--seed_everything N": "the seed of all randomness (default: 0)",
            },
            "How to learn": {
                "--model.optim.learning_rate X": "of AdamW",
                "--model.optim.warmup_steps N": "steps over which the rate rises",
                "--model.optim.cooldown_steps N": "the last steps, over which it falls",
                "--model.optim.ema_decay X": "of the averaged weights",
                "--trainer.max_steps N": "when to stop",
                "--trainer.accumulate_grad_batches N": "batches for each step of the optimiser",
                "--trainer.val_check_interval N": "steps between two validations",
                "--model.checkpoint_activations BOOL": "save memory, at a third more time",
                **DEVICES,
            },
            "Where to write": {
                "--model.save_path FILE": "safetensors to write at the end",
                "--model.save_dir DIR": "of a CLIP: the folder to write at the end",
                "--trainer.logger.save_dir DIR": "the folder of logs and checkpoints",
                "--trainer.fast_dev_run BOOL": "try one batch and write nothing",
            },
        },
    ),
    "validate": Command(
        "Compute a model's validation loss and accuracies.",
        (
            "clipward validate -c faces",
            "clipward validate -c faces --ckpt_path last",
            "clipward validate -c celebahq --data.path PICTURES",
        ),
        {
            "The data": {
                CONFIG: "a YAML file, or the name of a config that ships; several are merged",
                DATA: PICTURES,
                "--data.batch_size N": "pictures in a batch on each device",
                "--trainer.limit_val_batches N": "how many batches",
            },
            "The model": {
                **own("weights", "use_ema"),
                "--ckpt_path FILE": "a checkpoint of fit; last finds the newest",
                **DEVICES,
            },
        },
    ),
    "test": Command(
        "Draw pictures and let judges say how well they match their texts.",
        (
            'clipward test --text "an old man with a smile"',
            'clipward test --text "an old man" "a girl" --guidance_weight 0 20',
            'clipward test --text "a girl" --method glide --save_dir out/glide',
        ),
        {
            "What to draw": own("text", "prompts", "n_samples", "seed"),
            "Who judges": own("judge", "features"),
            "How to guide": {
                **own("method", "guidance_weight"),
                **CONTRASTS,
                **own("clip", "noisy_clip", "candidates"),
            },
            "The model": {
                CONFIG: "faces (the default), celebahq, or a YAML file",
                **own("weights", "skip_steps", "solver", "ddim"),
                **DEVICES,
            },
            "Where to write": own("save_dir", "overwrite", "micro_batch"),
        },
    ),
    "predict": Command(
        "Draw pictures that match a text.",
        (
            'clipward predict --text "an old man with a smile"',
            'clipward predict -c celebahq --text "a young girl" --n_samples 8',
            "clipward predict --prompts texts.txt --output parquet --save_dir out/set",
        ),
        {
            "What to draw": own("text", "negative_text", "prompts", "n_samples", "seed", "unguided"),
            "What to edit": own("init_image", "strength", "mask", "outpaint", "invert", "image_prompt"),
            "How to guide": {
                **own("method", "guidance_weight", "weight_schedule"),
                **CONTRASTS,
                **own("clip", "noisy_clip", "candidates"),
            },
            "The model": {
                CONFIG: "faces (the default), celebahq, or a YAML file",
                **own("weights", "class_label", "class_weight", "skip_steps", "solver", "ddim"),
                **DEVICES,
            },
            "One picture again": own("again", "vary"),
            "Where to write": own("save_dir", "output", "save_progress", "overwrite", "micro_batch"),
        },
    ),
    "convert": Command(
        "Write weights as safetensors or as a diffusers folder.",
        (
            "clipward convert model.pt mine.safetensors",
            "clipward convert mine.safetensors folder --to diffusers",
            "clipward convert model.pt mine.safetensors --image_size 128",
        ),
        {
            "What to read": {
                "SOURCE": "the weights: a file, a folder, or a diffusers model on the hub",
                "--use_ema BOOL": "take averaged weights where there are both (default: true)",
            },
            "Where to write": {
                "TARGET": "a new file (safetensors) or folder (diffusers)",
                "--to KIND": "safetensors (the default) or diffusers",
                "--half BOOL": "write safetensors in half precision (default: false)",
            },
            "Where to publish": {
                "--push_to_hub USER/NAME": "upload the diffusers folder to the hub, with a model card",
                "--private BOOL": "let nobody else see that repository (default: false)",
                "--dry_run BOOL": "write and show the folder, and upload nothing (default: false)",
            },
            "What the source does not say": {
                "--image_size N": "of the pictures",
                "--head_channels N": "channels of an attention head",
                "--schedule NAME": "linear, scaled_linear or cosine",
                "--parametrisation NAME": "what the network puts out: eps, x0 or v",
            },
        },
    ),
    "app": Command(
        "Open a page in the browser that draws pictures while you watch.",
        (
            "clipward app",
            "clipward app -c celebahq",
            "clipward app --weights mine.safetensors --port 8000",
        ),
        {
            "The model": {
                CONFIG: "faces (the default), celebahq, or a YAML file",
                "--weights X": "a file, a folder, or a diffusers model on the hub",
                "--device NAME": "such as cuda; by default a GPU where there is one",
            },
            "The page": {
                "--host ADDRESS": "where it listens; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
                "--port N": "of the address (default: 7860)",
                "--save_dir DIR": "the folder for pictures that you edit (default: out/app)",
            },
        },
    ),
}
EXAMPLES = (
    'clipward predict --text "an old man with a smile"',
    "clipward fit -c celebahq_finetune --data.path PICTURES",
    'clipward test --text "a young girl with brown hair" --guidance_weight 0 20',
)
MORE = "--help.all lists every flag, the trainer's, the model's and the data's too."


def overview() -> str:
    """``clipward --help``."""
    commands = [line for name, command in COMMANDS.items() for line in _row(name, command.does, 12)]
    return _page(
        "CLIP-guided diffusion, trained and sampled in one Lightning framework.",
        EXAMPLES,
        {"Commands": commands},
        "clipward COMMAND --help shows the flags of a command; clipward --version its version.",
    )


def short_help(name: str) -> str:
    """``clipward NAME --help``."""
    command = COMMANDS[name]
    groups = {
        title: [line for flag, text in flags.items() for line in _flag(name, flag, text)]
        for title, flags in command.groups.items()
    }
    return _page(command.does, command.examples, groups, "" if name in ("convert", "app") else MORE)


def _flag(command: str, flag: str, text: str | None) -> list[str]:
    if text is not None:
        return _row(flag, text)
    known = FLAGS[command][flag]
    default = DEFAULTS.get(command, {}).get(flag, known.default)
    shown = str(default).lower() if isinstance(default, bool) else default
    return _row(
        f"--{flag} {known.value}".rstrip(), known.help + ("" if default is None else f" (default:{GLUE}{shown})")
    )


def _row(left: str, right: str, column: int = LEFT) -> list[str]:
    lines = [line.replace(GLUE, " ") for line in wrap(right, WIDTH - column)]
    if len(left) + 4 > column:
        return [f"  {left}", *(" " * column + line for line in lines)]
    return [f"  {left}".ljust(column) + lines[0], *(" " * column + line for line in lines[1:])]


def _page(does: str, examples: tuple[str, ...], groups: dict[str, list[str]], more: str) -> str:
    parts = [does, "\n".join(f"  {example}" for example in examples)]
    parts += [f"{title}:\n" + "\n".join(lines) for title, lines in groups.items()]
    return "\n\n".join(filter(None, [*parts, "\n".join(wrap(more, WIDTH))]))
