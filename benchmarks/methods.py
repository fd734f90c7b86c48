"""Every method on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 pictures a text, 50 steps), as many
unguided pictures, as many unseen faces that the texts are true of, which no method can be told from, and what waiting
gives: the unguided pictures that happen to obey among four times their number. It writes ``out/methods/table.md``,
``figure.png`` and ``report.json``, and goes on where it was stopped.
"""

import json
import sys
from collections import defaultdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from clipward.cli import main
from clipward.datamodules.faces import Faces, FacesDataModule, attributes
from clipward.evaluation.judges import Judges, Row
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import curve, load_rows, markdown, save_rows, summarise
from clipward.files import whole
from clipward.guidance.methods import METHODS as PACKAGE
from clipward.guidance.models import Critics
from clipward.networks.classifier import named

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints/faces64"
JUDGES = [str(SHIPPED / "judge.safetensors"), str(SHIPPED / "judge_clip")]
POOL = 4  # unguided pictures that are drawn for each that the table has, to find some that obey
UNSEEN = 5000  # the seed of faces that no network has been trained on or compared with
TEXTS = ROOT / "benchmarks/faces_texts.txt"
# The first weights are the authors' or were chosen on other texts and seeds; the last, where there are several, are
# the strong ones: four to eight times as large. Of evidence, 20 is the default.
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
    val_count: int = 24000,
    micro_batch: int = 32,
) -> None:
    """Judge the methods, and draw the table and the figure of all that have been judged.

    Args:
        save_dir: where everything goes.
        only: methods to judge now, ``unguided``, ``faces`` or ``chosen``; all of the table by default, none with [].
            Other methods of the package may be named, and are judged at their own weights.
        texts: a text a line.
        n_samples: pictures for each text, each from a seed of its own.
        seed: the first.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
    """
    sentences = texts.read_text().splitlines()
    save_dir.mkdir(parents=True, exist_ok=True)
    requests = save_dir / "requests.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in own_seeds(sentences, n_samples, seed))
    if requests.exists() and requests.read_text() != lines:
        sys.exit(f"save_dir: {save_dir} has pictures of other texts or seeds; another folder would do")
    requests.write_text(lines)
    number = n_samples * len(sentences)
    plain = save_dir / "unguided/pictures.parquet"
    pool = save_dir / "chosen/pictures.parquet"
    unseen = save_dir / "faces/pictures.parquet"

    def wanted(name: str, pictures: Path) -> bool:
        return not pictures.exists() and (only is None or name in only)

    def judge(method: str, weights: list[float], pictures: Path, *which: str) -> None:
        print(f"{pictures.parent.name} at {weights}", flush=True)
        flags = ["--method", method, "--guidance_weight", *map(str, weights), "--save_dir", str(pictures.parent)]
        flags += ["--judge", *JUDGES, "--data", "null", "--micro_batch", str(micro_batch), *which]
        main(["test", "-c", str(ROOT / "configs/faces.yaml"), *flags])

    if wanted("faces", unseen):
        unseen.parent.mkdir(exist_ok=True)
        save_rows(unseen, faces(sentences, n_samples))
    if wanted("unguided", plain):
        judge("evidence", [0], plain, "--prompts", str(requests))
    if wanted("chosen", pool):
        others = ["--seed", str(seed + number), "--n_samples", str((POOL - 1) * number)]
        judge("evidence", [0], pool, "--prompts", str(texts), *others)
    extra = set(only or []) - {"unguided", "faces", "chosen"} - {method for method, _ in METHODS.values()}
    guided = METHODS | {name: (name, [PACKAGE[name].weight]) for name in sorted(extra)}
    for method, weights in guided.values():
        pictures = save_dir / method / "pictures.parquet"
        if wanted(method, pictures):
            judge(method, weights, pictures, "--prompts", str(requests))

    twins = load_rows(plain) if plain.exists() else []
    found: dict[str, list[Row]] = {}
    if unseen.exists():
        found["unseen faces"] = load_rows(unseen)
    if pool.exists() and twins:
        found["unguided that obey"] = chosen(twins + load_rows(pool), sentences, n_samples)
    if twins:
        found["unguided"] = twins
    for name, (method, _) in guided.items():
        pictures = save_dir / method / "pictures.parquet"
        if pictures.exists():
            found[name] = load_rows(pictures)
    if not found:
        return
    data = FacesDataModule(val_count=val_count)
    data.setup("validate")
    reference = Reference(data.val_dataloader(), Judges(JUDGES, sentences), torch.device("cpu"))
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, rows in found.items():
        if name in guided or rows is twins:
            reports[name] = summarise(rows, reference, twins)
        else:  # no weight had a part in them
            reports[name] = [entry | {"guidance_weight": None} for entry in summarise(rows, reference)]
    for name, text in (("report.json", json.dumps(reports, indent=2) + "\n"), ("table.md", table(reports))):
        with whole(save_dir / name) as aside:
            aside.write_text(text)
    curve(reports).savefig(save_dir / "figure.png", dpi=150)
    print(table(reports))


