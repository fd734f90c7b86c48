"""Every method on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 seeds, 50 steps), writes
``out/methods/table.md``, ``out/methods/figure.png`` and a report for each method, and goes on where it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from jsonargparse import auto_cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from callbacks.evaluation import markdown  # noqa: E402
from cli import main  # noqa: E402

SHIPPED = ROOT / "checkpoints/faces64"
# heading: (method, weights); weights were chosen on other texts and seeds, or are the authors'
METHODS: dict[str, tuple[str, list[float]]] = {
    "formula as written": ("clip_guidance", [0, 50, 400]),
    "formula as coded": ("clip_guidance_pixel", [50, 400]),
    "FreeDoM": ("freedom", [1, 8]),
    "MPGD": ("mpgd", [1, 8]),
    "TFG": ("tfg", [1]),
    "GLIDE": ("glide", [3, 24]),
    "default": ("evidence", [10, 80]),
}


def compare(
    save_dir: Path = Path("out/methods"),
    only: list[str] | None = None,
    n_samples: int = 32,
    seed: int = 1000,
    micro_batch: int = 32,
) -> None:
    """Judge the methods and draw the table and the figure of all that have been judged.

    Args:
        save_dir: where everything goes.
        only: names of the table's rows to judge now.
        n_samples: seeds for each text.
        seed: the first.
        micro_batch: pictures sampled at once.
    """
    for name, (method, weights) in METHODS.items():
        folder = save_dir / method
        if (only is None or name in only) and not (folder / "report.json").exists():
            print(f"{name}: {method} at {weights}", flush=True)
            flags = ["test", "-c", str(ROOT / "configs/faces.yaml"), "--method", method, "--save_dir", str(folder)]
            flags += ["--judge", str(SHIPPED / "judge.safetensors"), str(SHIPPED / "judge_clip")]
            flags += ["--prompts", str(ROOT / "benchmarks/faces_texts.txt"), "--unguided", "false"]
            flags += ["--n_samples", str(n_samples), "--seed", str(seed), "--micro_batch", str(micro_batch)]
            main([*flags, "--guidance_weight", *map(str, weights)])
    reports = {
        name: json.loads((save_dir / method / "report.json").read_text())["table"]
        for name, (method, _) in METHODS.items()
        if (save_dir / method / "report.json").exists()
    }
    if reports:
        (save_dir / "table.md").write_text(table(reports))
        figure(reports, save_dir / "figure.png")
        print(table(reports))


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of all reports under one heading, each after its method's name."""
    head, line, *_ = markdown([]).splitlines()
    rows = [f"| method {head}", f"|---{line}"]
    for name, entries in reports.items():
        for entry in entries:
            label = name if entry["guidance_weight"] else "unguided"
            rows.append(f"| {label} {markdown([entry]).splitlines()[-1]}")
    return "\n".join(rows) + "\n"


def figure(reports: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Obedience against fidelity, a line for each method over its weights."""
    plot, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, entries in reports.items():
        guided = [entry for entry in entries if entry["guidance_weight"]]
        places = [(entry["fid"], 100 * entry["obey"]) for entry in guided]
        axes.plot(*zip(*places, strict=True), "o-", label=name)
        for entry, place in zip(guided, places, strict=True):
            axes.annotate(f"{entry['guidance_weight']:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
        for entry in entries:
            if not entry["guidance_weight"]:
                axes.plot(entry["fid"], 100 * entry["obey"], "k*", markersize=11, label="unguided")
    axes.set(
        xlabel="FID to unseen faces (lower is better)", ylabel="pictures that obey their whole text, %", ylim=(0, 102)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    plot.savefig(path, dpi=150)


if __name__ == "__main__":
    auto_cli(compare)
