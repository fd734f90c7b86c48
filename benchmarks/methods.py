"""Every method on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 seeds, 50 steps), as many unguided
pictures, as many unseen faces that the texts are true of, which no method can be told from, and what waiting gives: the
unguided pictures that happen to obey among four times their number. It writes
``out/methods/table.md``, ``out/methods/figure.png`` and a report for each, and goes on where it was stopped.
"""

import json
import sys
from collections import defaultdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from callbacks.evaluation import curve, markdown  # noqa: E402
from callbacks.judging import Judges, Reference, Row, load_rows, summarise  # noqa: E402
from cli import main  # noqa: E402
from datamodules.faces import Faces, FacesDataModule, attributes  # noqa: E402
from diffusion.classifier import named  # noqa: E402
from diffusion.methods import METHODS as PACKAGE  # noqa: E402
from diffusion.weights import whole  # noqa: E402
from lightning_modules.critics import Critics  # noqa: E402

SHIPPED = ROOT / "checkpoints/faces64"
JUDGES = [str(SHIPPED / "judge.safetensors"), str(SHIPPED / "judge_clip")]
POOL = 4  # unguided pictures that are drawn for each that the table has, to find some that obey
UNSEEN = 5000  # the seed of faces that no network has been trained on or compared with
TEXTS = ROOT / "benchmarks/faces_texts.txt"
# The first weights are the authors' or were chosen on other texts and seeds; the last, where there are several, are
# the strong ones: four to eight times as large. Of evidence, 160 is the default.
METHODS: dict[str, tuple[str, list[float]]] = {
    "formula as written": ("clip_guidance", [50, 400]),
    "formula as coded": ("clip_guidance_pixel", [50, 400]),
    "MPGD": ("mpgd", [50, 400]),
    "GLIDE": ("glide", [3, 10, 20, 80]),
    "evidence": ("evidence", [20, 40, 160, 1280]),
    "FreeDoM": ("freedom", [1]),
    "TFG": ("tfg", [1]),
}


def compare(
    save_dir: Path = Path("out/methods"),
    only: list[str] | None = None,
    texts: Path = TEXTS,
    n_samples: int = 32,
    seed: int = 1000,
    val_count: int = 6000,
    micro_batch: int = 32,
) -> None:
    """Judge the methods, and draw the table and the figure of all that have been judged.

    Args:
        save_dir: where everything goes.
        only: methods to judge now, ``unguided``, ``faces`` or ``chosen``; all of the table by default, none with [].
            Other methods of the package may be named, and are judged at their own weights.
        texts: a text a line.
        n_samples: seeds for each text.
        seed: the first.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
    """
    sentences = texts.read_text().splitlines()
    runs = {"unguided": ("evidence", [0], n_samples * len(sentences))}
    runs |= {name: (method, weights, n_samples) for name, (method, weights) in METHODS.items()}
    known = {"unguided", "faces", "chosen"} | {method for method, _ in METHODS.values()}
    runs |= {name: (name, [PACKAGE[name].weight], n_samples) for name in only or [] if name not in known}
    reports: dict[str, list[dict[str, Any]]] = {}

    def judge(method: str, weights: list[float], number: int, report: Path) -> None:
        print(f"{method} at {weights}, {number} seeds", flush=True)
        flags = ["--method", method, "--guidance_weight", *map(str, weights), "--save_dir", str(report.parent)]
        flags += ["--judge", *JUDGES, "--prompts", str(texts), "--data.val_count", str(val_count)]
        flags += ["--n_samples", str(number), "--seed", str(seed), "--micro_batch", str(micro_batch)]
        main(["test", "-c", str(ROOT / "configs/faces.yaml"), *flags])

    pool = save_dir / "chosen/pool/report.json"
    if (only is None or "chosen" in only) and not pool.exists():
        judge("evidence", [0], POOL * n_samples * len(sentences), pool)
    for name, folder, rows in (
        ("unseen faces", "faces", lambda: faces(sentences, n_samples)),
        ("unguided that obey", "chosen", lambda: chosen(pool.with_name("pictures.parquet"), sentences, n_samples)),
    ):
        report = save_dir / folder / "report.json"
        if (only is None or folder in only) and not report.exists():
            score(report, rows(), sentences, val_count)
        if report.exists():
            reports[name] = json.loads(report.read_text())["table"]
    for name, (method, weights, number) in runs.items():
        folder = name if name == "unguided" else method
        report = save_dir / folder / "report.json"
        if not report.exists() and (only is None or folder in only):
            judge(method, weights, number, report)
        if report.exists():
            entries = json.loads(report.read_text())["table"]
            reports[name] = [entry for entry in entries if bool(entry["guidance_weight"]) == any(weights)]
    if reports:
        (save_dir / "table.md").write_text(table(reports))
        curve(reports).savefig(save_dir / "figure.png", dpi=150)
        print(table(reports))


def faces(texts: list[str], n_samples: int) -> list[Row]:
    """What is said of faces that no model made, ``n_samples`` for each text that they are true of."""
    judges, critics = Judges(JUDGES, texts), Critics([str(SHIPPED / "clip")])
    unseen, images, requests = Faces(UNSEEN, 10**5), [], []
    for text in texts:
        wanted = named(judges.vocabulary, text).items()  # the judge has the faces' own names
        true = (index for index in count() if wanted <= attributes(UNSEEN, index).items())
        for seed, index in enumerate(islice(true, n_samples)):
            images.append(unseen[index]["image"])
            requests.append({"index": len(requests), "text": text, "seed": seed, "guidance_weight": 1, "valid": True})
    batch = {name: [request[name] for request in requests] for name in requests[0]}
    free = dict.fromkeys(("network_forwards", "network_backwards", "critic_passes", "seconds", "peak_bytes"), 0)
    return judges.rows(batch, torch.stack(images), free, critics)


def chosen(pool: Path, texts: list[str], n_samples: int) -> list[Row]:
    """What was said of the unguided pictures that happen to obey: ``n_samples`` for each text, or all there are.

    Each costs what was drawn for it, those that do not obey too.
    """
    asked, used, found = defaultdict(list), set(), []
    for row in load_rows(pool):
        asked[row["text"]].append(row)
    obey = {text: [row for row in asked[text] if all(next(iter(row["seen"].values())).values())] for text in texts}
    for text in sorted(texts, key=lambda text: len(obey[text])):  # a picture is of the rarest text that it obeys
        share = len(asked[text]) / max(1, len(obey[text]))
        picked = [row for row in obey[text] if row["index"] not in used][:n_samples]
        used |= {row["index"] for row in picked}
        found += [
            row | {"cost": {k: v * (1 if k == "peak_bytes" else share) for k, v in row["cost"].items()}}
            for row in picked
        ]
    return [row | {"guidance_weight": 1} for row in found]


def score(report: Path, rows: list[Row], texts: list[str], val_count: int) -> None:
    """Write a report of rows that nothing guides."""
    data = FacesDataModule(val_count=val_count)
    data.setup("validate")
    reference = Reference(data.val_dataloader(), Judges(JUDGES, texts), torch.device("cpu"))
    entries = [entry | {"guidance_weight": None} for entry in summarise(rows, reference)]
    report.parent.mkdir(parents=True, exist_ok=True)
    with whole(report) as aside:
        aside.write_text(json.dumps({"table": entries}, indent=2))


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of all reports under one heading, each after its method's name."""
    head, line, *_ = markdown([]).splitlines()
    rows = [f"| method {head}", f"|---{line}"]
    for name, entries in reports.items():
        rows += [f"| {name} {markdown([entry]).splitlines()[-1]}" for entry in entries]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    auto_cli(compare)