def own_seeds(texts: list[str], n_samples: int, seed: int) -> list[dict[str, Any]]:
    """A request for each picture.

    Pictures of one seed are alike whatever their texts, for they start from the same noise; a set of them is compared
    with faces, and with unguided pictures of which no two share a seed either.
    """
    return [{"text": text, "seed": seed + i} for i, text in enumerate(t for t in texts for _ in range(n_samples))]


def faces(texts: list[str], n_samples: int) -> list[Row]:
    """What is said of faces that no model made, ``n_samples`` for each text that they are true of."""
    judges, critics = Judges(JUDGES, texts), Critics([str(SHIPPED / "clip")])
    unseen, images, requests = Faces(UNSEEN, 10**5), [], []
    for text in texts:
        wanted = named(judges.vocabulary, text).items()  # the judge has the faces' own names
        true = (index for index in count() if wanted <= attributes(UNSEEN, index).items())
        for index in islice(true, n_samples):
            number = len(requests)
            images.append(unseen[index]["image"])
            requests.append({"index": number, "text": text, "seed": number, "guidance_weight": 1, "valid": True})
    batch = {name: [request[name] for request in requests] for name in requests[0]}
    free = dict.fromkeys(("network_forwards", "network_backwards", "critic_passes", "seconds", "peak_bytes"), 0)
    return judges.rows(batch, torch.stack(images), free, critics)


def chosen(rows: list[Row], texts: list[str], n_samples: int) -> list[Row]:
    """What was said of the unguided pictures that happen to obey: ``n_samples`` for each text, or all there are.

    Each costs what was drawn for it, those that do not obey too.
    """
    asked, used, found = defaultdict(list), set(), []
    for row in rows:
        asked[row["text"]].append(row)
    obey = {text: [row for row in asked[text] if all(next(iter(row["seen"].values())).values())] for text in texts}
    for text in sorted(texts, key=lambda text: len(obey[text])):  # a picture is of the rarest text that it obeys
        share = len(asked[text]) / max(1, len(obey[text]))
        picked = [row for row in obey[text] if row["seed"] not in used][:n_samples]
        used |= {row["seed"] for row in picked}
        found += [
            row
            | {
                "index": row["seed"],
                "guidance_weight": 1,
                "cost": {k: v * (1 if k == "peak_bytes" else share) for k, v in row["cost"].items()},
            }
            for row in picked
        ]
    return found


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of all reports under one heading, each after its method's name."""
    head, line, *_ = markdown([]).splitlines()
    rows = [f"| method {head}", f"|---{line}"]
    for name, entries in reports.items():
        rows += [f"| {name} {markdown([entry]).splitlines()[-1]}" for entry in entries]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    auto_cli(compare)
