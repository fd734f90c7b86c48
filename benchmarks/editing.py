"""Edit drawn faces, and let the judges say what became of them: one table, one figure.

    python benchmarks/editing.py compare

takes drawn faces that no network was trained on, eight for each of three edits: red hair, glasses, a smile. Each face
lacks what its text names. The script has ``clipward predict`` edit them at several strengths and weights, by inversion
and inside a mask, and writes ``out/editing/table.md`` and ``figure.png``. A run that was stopped goes on where it was.

    python benchmarks/editing.py seams

draws a rectangle in the middle of other faces anew, without a text, by several numbers of repeats, and measures how
well it fits to what is around it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image, ImageDraw

from clipward.callbacks.figure import Cell, draw_figure
from clipward.cli import main
from clipward.datamodules.faces import attributes, draw
from clipward.evaluation.judges import Judge, check_prompt, load_judge, predict_attributes

JUDGES = ["clipward:faces64/judge.safetensors", "clipward:faces64/judge_clip"]
UNSEEN = 7000  # the seed of faces that no network has been trained on or compared with, nor a setting chosen by
EDITS = {  # text: attribute, value
    "a person with red hair": ("hair", "red"),
    "a person with glasses": ("glasses", "with"),
    "a person with a smile": ("smile", "smiling"),
}
SEAMS = 7001  # the seed of other such faces, from which the number of repeats was chosen
FACE, HEAD, EYES, MOUTH = (
    (19, 22, 45, 54),
    (4, 2, 59, 62),
    (15, 24, 49, 38),
    (20, 38, 44, 52),
)  # left, top, right, bottom


@dataclass(frozen=True)
class Setting:
    """How faces are edited: what a row of ``--prompts`` has beside text, seed and picture."""

    name: str
    strength: float
    weight: float
    invert: bool = False
    masked: bool = False


SETTINGS = [
    *(Setting("init image", strength, weight) for weight in (20, 80) for strength in (0.4, 0.6, 0.8)),
    Setting("inverted", 0.6, 20, invert=True),
    Setting("mask", 1.0, 20, masked=True),
]


def draw_mask(text: str) -> Image.Image:
    """White where the edit belongs: the hair around the face, the eyes, or the mouth."""
    mask = Image.new("L", (64, 64))
    pen = ImageDraw.Draw(mask)
    if "hair" in text:
        pen.rounded_rectangle(HEAD, radius=12, fill=255)
        pen.ellipse(FACE, fill=0)
    else:
        pen.rounded_rectangle(EYES if "glasses" in text else MOUTH, radius=4, fill=255)
    return mask


def find_faces(text: str, number: int) -> list[int]:
    """The indices of the first faces that lack what a text names."""
    attribute, value = EDITS[text]
    lacking = (i for i in count() if attributes(UNSEEN, i)[attribute] != value)
    return list(islice(lacking, number))


def list_rows(folder: Path, number: int, settings: Sequence[Setting]) -> Iterator[tuple[str, Setting, dict[str, Any]]]:
    """Each request with its text and its setting; the pictures and masks that it names are written."""
    for number_of_text, text in enumerate(EDITS):
        mask = folder / f"mask_{number_of_text}.png"
        draw_mask(text).save(mask)
        for seed, index in enumerate(find_faces(text, number)):
            face = folder / f"face_{index}.png"
            draw(UNSEEN, index).save(face)
            for setting in settings:
                row = {
                    "text": text,
                    "seed": seed,
                    "guidance_weight": setting.weight,
                    "init_image": face.name,
                    "strength": setting.strength,
                    **({"invert": True} if setting.invert else {}),
                    **({"mask": mask.name} if setting.masked else {}),
                }
                yield text, setting, row


def measure(before: Image.Image, after: Image.Image, text: str) -> tuple[float, float]:
    """The root mean square difference inside and outside of the edit's mask, in levels from 0 to 255."""
    square = (np.asarray(before, dtype=float) - np.asarray(after, dtype=float)) ** 2
    inside = np.asarray(draw_mask(text)) > 0
    return square[inside].mean() ** 0.5, square[~inside].mean() ** 0.5


