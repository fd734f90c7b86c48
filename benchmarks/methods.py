"""Every method on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 seeds, 50 steps), and as many
unguided pictures, writes ``out/methods/table.md``, ``out/methods/figure.png`` and a report for each, and goes on where
it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from callbacks.evaluation import curve, markdown  # noqa: E402
from cli import main  # noqa: E402

SHIPPED = ROOT / "checkpoints/faces64"
TEXTS = ROOT / "benchmarks/faces_texts.txt"
# The first weights are the authors' or were chosen on other texts and seeds; the last, where there are several, are
# the strong ones: four to eight times as large.
METHODS: dict[str, tuple[str, list[float]]] = {
    "formula as written": ("clip_guidance", [50, 400]),
    "formula as coded": ("clip_guidance_pixel", [50, 400]),
    "MPGD": ("mpgd", [50, 400]),
    "GLIDE": ("glide", [3, 10, 20, 80]),
    "evidence (default)": ("evidence", [20, 160]),
    "FreeDoM": ("freedom", [1]),
    "TFG": ("tfg", [1]),
}


def compare(
    save_dir: Path = Path("out/methods"),
    only: list[str] | None = None,
    n_samples: int = 32,
    seed: int = 1000,
    val_count: int = 6000,
    micro_batch: int = 32,
) -> None:
    """Judge the methods, and draw the table and the figure of all that have been judged.

    Args:
        save_dir: where everything goes.
        only: methods to judge now, or ``unguided``; all by default, none with [].
        n_samples: seeds for each text.
        seed: the first.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
    """
    unguided = n_samples * len(TEXTS.read_text().splitlines())
    runs = {"unguided": ("evidence", [0], unguided)}
    runs |= {name: (method, weights, n_samples) for name, (method, weights) in METHODS.items()}
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, (method, weights, count) in runs.items():
        folder = method if name in METHODS else name
        report = save_dir / folder / "report.json"
        if not report.exists() and (only is None or folder in only):
            print(f"{name}: {method} at {weights}", flush=True)
            flags = ["--method", method, "--guidance_weight", *map(str, weights), "--save_dir", str(report.parent)]
            flags += ["--judge", str(SHIPPED / "judge.safetensors"), str(SHIPPED / "judge_clip")]
            flags += ["--prompts", str(TEXTS), "--data.val_count", str(val_count)]
            flags += ["--n_samples", str(count), "--seed", str(seed), "--micro_batch", str(micro_batch)]
            main(["test", "-c", str(ROOT / "configs/faces.yaml"), *flags])
        if report.exists():
            entries = json.loads(report.read_text())["table"]
            reports[name] = [entry for entry in entries if bool(entry["guidance_weight"]) == (name in METHODS)]
    if reports:
        (save_dir / "table.md").write_text(table(reports))
        curve(reports).savefig(save_dir / "figure.png", dpi=150)
        print(table(reports))


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of all reports under one heading, each after its method's name."""
    head, line, *_ = markdown([]).splitlines()
    rows = [f"| method {head}", f"|---{line}"]
    for name, entries in reports.items():
        rows += [f"| {name} {markdown([entry]).splitlines()[-1]}" for entry in entries]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    auto_cli(compare)
