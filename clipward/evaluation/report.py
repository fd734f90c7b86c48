"""What was said of pictures, on disk and as tables: an entry for each weight, and the curve over the weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from clipward.evaluation.judges import Row
from clipward.evaluation.metrics import frechet, jackknife, kernel
from clipward.evaluation.reference import Reference
from clipward.files import whole


def save_rows(path: Path, rows: list[Row]) -> None:
    """Write what was said of each picture as parquet, whole or not at all."""
    from datasets import Dataset

    with whole(path) as aside:
        Dataset.from_list([{**row, "features": row["features"].tolist()} for row in rows]).to_parquet(aside)


def load_rows(path: Path) -> list[Row]:
    """Read what :func:`save_rows` wrote."""
    from datasets import load_dataset

    rows = list(load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    for row in rows:
        row["features"] = torch.tensor(row["features"])
        # the file has every attribute in every row, and None where the text doesn't name it
        row["seen"] = {judge: {n: v for n, v in saw.items() if v is not None} for judge, saw in row["seen"].items()}
    return rows


def summarise(rows: list[Row], reference: Reference | None = None, twins: Sequence[Row] = ()) -> list[Row]:
    """One entry for each weight of ``rows``; ``twins`` are unguided pictures of their seeds that are told of elsewhere.

    ``obey`` is the share of pictures in which the first judge sees all that the text names; ``obey_std`` its spread
    over seeds and ``obey_error`` its standard error; ``single`` is the share of all that is named; ``attributes`` by
    attribute; ``judges`` has ``obey`` by each judge. ``fid`` and ``kid`` compare features: of guided pictures with
    those that their texts are true of, of unguided ones with all; ``fid_error`` is a standard error, known where there
    are more pictures than features. ``fid_alike`` compares with those that show the same attributes, named or not: what
    it is less by is leakage, what pictures show that their texts don't ask for. ``drift`` is the mean distance in
    features from the unguided picture of the same seed, where there is one. ``per_success`` is the passes through the
    network for each picture that obeys.
    """
    plain = {row["seed"]: row["features"] for row in (*rows, *twins) if row["guidance_weight"] == 0}
    table = []
    for weight in sorted({row["guidance_weight"] for row in rows}):
        group = [row for row in rows if row["guidance_weight"] == weight]
        pictures = list({row["index"]: row for row in group}.values())  # an unguided one has a row for each text
        judges = {path: [all(row["seen"][path].values()) for row in group] for path in group[0]["seen"]}
        first = next(iter(judges))
        obey = _mean(judges[first])
        seeds = dict.fromkeys(row["seed"] for row in group)
        by_seed = [
            _mean([ok for ok, row in zip(judges[first], group, strict=True) if row["seed"] == seed]) for seed in seeds
        ]
        spread = torch.tensor(by_seed).std().item() if len(by_seed) > 1 else None
        answers = [(name, right) for row in group for name, right in row["seen"][first].items()]
        names = dict.fromkeys(name for name, _ in answers)
        cost = {name: _mean([row["cost"][name] for row in pictures]) for name in group[0]["cost"]}
        cost["peak_bytes"] = max(row["cost"]["peak_bytes"] for row in pictures)
        passes = cost["network_forwards"] + cost["network_backwards"]
        entry = {
            "guidance_weight": weight,
            "pictures": len(pictures),
            "obey": obey,
            "obey_std": spread,
            "obey_error": None if spread is None else spread / len(by_seed) ** 0.5,
            "single": _mean([right for _, right in answers]),
            "attributes": {name: _mean([right for each, right in answers if each == name]) for name in names},
            "judges": {path: _mean(verdicts) for path, verdicts in judges.items()},
            "clip_similarity": _mean([row["clip_similarity"] for row in group]),
            "held_out_similarity": _mean([row["held_out_similarity"] for row in group]),
            "cost": cost,
            "per_success": passes / obey if obey else None,
        }
        made = torch.stack([row["features"] for row in pictures])
        if reference is not None and len(made) > 1:
            like = reference.of([row["text"] for row in group]) if weight else reference.features
            entry["fid"], entry["kid"], entry["reference"] = frechet(made, like), kernel(made, like), len(like)
            alike = reference.alike(made)
            if alike is not None:
                entry["fid_alike"] = frechet(made, alike)
            if len(made) > made.shape[1]:  # else no covariance has full rank, and that of a part less
                folds = [row["seed"] % 16 for row in pictures]
                entry["fid_error"] = jackknife(lambda part, like=like: frechet(part, like), made, folds)
        if weight and plain:
            twins = torch.stack([plain[row["seed"]] for row in pictures])
            entry["drift"] = (made - twins).norm(dim=1).mean().item()
        table.append(entry)
    return table


def _mean(values: list[float | bool | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def curve(tables: dict[str, list[Row]]) -> Figure:
    """Obedience against fidelity: a line over its weights for each method, and a star for what nothing guides."""
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.add_subplot()
    for number, (name, entries) in enumerate(tables.items()):
        points = [(entry["fid"], 100 * entry["obey"], entry["guidance_weight"]) for entry in entries if "fid" in entry]
        guided = [point for point in points if point[2]]
        if guided:
            axes.plot([fid for fid, _, _ in guided], [obey for _, obey, _ in guided], "o-", label=name)
        for fid, obey, weight in guided:
            beside = (5, 4 if number % 2 else -10)  # above one line, below the next
            axes.annotate(f"{weight:g}", (fid, obey), textcoords="offset points", xytext=beside, fontsize=8)
        for fid, obey, _ in (point for point in points if not point[2]):
            axes.plot(
                fid, obey, "*", color="black" if guided else None, markersize=11, label="unguided" if guided else name
            )
    axes.set(xlabel="FID (lower is better)", ylabel="pictures that obey their whole text, %", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def _shown(value: float | None, form: str, error: float | None = None) -> str:
    if value is None:
        return ""
    return format(value, form) + ("" if error is None else f" ± {format(error, form)}")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "weight": lambda entry: _shown(entry["guidance_weight"], "g"),
    "pictures": lambda entry: f"{entry['pictures']}",
    "obey": lambda entry: _shown(entry["obey"], ".1%", entry["obey_error"]),
    "other judges": lambda entry: ", ".join(f"{share:.1%}" for share in list(entry["judges"].values())[1:]),
    "attributes": lambda entry: _shown(entry["single"], ".1%"),
    "CLIP": lambda entry: _shown(entry["clip_similarity"], ".3f"),
    "held-out CLIP": lambda entry: _shown(entry["held_out_similarity"], ".3f"),
    "FID": lambda entry: _shown(entry.get("fid"), ".3f", entry.get("fid_error")),
    "FID, alike": lambda entry: _shown(entry.get("fid_alike"), ".3f"),
    "1000 KID": lambda entry: _shown(1000 * entry["kid"] if "kid" in entry else None, ".2f"),
    "drift": lambda entry: _shown(entry.get("drift"), ".2f"),
    "passes per success": lambda entry: _shown(entry["per_success"], ".0f"),
    "CLIP passes": lambda entry: f"{entry['cost']['critic_passes']:.0f}",
    "seconds": lambda entry: f"{entry['cost']['seconds']:.2f}",
    "peak GiB": lambda entry: f"{entry['cost']['peak_bytes'] / 2**30:.1f}",
}


def markdown(table: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(entry) for cell in COLUMNS.values())} |" for entry in table)])


def markdown_of_texts(texts: list[Row]) -> str:
    lines = ["| text | weight | pictures | obey | by attribute | CLIP |", "|---|---|---|---|---|---|"]
    for row in texts:
        each = ", ".join(f"{name} {share:.0%}" for name, share in row["attributes"].items())
        lines.append(
            f"| {row['text']} | {row['guidance_weight']:g} | {row['pictures']} | {row['obey']:.0%} | {each} "
            f"| {_shown(row['clip_similarity'], '.3f')} |"
        )
    return "\n".join(lines)
