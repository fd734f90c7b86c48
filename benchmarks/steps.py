"""Compare solvers at few and at many steps: one table, one figure.

    python -m benchmarks.steps

judges drawn faces of the tuning texts (``benchmarks/faces_tuning_texts.txt``, four pictures a text) that each solver
draws with the default method in 10, 20 and 50 steps. The script writes ``out/steps/table.md``, ``figure.png`` and
``report.json``. A run that was stopped continues where it was. The FID of so few pictures is larger than that of many,
so compare rows of the same number of pictures alone.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.methods import JUDGES, ROOT, check_names, save_requests
from clipward.cli import main
from clipward.datamodules.faces import FacesDataModule
from clipward.evaluation.judgements import load_judgements
from clipward.evaluation.judges import Judges
from clipward.evaluation.reference import Reference
from clipward.evaluation.scores import Scores, summarise
from clipward.files import atomic_write

TEXTS = ROOT / "benchmarks/faces_tuning_texts.txt"
SOLVERS: dict[str, list[str]] = {  # the flags of each
    "DDPM": ["--model.sampling.ddim", "false"],
    "DDIM": ["--ddim", "--skip_type", "trailing"],
    "DPM-Solver++(2M)": ["--solver", "dpmpp_2m", "--skip_type", "trailing"],
    "SDE-DPM-Solver++(2M)": ["--solver", "sde_dpmpp_2m", "--skip_type", "trailing"],
    "UniPC": ["--solver", "unipc", "--skip_type", "trailing"],
}


def compare(
    save_dir: Path = Path("out/steps"),
    solvers: list[str] | None = None,
    steps: list[int] | None = None,
    texts: Path = TEXTS,
    n_samples: int = 4,
    seed: int = 30000,
    val_count: int = 6000,
    micro_batch: int = 24,
) -> None:
    """Judge the solvers, and make the table and the figure of all that have been judged.

    Args:
        save_dir: the folder to write to.
        solvers: names of the table; all by default.
        steps: how many of each; 10, 20 and 50 by default.
        texts: a file with a text a line.
        n_samples: pictures for each text, each from a seed of its own.
        seed: the first seed.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
    """
    check_names("solvers", solvers, SOLVERS)
    sentences = texts.read_text().splitlines()
    requests = save_dir / "requests.jsonl"
    save_requests(requests, sentences, n_samples, seed)
    judged: dict[tuple[str, int], Path] = {}
    for name, flags in SOLVERS.items():
        for number in steps or [10, 20, 50]:
            folder = save_dir / f"{name}-{number}"
            judged[name, number] = folder / "pictures.parquet"
            if not judged[name, number].exists() and (solvers is None or name in solvers):
                command = ["test", "-c", str(ROOT / "configs/faces.yaml"), "--judge", *JUDGES, "--data", "null"]
                command += ["--prompts", str(requests), "--micro_batch", str(micro_batch), "--save_dir", str(folder)]
                main([*command, "--skip_steps", str(number), *flags])
    data = FacesDataModule(val_count=val_count)
    data.setup("validate")
    reference = Reference.from_batches(data.val_dataloader(), Judges(JUDGES, sentences), torch.device("cpu"))
    scores = {key: summarise(load_judgements(path), reference)[0] for key, path in judged.items() if path.exists()}
    for file, text in (("report.json", to_json(scores)), ("table.md", format_table(scores))):
        with atomic_write(save_dir / file) as aside:
            aside.write_text(text + "\n", encoding="utf-8")
    plot(scores).savefig(save_dir / "figure.png", dpi=150)
    print(format_table(scores))


def to_json(scores: dict[tuple[str, int], Scores]) -> str:
    rows = [{"solver": name, "steps": steps, **asdict(each)} for (name, steps), each in scores.items()]
    return json.dumps(rows, indent=2)


def format_table(scores: dict[tuple[str, int], Scores]) -> str:
    """A Markdown table with a row for each solver and number of steps."""
    lines = ["| solver | steps | prompt accuracy | second judge | attribute-matched FID | CLIP passes | seconds |"]
    lines.append("|---" * 7 + "|")
    for (name, steps), each in scores.items():
        second = list(each.judges.values())[1]
        error = each.prompt_accuracy_error or 0
        fid = "" if each.attribute_matched_fid is None else f"{each.attribute_matched_fid:.3f}"  # too few match
        lines.append(
            f"| {name} | {steps} | {each.prompt_accuracy:.1%} ± {error:.1%} | {second:.1%} | {fid} "
            f"| {each.cost.clip_passes:.0f} | {each.cost.seconds:.2f} |"
        )
    return "\n".join(lines)


def plot(scores: dict[tuple[str, int], Scores]) -> Figure:
    """Prompt accuracy and attribute-matched FID against U-Net passes, a line for each solver."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(name for name, _ in scores):
        rows = [each for (solver, _), each in scores.items() if solver == name]
        passes = [each.cost.network_passes for each in rows]
        errors = [100 * (each.prompt_accuracy_error or 0) for each in rows]
        left.errorbar(passes, [100 * each.prompt_accuracy for each in rows], errors, marker="o", capsize=3, label=name)
        right.plot(passes, [each.attribute_matched_fid for each in rows], "o-", label=name)
    left.set(ylabel="prompt accuracy, %")
    right.set(ylabel="attribute-matched FID (lower is better)", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="U-Net passes for a picture")
        axes.grid(alpha=0.3)
    right.legend()
    return figure


if __name__ == "__main__":
    auto_cli(compare)