def judge(judges: Sequence[Judge], picture: Image.Image, text: str) -> list[bool]:
    """Whether each judge sees what the text names."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return [all(check_prompt(each.vocabulary, predict_attributes(each, image)[0], text).values()) for each in judges]


def compare(
    save_dir: Path = Path("out/editing"),
    n_faces: int = 8,
    skip_steps: int = 50,
    micro_batch: int = 24,
) -> None:
    """Edit the faces, judge them, and make the table and the figure.

    Args:
        save_dir: the folder to write to.
        n_faces: for each edit.
        skip_steps: from noise to picture; an edit takes the share of them that its strength says.
        micro_batch: pictures sampled at once.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    asked = list(list_rows(save_dir, n_faces, SETTINGS))
    prompts, drawn = save_dir / "rows.jsonl", save_dir / "drawn"
    prompts.write_text("".join(json.dumps(row) + "\n" for _, _, row in asked))
    flags = ["--skip_steps", str(skip_steps), "--micro_batch", str(micro_batch), "--save_dir", str(drawn)]
    main(["predict", "-c", "faces", "--prompts", str(prompts), *flags])
    judges = [load_judge(name) for name in JUDGES]
    lines = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text().splitlines()]
    results: dict[Setting, list[tuple[list[bool], tuple[float, float]]]] = {setting: [] for setting in SETTINGS}
    shown: dict[Cell, Image.Image] = {}
    for (text, setting, row), line in zip(asked, lines, strict=True):
        with Image.open(drawn / line["file_name"]) as after, Image.open(save_dir / row["init_image"]) as before:
            results[setting].append((judge(judges, after, text), measure(before, after, text)))
            if row["seed"] == 0 and setting.weight == 20:
                place = list(EDITS).index(text)
                shown[Cell(place, "", None)] = before.copy()
                name = f"{setting.name}, strength {setting.strength:g}".removeprefix("init image, ")
                shown[Cell(place, name, setting.weight)] = after.copy()
    table = format_table(results)
    (save_dir / "table.md").write_text(table)
    draw_figure(shown, cell_size=128, quoted=False).quantize(256, dither=Image.Dither.NONE).save(
        save_dir / "figure.png", optimize=True
    )
    print(table)


def format_table(results: dict[Setting, list[tuple[list[bool], tuple[float, float]]]]) -> str:
    rows = ["| edit | strength | weight | prompt accuracy, two judges | distance inside | outside |", "|---" * 6 + "|"]
    for setting, found in results.items():
        shares = [100 * sum(verdicts[i] for verdicts, _ in found) / len(found) for i in range(len(JUDGES))]
        inside, outside = (sum(distance[i] for _, distance in found) / len(found) for i in (0, 1))
        accuracy = " / ".join(f"{share:.0f}" for share in shares)
        how = f"{setting.name} | {setting.strength:g} | {setting.weight:g}"
        rows.append(f"| {how} | {accuracy} % | {inside:.1f} | {outside:.1f} |")
    return "\n".join(rows) + "\n"


def seams(
    save_dir: Path = Path("out/seams"), n_faces: int = 16, repeats: tuple[int, ...] = (1, 2, 4), skip_steps: int = 50
) -> None:
    """Measure the seam around a part that is drawn anew.

    Args:
        save_dir: the folder to write to.
        n_faces: pictures for each number of repeats.
        repeats: how often each step is taken.
        skip_steps: from noise to picture.
    """
    box = (12, 12, 52, 44)
    (save_dir / "faces").mkdir(parents=True, exist_ok=True)
    faces = [draw(SEAMS, index) for index in range(n_faces)]
    for index, face in enumerate(faces):
        face.save(save_dir / f"faces/{index:03d}.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    mask.save(save_dir / "mask.png")
    print("| repeats | step across the seam, as a multiple of that beside it |\n|---|---|")
    print(f"| the faces themselves | {sum(measure_seam(face, box) for face in faces) / n_faces:.2f} |")
    for number in repeats:
        drawn = save_dir / str(number)
        flags = ["--init_image", str(save_dir / "faces"), "--mask", str(save_dir / "mask.png"), "--n_samples", "1"]
        flags += ["--model.sampling.repeats", str(number), "--skip_steps", str(skip_steps)]
        main(["predict", "-c", "faces", *flags, "--save_dir", str(drawn)])
        pictures = [Image.open(drawn / f"{index:06d}.png") for index in range(n_faces)]
        print(f"| {number} | {sum(measure_seam(picture, box) for picture in pictures) / n_faces:.2f} |")


def measure_seam(picture: Image.Image, box: tuple[int, int, int, int]) -> float:
    """How far pixels differ across the border of a box, over how far they differ one pixel inside and outside of it."""
    left, top, right, bottom = box
    levels = np.asarray(picture, dtype=float)
    across = np.abs(np.diff(levels, axis=1))[top:bottom].mean(axis=(0, 2))  # between the columns x and x + 1
    down = np.abs(np.diff(levels, axis=0))[:, left:right].mean(axis=(1, 2))
    ends = [(across, left), (across, right), (down, top), (down, bottom)]
    seam = sum(steps[end - 1] for steps, end in ends)
    beside = sum(steps[end - 2] + steps[end] for steps, end in ends) / 2
    return float(seam / beside)


if __name__ == "__main__":
    auto_cli([compare, seams])
