"""Compare the methods on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 pictures a text, 50 steps). Three
rows beside the methods set the scale: as many unguided pictures; as many unseen faces that the texts are true of, which
is the best that a method can do; and rejection sampling, which keeps the correct ones of four times as many unguided
pictures. The script writes ``out/methods/table.md``, ``figure.png`` and ``report.json``. A run that was stopped
continues where it was.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from clipward.cli import main
from clipward.datamodules.faces import Faces, FacesDataModule, attributes
from clipward.errors import shorten
from clipward.evaluation.cost import Cost
from clipward.evaluation.judgements import Judgement, load_judgements, save_judgements
from clipward.evaluation.judges import Judges
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import format_methods, plot_scores
from clipward.evaluation.scores import Scores, summarise
from clipward.files import atomic_write
from clipward.guidance.methods import METHODS as PACKAGE
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.networks.vocabulary import find_attributes

ROOT = Path(__file__).parent.parent
JUDGES = ["clipward:faces64/judge.safetensors", "clipward:faces64/judge_clip"]
CLIP = "clipward:faces64/clip"
POOL = 4  # unguided pictures that rejection sampling draws for each that the table has
UNSEEN = 5000  # the seed of faces that no network has been trained on or compared with
TEXTS = ROOT / "benchmarks/faces_texts.txt"
# The name of each method in the table, its name in the package, and its weights. The first weights are the authors' or
# were chosen on other texts and seeds; the last, where there are several, are four to eight times as large. 20 and 160
# are the defaults of our two methods.
METHODS: dict[str, tuple[str, list[float]]] = {
    "formula as written": ("clip_guidance", [50, 400]),
    "formula as coded": ("clip_guidance_pixel", [50, 400]),
    "GLIDE": ("glide", [3, 20, 160]),
    "contrastive": ("contrastive", [20, 160]),
    "contrastive, ordinary CLIP": ("contrastive_denoised", [160, 1280]),
    "classifier guidance": ("classifier_guidance", [10]),
    "DPS": ("dps", [1, 4]),
    "FreeDoM": ("freedom", [1, 4]),
    "MPGD": ("mpgd", [1]),
    "DSG": ("dsg", [1]),
    "Universal Guidance": ("universal", [1]),
    "LGD-MC": ("lgd_mc", [1]),
    "TFG": ("tfg", [1]),
    "Polyak": ("polyak", [0.001]),
    "cutouts": ("cutouts", [1]),
}


def compare(
    save_dir: Path = Path("out/methods"),
    only: list[str] | None = None,
    texts: Path = TEXTS,
    n_samples: int = 32,
    seed: int = 1000,
    val_count: int = 24000,
    micro_batch: int = 32,
    skip_steps: int | None = None,
) -> None:
    """Judge the methods, and make the table and the figure of all that have been judged.

    Args:
        save_dir: the folder to write to.
        only: what to judge now: methods, ``unguided``, ``faces`` or ``rejection``. By default all of the table; with []
            nothing. Other methods of the package may be named, and are judged at their default weights.
        texts: a file with a text a line.
        n_samples: pictures for each text, each from a seed of its own.
        seed: the first seed.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
        skip_steps: steps of each picture; each method's own number by default.
    """
    in_table = {"unguided", "faces", "rejection"} | {method for method, _ in METHODS.values()}
    check_names("only", only, in_table | PACKAGE.keys())
    sentences = texts.read_text().splitlines()
    number = n_samples * len(sentences)
    requests = save_dir / "requests.jsonl"
    save_requests(requests, sentences, n_samples, seed)
    unguided, faces, pool = (save_dir / name / "pictures.parquet" for name in ("unguided", "faces", "rejection"))
    methods = METHODS | {name: (name, [PACKAGE[name].weight]) for name in sorted(set(only or []) - in_table)}

    def is_due(name: str, pictures: Path) -> bool:
        return not pictures.exists() and (only is None or name in only)

    def judge(method: str, weights: list[float], pictures: Path, *flags: str) -> None:
        print(f"{pictures.parent.name} at {weights}", flush=True)
        command = ["test", "-c", str(ROOT / "configs/faces.yaml"), "--judge", *JUDGES, "--data", "null"]
        command += ["--method", method, "--guidance_weight", *map(str, weights), "--save_dir", str(pictures.parent)]
        command += [] if skip_steps is None else ["--skip_steps", str(skip_steps)]
        main([*command, "--micro_batch", str(micro_batch), *flags])

    if is_due("faces", faces):
        save_judgements(faces, judge_faces(sentences, n_samples))
    if is_due("unguided", unguided):
        judge("glide", [0], unguided, "--prompts", str(requests))
    if is_due("rejection", pool):
        others = ["--seed", str(seed + number), "--n_samples", str((POOL - 1) * number)]
        judge("glide", [0], pool, "--prompts", str(texts), *others)
    for method, weights in methods.values():
        pictures = save_dir / method / "pictures.parquet"
        if is_due(method, pictures):
            judge(method, weights, pictures, "--prompts", str(requests))

    twins = load_judgements(unguided) if unguided.exists() else []
    without_weight: dict[str, list[Judgement]] = {}
    if faces.exists():
        without_weight["unseen faces"] = load_judgements(faces)
    if pool.exists() and twins:
        without_weight["rejection sampling"] = select_correct(twins + load_judgements(pool), sentences, n_samples)
    with_weight = {"unguided": twins} if twins else {}
    for name, (method, _) in methods.items():
        pictures = save_dir / method / "pictures.parquet"
        if pictures.exists():
            with_weight[name] = load_judgements(pictures)
    if not without_weight | with_weight:
        return

    data = FacesDataModule(val_count=val_count)
    data.setup("validate")
    reference = Reference.from_batches(data.val_dataloader(), Judges(JUDGES, sentences), torch.device("cpu"))
    tables = {
        name: [replace(scores, guidance_weight=None) for scores in summarise(judgements, reference)]
        for name, judgements in without_weight.items()
    }
    tables |= {name: summarise(judgements, reference, twins) for name, judgements in with_weight.items()}
    save_tables(save_dir, tables)
    print(format_methods(tables))


def check_names(field: str, names: Sequence[str] | None, known: Collection[str]) -> None:
    """Stop with one line where a name is not known, before anything is judged."""
    unknown = [name for name in names or () if name not in known]
    if unknown:
        sys.exit(f"{field}: got {', '.join(map(shorten, unknown))}, expected names among {', '.join(sorted(known))}")


def save_requests(path: Path, texts: list[str], n_samples: int, seed: int) -> None:
    """Write the requests that all methods draw, and stop where the folder has pictures of others."""
    content = "".join(json.dumps(request) + "\n" for request in make_requests(texts, n_samples, seed))
    if path.exists() and path.read_text() != content:
        sys.exit(f"save_dir: {path.parent} has pictures of other texts or seeds; use another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def make_requests(texts: list[str], n_samples: int, seed: int) -> list[dict[str, Any]]:
    """A request for each picture, ``n_samples`` for each text, each with a seed of its own.

    Pictures of one seed look alike whatever their texts, because they start from the same noise. A set in which no two
    share a seed can be compared with real faces.
    """
    return [{"text": text, "seed": seed + i} for i, text in enumerate(t for t in texts for _ in range(n_samples))]


def judge_faces(texts: list[str], n_samples: int) -> list[Judgement]:
    """Judge faces that no model made, ``n_samples`` for each text that they are true of."""
    judges, models = Judges(JUDGES, texts), GuidanceModels(GuidanceConfig(clip=CLIP))
    faces, indices = Faces(UNSEEN, 10**5), []
    for text in texts:
        wanted = find_attributes(judges.vocabulary, text).items()  # the first judge has the faces' own names
        matches = (index for index in count() if wanted <= attributes(UNSEEN, index).items())
        indices += list(islice(matches, n_samples))
    numbers = list(range(len(indices)))
    requests = {
        "index": numbers,
        "text": [text for text in texts for _ in range(n_samples)],
        "seed": numbers,
        "guidance_weight": [1.0] * len(numbers),
        "valid": [True] * len(numbers),
    }
    images = torch.stack([faces[index]["image"] for index in indices])
    return judges.judge_pictures(requests, images, Cost(), models)


def select_correct(unguided: Sequence[Judgement], texts: list[str], n_samples: int) -> list[Judgement]:
    """Rejection sampling: the unguided pictures that the first judge finds correct.

    Each text gets ``n_samples``, or as many as there are; no two share a seed. The cost of each includes the pictures
    that were rejected.
    """
    by_text, used, selected = defaultdict(list), set(), []
    for judgement in unguided:
        by_text[judgement.text].append(judgement)
    correct = {text: [each for each in by_text[text] if each.is_correct()] for text in texts}
    for text in sorted(texts, key=lambda text: len(correct[text])):  # rare texts choose first
        draws = len(by_text[text]) / max(1, len(correct[text]))
        chosen = [each for each in correct[text] if each.seed not in used][:n_samples]
        used |= {each.seed for each in chosen}
        selected += [
            replace(each, index=each.seed, guidance_weight=1.0, cost=each.cost.multiply(draws)) for each in chosen
        ]
    return selected


def save_tables(save_dir: Path, tables: dict[str, list[Scores]]) -> None:
    """Write the scores of each method as JSON, as a Markdown table and as a figure."""
    scores = {name: [asdict(each) for each in table] for name, table in tables.items()}
    contents = {"report.json": json.dumps(scores, indent=2), "table.md": format_methods(tables)}
    for name, content in contents.items():
        with atomic_write(save_dir / name) as aside:
            aside.write_text(content + "\n", encoding="utf-8")
    plot_scores(tables).savefig(save_dir / "figure.png", dpi=150)


if __name__ == "__main__":
    auto_cli(compare)
