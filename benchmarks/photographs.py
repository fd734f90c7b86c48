r"""Compare the methods on photographs: one table, one figure.

    python -m benchmarks.photographs --path FILE --weights ddpm.safetensors --clip clip --noisy_clip noisy_clip \
        --judges '[judge.safetensors, judge_clip]'

judges what each method draws for the texts of ``benchmarks/photographs_texts.txt``, with networks that
``docs/photographs.md`` trains. The row of unseen photographs sets the scale: they are rows 8000 to 8999, whose
labels say what the texts say. The judges do not agree with all of these labels. FID compares with rows 0 to 3999, which
the judges have not seen. A run that was stopped continues where it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli

from benchmarks.methods import ROOT, check_names, save_requests, save_tables
from clipward.cli import main
from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.evaluation.cost import Cost
from clipward.evaluation.judgements import Judgement, load_judgements, save_judgements
from clipward.evaluation.judges import Judges
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import format_methods
from clipward.evaluation.scores import summarise
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.networks.vocabulary import find_allowed

# The name of each method in the table, its name in the package, its weights, and whether it has a noise-aware CLIP. The
# first weights were chosen on benchmarks/photographs_tuning_texts.txt; the second ones are eight times as large.
METHODS: dict[str, tuple[str, list[float], bool]] = {
    "unguided": ("clip_guidance", [0], False),
    "formula as written": ("clip_guidance", [50], False),
    "contrastive, ordinary CLIP": ("contrastive_denoised", [20, 160], False),
    "GLIDE": ("glide", [10], True),
    "contrastive": ("contrastive", [10, 80], True),
}


def compare(
    path: str,
    weights: str,
    clip: str,
    noisy_clip: str,
    judges: tuple[str, ...],
    save_dir: Path = Path("out/photographs"),
    only: list[str] | None = None,
    texts: Path = ROOT / "benchmarks/photographs_texts.txt",
    n_samples: int = 16,
    seed: int = 1000,
    reference: tuple[int, int] = (0, 4000),
    unseen: tuple[int, int] = (8000, 1000),
    micro_batch: int = 16,
    skip_steps: int | None = None,
    precision: str = "auto",
) -> None:
    """Judge the methods, and make the table and the figure of all that have been judged.

    Args:
        path: the photographs with their labels, a parquet file.
        weights: the diffusion model.
        clip: the CLIP that guides.
        noisy_clip: the noise-aware CLIP that guides.
        judges: a classifier and a CLIP that do not guide.
        save_dir: the folder to write to.
        only: rows to judge now, by their names in the table; all by default, with [] none.
        texts: a file with a text a line.
        n_samples: pictures for each text, each from a seed of its own.
        seed: the first seed.
        reference: the first row of those that pictures are compared with, and how many there are.
        unseen: the same of the photographs that no network has seen.
        micro_batch: pictures sampled at once.
        skip_steps: steps of each picture; each method's own number by default.
        precision: as ``clipward test`` takes it.
    """
    found = {"unseen photographs": save_dir / "photographs.parquet"}
    found |= {name: save_dir / name / "pictures.parquet" for name in METHODS}
    check_names("only", only, found)
    sentences = texts.read_text().splitlines()
    requests = save_dir / "requests.jsonl"
    save_requests(requests, sentences, n_samples, seed)

    for name, pictures in found.items():
        if pictures.exists() or not (only is None or name in only):
            continue
        print(name, flush=True)
        if name not in METHODS:
            save_judgements(pictures, judge_photographs(path, *unseen, sentences, n_samples, judges, clip))
            continue
        method, guidance_weights, noise_aware = METHODS[name]
        command = ["test", "-c", str(ROOT / "configs/celeba64.yaml"), "--data", "null", "--weights", weights]
        command += ["--clip", clip, *(["--noisy_clip", noisy_clip] if noise_aware else [])]
        command += ["--prompts", str(requests), "--judge", *judges, "--save_dir", str(pictures.parent)]
        command += ["--method", method, "--guidance_weight", *map(str, guidance_weights)]
        command += [] if skip_steps is None else ["--skip_steps", str(skip_steps)]
        main([*command, "--micro_batch", str(micro_batch), "--precision", precision])

    judged = {name: load_judgements(pictures) for name, pictures in found.items() if pictures.exists()}
    twins = judged.get("unguided", [])
    batches = read_photographs(path, *reference).val_dataloader()
    real = Reference.from_batches(batches, Judges(judges, sentences), torch.device("cpu"))
    tables = {name: summarise(judgements, real, twins) for name, judgements in judged.items()}
    if "unseen photographs" in tables:
        (scores,) = tables["unseen photographs"]
        tables["unseen photographs"] = [replace(scores, guidance_weight=None)]
    save_tables(save_dir, tables)
    print(format_methods(tables))


def read_photographs(path: str, first: int, count: int) -> CelebAHQDataModule:
    """Rows of the photographs with the labels that the judge learned from."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs/celeba64_judge.yaml").read_text())["data"]["init_args"]
    own = {"path": path, "first": first, "count": count, "val_count": 0}
    data = CelebAHQDataModule(**{**settings, **own})
    data.setup("validate")
    return data


def judge_photographs(
    path: str, first: int, count: int, texts: list[str], n_samples: int, judges: Sequence[str], clip: str
) -> list[Judgement]:
    """Judge photographs that no network has seen, ``n_samples`` for each text that their labels are true of."""
    judge, models = Judges(judges, texts), GuidanceModels(GuidanceConfig(clip=clip))
    photographs = read_photographs(path, first, count).val_set  # without the rows that can't be read
    items = [photographs[i] for i in range(len(photographs))]
    names = {name: list(values) for name, values in judge.vocabulary.items()}

    def is_true(text: str, labels: list[int]) -> bool:
        shown = {name: names[name][label] for name, label in zip(names, labels, strict=True) if label >= 0}
        return all(shown.get(name) in values for name, values in find_allowed(judge.vocabulary, text).items())

    matches = {text: [i for i, item in enumerate(items) if is_true(text, item["labels"].tolist())] for text in texts}
    used: set[int] = set()
    chosen: list[tuple[str, int]] = []
    for text in sorted(texts, key=lambda text: len(matches[text])):  # rare texts choose first
        own = [i for i in matches[text] if i not in used][:n_samples]
        used.update(own)
        chosen += [(text, i) for i in own]
    requests = {
        "index": [i for _, i in chosen],
        "text": [text for text, _ in chosen],
        "seed": [i for _, i in chosen],
        "guidance_weight": [1.0] * len(chosen),
        "valid": [True] * len(chosen),
    }
    return judge.judge_pictures(requests, torch.stack([items[i]["image"] for _, i in chosen]), Cost(), models)


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
