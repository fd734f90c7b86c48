"""Our own flags: the common ones of the model by short names, and what ``predict`` and ``test`` take beside them."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Flag:
    """A flag of the command line, which is also a key of a config.

    Args:
        help: what it does.
        value: what stands after it in the help.
        type: of its value; without one, the type of the argument that it sets.
        default: its value where it is not given.
        several: whether it takes one or more values.
        required: whether it must be given.
        sets: the argument of the model that it sets, only where it is given.
    """

    help: str
    value: str = ""
    type: Any = None
    default: Any = None
    several: bool = False
    required: bool = False
    sets: str | None = None


MODEL_FLAGS = {
    "weights": Flag("a file, a folder, or a diffusers model on the hub", "X", str, sets="weights"),
    "use_ema": Flag("take averaged weights where there are both", "BOOL", bool, sets="use_ema"),
    "clip": Flag("the CLIPs that guide, such as ViT-B-32/openai", "A B …", str, several=True, sets="guidance.clip"),
    "clip_weights": Flag("of each CLIP in their average", "W …", float, several=True, sets="guidance.clip_weights"),
    "noisy_clip": Flag(
        "a CLIP that knows noisy pictures, for contrastive and glide", "X", str, sets="guidance.noisy_clip"
    ),
    "method": Flag(
        "how a text guides: auto, contrastive, glide, mpgd, …; --help.all has all", "NAME", sets="sampling.method"
    ),
    "negative_text": Flag("what no picture should show", "X", str, sets="guidance.negative_text"),
    "weight_schedule": Flag(
        "factors of the weight from picture (0) to noise (1): '0.0:0.5 0.4:1 0.8:0'",
        "X",
        sets="sampling.weight_schedule",
    ),
    "candidates": Flag("draw so many pictures for each text, and keep the best match", "N", sets="sampling.candidates"),
    "skip_steps": Flag("steps from noise to picture", "N", sets="sampling.skip_steps"),
    "skip_type": Flag(
        "how steps are spread: uniform, uniform2, leading, trailing, quad, karras, logsnr",
        "NAME",
        sets="sampling.skip_type",
    ),
    "solver": Flag("a solver that needs fewer steps: dpmpp_2m, sde_dpmpp_2m or unipc", "NAME", sets="sampling.solver"),
    "class_label": Flag(
        "the class of the pictures, by name or number, for a model of classes", "X", str, sets="sampling.class_label"
    ),
    "class_weight": Flag(
        "w of classifier-free guidance towards that class; 0 draws it as it is",
        "W",
        float,
        sets="sampling.class_weight",
    ),
    "ddim": Flag("take DDIM's steps, not DDPM's", sets="sampling.ddim"),
    "ddim_eta": Flag("DDIM's noise, from 0 to 1", "X", sets="sampling.ddim_eta"),
    "var_type": Flag("DDPM's variance: fixed_small, fixed_large or learned_range", "NAME", sets="sampling.var_type"),
}
TRAINER_FLAGS = {
    "precision": Flag(
        "32-true, bf16-mixed, …; auto takes bf16-mixed where the processor computes in it, else 32-true", "P", str
    ),
}
REQUEST_FLAGS = {
    "text": Flag(
        "texts to draw, such as 'an old man:2 | a beard:-1'; without any, pictures are unguided",
        "A B …",
        str,
        several=True,
    ),
    "guidance_weight": Flag(
        "how strongly each text guides; by default as suits the method", "W …", float, several=True
    ),
    "n_samples": Flag("pictures for each text and weight, one for each seed", "N", int, 4),
    "seed": Flag("the first seed", "N", int, 0),
    "unguided": Flag("also draw each seed without guidance", "BOOL", bool, True),
    "prompts": Flag(
        "texts from a file (.txt, .jsonl, .parquet) or a data set on the hub, in place of --text", "FILE", str
    ),
    "micro_batch": Flag(
        "pictures drawn at once on each device; auto takes as many as fit", "N", int | Literal["auto"], 16
    ),
}
EDIT_FLAGS = {
    "init_image": Flag("a picture to edit, or a folder of them", "FILE", str),
    "strength": Flag(
        "how far it may change: from 0, not at all, to 1 (default:\N{NO-BREAK SPACE}0.6, or 1 with a mask)",
        "X",
        float,
    ),
    "mask": Flag("where to draw: white is drawn, black stays", "FILE", str),
    "outpaint": Flag("draw more on its left, top, right and bottom, in shares", "L T R B", float, several=True),
    "invert": Flag("begin at the noise that leads to it, which keeps more of it"),
    "image_prompt": Flag("a picture that guides, in place of a text or beside it", "FILE", str),
}
FOLDER_FLAGS = {
    "save_dir": Flag("the folder to write to", "DIR", str),
    "overwrite": Flag("replace what another command wrote there", "BOOL", bool, False),
}
NUMBER_FLAGS = {"first_index": Flag("the number of the first picture", "N", int, 0)}
AGAIN_FLAGS = {
    "again": Flag("draw a picture again with the settings in its file, such as out/x/000003.png", "PICTURE", str),
    "vary": Flag("draw the next --n_samples seeds with the settings in a picture's file", "PICTURE", str),
}
OUTPUT_FLAGS = {
    "output": Flag("files (a PNG for each picture), webdataset or parquet", "KIND", default="files"),
    "shard_size": Flag("pictures in each shard", "N", int, 1000),
    "save_progress": Flag("also write a filmstrip and an animation of each picture on its way"),
}
JUDGE_FLAGS = {
    "judge": Flag(
        "who judges: a classifier's safetensors, or a CLIP's folder with judge.json",
        "A B …",
        str,
        several=True,
        required=True,
    ),
    "features": Flag("whose features FID compares: judge, inception, dinov2, or a file of weights", "X", str, "judge"),
}
FLAGS = {
    "fit": MODEL_FLAGS | TRAINER_FLAGS,
    "validate": MODEL_FLAGS | TRAINER_FLAGS,
    "test": MODEL_FLAGS | TRAINER_FLAGS | REQUEST_FLAGS | FOLDER_FLAGS | JUDGE_FLAGS,
    "predict": MODEL_FLAGS
    | TRAINER_FLAGS
    | REQUEST_FLAGS
    | EDIT_FLAGS
    | NUMBER_FLAGS
    | AGAIN_FLAGS
    | FOLDER_FLAGS
    | OUTPUT_FLAGS,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # where a command has its own
    "test": {"n_samples": 16, "save_dir": "out/test"},
    "predict": {"save_dir": "out/predict"},
}
