"""Scores as a JSON report, as Markdown tables and as a curve over the guidance weights."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from clipward.evaluation.scores import Scores
from clipward.files import atomic_write

MARKERS = "osD^v"  # which tell apart methods of alike colours


@dataclass(frozen=True)
class Report:
    """What ``test`` writes.

    Args:
        provenance: how the pictures were made.
        table: scores over all texts, one for each guidance weight.
        texts: the same for each text, without fidelity.
    """

    provenance: dict[str, Any]
    table: list[Scores]
    texts: dict[str, list[Scores]]


def save_report(path: Path, report: Report) -> None:
    """Write a report as JSON, atomically: ``{"provenance": …, "table": [scores], "texts": [scores with "text"]}``."""
    texts = [{"text": text, **asdict(scores)} for text, table in report.texts.items() for scores in table]
    content = {"provenance": report.provenance, "table": [asdict(scores) for scores in report.table], "texts": texts}
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plot_scores(tables: Mapping[str, Sequence[Scores]]) -> Figure:
    """Plot prompt accuracy against FID: a line over its weights for each method, and a star for unguided pictures."""
    plot = Figure(figsize=(10, 5), layout="constrained")
    axes = plot.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for number, (name, table) in enumerate(tables.items()):
        points = [(s.fid, 100 * s.prompt_accuracy, s.guidance_weight) for s in table if s.fid is not None]
        guided = [(x, y, weight) for x, y, weight in points if weight]
        if guided:
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([x for x, _, _ in guided], [y for _, y, _ in guided], marker=marker, label=name)
        for x, y, weight in guided:
            beside = (5, 4 if number % 2 else -10)  # above one line, below the next
            axes.annotate(f"{weight:g}", (x, y), textcoords="offset points", xytext=beside, fontsize=8)
        for x, y in ((x, y) for x, y, weight in points if not weight):
            colour, label = ("black", "unguided") if guided else (None, name)
            axes.plot(x, y, "*", color=colour, markersize=11, label=label)
    axes.set(xlabel="FID (lower is better)", ylabel="prompt accuracy, %", ylim=(0, 104))
    axes.grid(alpha=0.3)
    plot.legend(loc="outside right upper", fontsize=8)
    return plot


def _show(value: float | None, form: str, error: float | None = None) -> str:
    if value is None:
        return ""
    return format(value, form) + ("" if error is None else f" ± {format(error, form)}")


COLUMNS: dict[str, Callable[[Scores], str]] = {
    "weight": lambda scores: _show(scores.guidance_weight, "g"),
    "pictures": lambda scores: f"{scores.pictures}",
    "prompt accuracy": lambda scores: _show(scores.prompt_accuracy, ".1%", scores.prompt_accuracy_error),
    "other judges": lambda scores: ", ".join(f"{share:.1%}" for share in list(scores.judges.values())[1:]),
    "attribute accuracy": lambda scores: _show(scores.attribute_accuracy, ".1%"),
    "CLIP": lambda scores: _show(scores.clip_similarity, ".3f"),
    "held-out CLIP": lambda scores: _show(scores.held_out_similarity, ".3f"),
    "FID": lambda scores: _show(scores.fid, ".3f", scores.fid_error),
    "attribute-matched FID": lambda scores: _show(scores.attribute_matched_fid, ".3f"),
    "1000 KID": lambda scores: _show(None if scores.kid is None else 1000 * scores.kid, ".2f"),
    "precision": lambda scores: _show(scores.precision, ".1%"),
    "recall": lambda scores: _show(scores.recall, ".1%"),
    "CMMD": lambda scores: _show(scores.cmmd, ".3f"),
    "distance to twin": lambda scores: _show(scores.twin_distance, ".2f"),
    "U-Net passes per success": lambda scores: _show(scores.passes_per_success, ".0f"),
    "CLIP passes": lambda scores: f"{scores.cost.clip_passes:.0f}",
    "seconds": lambda scores: f"{scores.cost.seconds:.2f}",
    "peak GiB": lambda scores: f"{scores.cost.peak_bytes / 2**30:.1f}",
}


def format_table(table: Sequence[Scores]) -> str:
    """A Markdown table with a row for each guidance weight."""
    return _join_cells([*COLUMNS], map(_to_cells, table))


def format_methods(tables: Mapping[str, Sequence[Scores]]) -> str:
    """A Markdown table with a row for each method and guidance weight."""
    rows = ([name, *_to_cells(scores)] for name, table in tables.items() for scores in table)
    return _join_cells(["method", *COLUMNS], rows)


def format_texts(texts: Mapping[str, Sequence[Scores]]) -> str:
    """A Markdown table with a row for each text and guidance weight: accuracy, also by attribute, and similarity."""
    rows = (
        [
            text.replace("|", r"\|"),
            _show(scores.guidance_weight, "g"),
            f"{scores.pictures}",
            f"{scores.prompt_accuracy:.0%}",
            ", ".join(f"{name} {share:.0%}" for name, share in scores.attributes.items()),
            _show(scores.clip_similarity, ".3f"),
        ]
        for text, table in texts.items()
        for scores in table
    )
    return _join_cells(["text", "weight", "pictures", "prompt accuracy", "by attribute", "CLIP"], rows)


def _to_cells(scores: Scores) -> list[str]:
    return [show(scores) for show in COLUMNS.values()]


def _join_cells(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
