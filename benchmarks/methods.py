"""Every method on the same texts and seeds: one table, one figure.

    python benchmarks/methods.py

judges what each method draws of the drawn faces (``benchmarks/faces_texts.txt``, 32 seeds, 50 steps; 8 seeds at eight
times the weight), writes ``out/methods/table.md``, ``out/methods/figure.png`` and a report for each, and goes on where
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
# The weights are the authors' or were chosen on other texts and seeds. Those of the second list are the strong ones.
METHODS: dict[str, tuple[str, list[float], list[float]]] = {
    "formula as written": ("clip_guidance", [0, 50], [400]),
    "formula as coded": ("clip_guidance_pixel", [50], [400]),
    "MPGD": ("mpgd", [50], [400]),
    "GLIDE": ("glide", [3, 10, 20], [80]),
    "evidence (default)": ("evidence", [20], [160]),
    "FreeDoM": ("freedom", [1], []),
    "TFG": ("tfg", [1], []),
}


def compare(
    save_dir: Path = Path("out/methods"),
    only: list[str] | None = None,
    n_samples: int = 32,
    n_strong: int = 8,
    seed: int = 1000,
    val_count: int = 6000,
    micro_batch: int = 32,
) -> None:
    """Judge the methods, and draw the table and the figure of all that have been judged.

    Args:
        save_dir: where everything goes.
        only: methods to judge now; all by default, none with [].
        n_samples: seeds for each text.
        n_strong: seeds for each text at the strong weight.
        seed: the first.
        val_count: unseen faces to compare with.
        micro_batch: pictures sampled at once.
    """
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, (method, weights, strong) in METHODS.items():
        for folder, chosen, count in ((method, weights, n_samples), (f"{method}_strong", strong, n_strong)):
            report = save_dir / folder / "report.json"
            if chosen and not report.exists() and (only is None or folder in only):
                print(f"{name}: {method} at {chosen}", flush=True)
                flags = ["--method", method, "--guidance_weight", *map(str, chosen), "--save_dir", str(report.parent)]
                flags += ["--judge", str(SHIPPED / "judge.safetensors"), str(SHIPPED / "judge_clip")]
                flags += ["--prompts", str(ROOT / "benchmarks/faces_texts.txt"), "--unguided", "false"]
                flags += ["--data.val_count", str(val_count), "--n_samples", str(count), "--seed", str(seed)]
                main(["test", "-c", str(ROOT / "configs/faces.yaml"), *flags, "--micro_batch", str(micro_batch)])
            if report.exists():
                reports.setdefault(name, []).extend(json.loads(report.read_text())["table"])
    if reports:
        (save_dir / "table.md").write_text(table(reports))
        curve(reports).savefig(save_dir / "figure.png", dpi=150)
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


if __name__ == "__main__":
    auto_cli(compare)
