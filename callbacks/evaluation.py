"""Scores what ``test`` draws: whether it obeys, whether it is still a picture, and what it cost."""

import json
import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from diffusion.classifier import Classifier, check_named, named
from diffusion.judge import ClipJudge, load_judge, obeys
from diffusion.losses import ClipSimilarity
from diffusion.weights import whole
from errors import InputError

Row = dict[str, Any]


class Evaluation(L.Callback):
    """Judges pictures, prints a table, and writes ``report.json`` and the curve over the weights, for TensorBoard too.

    A picture obeys where a judge sees every attribute that its text names.

    Args:
        judge: paths of one or more judges, none of which may guide: a classifier's safetensors, whose features also
            measure fidelity, or a CLIP's folder with ``judge.json``. The first one's verdict is the table's.
        save_dir: where ``report.json`` goes.
        overwrite: replace one that is there.
        data: what pictures are compared with, by its validation set; without one, fidelity is left out. Where its
            pictures have labels, in the order of the classifier's attributes, guided ones are compared with those that
            their texts are true of, in equal shares; unguided ones with all.
    """

    def __init__(
        self, judge: list[str], save_dir: str, overwrite: bool = False, data: L.LightningDataModule | None = None
    ) -> None:
        self.judges = {path: load_judge(Path(path)) for path in judge}
        self.report, self.data = Path(save_dir) / "report.json", data
        if self.report.exists() and not overwrite:
            raise InputError(f"save_dir: {self.report} exists; another folder, or --overwrite true, would do")
        self.rows: list[Row] = []

    @property
    def features(self) -> Classifier | None:
        return next((judge for judge in self.judges.values() if isinstance(judge, Classifier)), None)

    def check(self, texts: list[str]) -> None:
        """Raise where a judge knows nothing of a text."""
        for text in texts:
            for judge in self.judges.values():
                check_named(judge.vocabulary, text, "judge")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for judge in self.judges.values():
            if isinstance(judge, nn.Module):
                judge.to(pl_module.device)
        self.cost = Cost(pl_module)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.cost.start()

    @torch.no_grad()
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: dict[str, list],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        cost = self.cost.stop(len(batch["text"]))
        image = outputs["image"].float()
        seen = {path: obeys(judge, image, batch["text"]) for path, judge in self.judges.items()}
        other = next((judge.clip for judge in self.judges.values() if isinstance(judge, ClipJudge)), None)
        held_out = [None] * len(image) if other is None else ClipSimilarity(other, batch["text"])(image).tolist()
        features = None if self.features is None else self.features.features(image).cpu()
        for i in (i for i, valid in enumerate(batch["valid"]) if valid):
            self.rows.append(
                {
                    **{name: values[i] for name, values in batch.items()},
                    "seen": {path: answers[i] for path, answers in seen.items()},
                    "clip_similarity": outputs["clip_similarity"][i],
                    "held_out_similarity": held_out[i],
                    "features": None if features is None else features[i],
                    "cost": cost,
                }
            )
        self.provenance = outputs["provenance"]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cost.remove()
        rows = self.rows
        if torch.distributed.is_initialized():
            parts: list[list[Row]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, rows)
            rows = sorted((row for part in parts for row in part), key=lambda row: row["index"])
        if not trainer.is_global_zero:
            return
        reference = None if self.features is None or self.data is None else Reference(self.data, self.features)
        table = summarise(rows, reference)
        texts = [
            {"text": text, **entry}
            for text in dict.fromkeys(row["text"] for row in rows)
            for entry in summarise([row for row in rows if row["text"] == text])
        ]
        report = {"provenance": self.provenance, "table": table, "texts": texts}
        with whole(self.report) as aside:
            aside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if "fid" in table[-1] and len(table) > 1:
            drawn = curve({self.provenance["method"]: table})
            drawn.savefig(self.report.with_name("curve.png"), dpi=150)
            with SummaryWriter(str(self.report.parent)) as writer:
                writer.add_figure("obedience against fidelity", drawn)
        print(f"{markdown(table)}\n\n{markdown_of_texts(texts)}\n\nwritten to {self.report}")


def peak_bytes(device: torch.device) -> int:
    """The most memory: on a GPU since its statistics were reset, on a CPU of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Cost:
    """Counts what a batch takes: passes through the network and CLIP, seconds, and the peak of memory.

    On a GPU the peak is of the batch; on a CPU it is the process's so far.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.device, self.counts = module.device, defaultdict(float)
        critics = [clip.model.visual for clip in module.critics.loaded()]
        self.hooks = [module.unet.register_forward_hook(self._counted("network_forwards", "network_backwards"))]
        self.hooks += [critic.register_forward_hook(self._counted("critic_passes", None)) for critic in critics]

    def _counted(self, forward: str, backward: str | None) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.counts[forward] += len(output)
            if backward is not None and output.requires_grad:
                output.register_hook(lambda gradient: self._add(backward, len(gradient)))

        return hook

    def _add(self, name: str, count: int) -> None:
        self.counts[name] += count

    def start(self) -> None:
        self.counts = defaultdict(float, dict.fromkeys(("network_forwards", "network_backwards", "critic_passes"), 0.0))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.since = time.perf_counter()

    def stop(self, pictures: int) -> dict[str, float]:
        """A picture's share; the peak is not shared."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.counts["seconds"] = time.perf_counter() - self.since
        return {name: count / pictures for name, count in self.counts.items()} | {"peak_bytes": peak_bytes(self.device)}

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Reference:
    """Features of a validation set, and which of its pictures a text is true of."""

    def __init__(self, data: L.LightningDataModule, classifier: Classifier) -> None:
        data.setup("validate")
        device, features, labels = next(classifier.parameters()).device, [], []
        with torch.no_grad():
            for batch in data.val_dataloader():
                features.append(classifier.features(batch["image"].to(device)).cpu())
                labels.append(batch.get("labels"))
        self.features, self.vocabulary = torch.cat(features), classifier.vocabulary
        self.labels = None if labels[0] is None else torch.cat(labels)  # (N, attributes)

    def of(self, texts: list[str]) -> Tensor:
        """(M, C): as many pictures for each text as there are of the rarest; all pictures where there are no labels."""
        if self.labels is None:
            return self.features
        found = []
        for text in dict.fromkeys(texts):
            true = torch.ones(len(self.labels), dtype=torch.bool)
            for name, value in named(self.vocabulary, text).items():
                column = list(self.vocabulary).index(name)
                true &= self.labels[:, column] == list(self.vocabulary[name]).index(value)
            found.append(self.features[true])
        share = min(len(each) for each in found)
        if share < 2:
            return self.features
        return torch.cat([each[:share] for each in found])


class _Features(nn.Module):
    """What torchmetrics takes for pictures are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(made: Tensor, reference: Tensor) -> dict[str, float]:
    """FID and KID between two sets of features, (N, C) each; KID is the mean over 50 halves of the smaller set."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    half = max(2, min(len(made), len(reference)) // 2)
    alone = {"sync_on_compute": False}  # one process has gathered all
    fid = FrechetInceptionDistance(_Features(made.shape[1]), **alone)
    kid = KernelInceptionDistance(_Features(made.shape[1]), subsets=50, subset_size=half, **alone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for metric in (fid, kid):
            metric.set_dtype(torch.float64)
            metric.update(reference.double(), real=True)
            metric.update(made.double(), real=False)
        return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}


def summarise(rows: list[Row], reference: Reference | None = None) -> list[Row]:
    """One entry for each weight.

    ``obey`` is the share of pictures in which the first judge sees all that the text names and ``obey_std`` its spread
    over seeds; ``single`` is the share of all that is named; ``attributes`` by attribute; ``judges`` has ``obey`` by
    each judge. ``drift`` is the mean distance in features from the unguided picture of the same seed, where there is
    one. ``per_success`` is the passes through the network for each picture that obeys.
    """
    plain = {row["seed"]: row["features"] for row in rows if row["guidance_weight"] == 0}
    table = []
    for weight in sorted({row["guidance_weight"] for row in rows}):
        group = [row for row in rows if row["guidance_weight"] == weight]
        judges = {path: [all(row["seen"][path].values()) for row in group] for path in group[0]["seen"]}
        first = next(iter(judges))
        obey = _mean(judges[first])
        by_seed = [
            _mean([ok for ok, row in zip(judges[first], group, strict=True) if row["seed"] == seed])
            for seed in dict.fromkeys(row["seed"] for row in group)
        ]
        answers = [(name, right) for row in group for name, right in row["seen"][first].items()]
        names = dict.fromkeys(name for name, _ in answers)
        cost = {name: _mean([row["cost"][name] for row in group]) for name in group[0]["cost"]}
        cost["peak_bytes"] = max(row["cost"]["peak_bytes"] for row in group)
        passes = cost["network_forwards"] + cost["network_backwards"]
        entry = {
            "guidance_weight": weight,
            "pictures": len(group),
            "obey": obey,
            "obey_std": torch.tensor(by_seed).std().item() if len(by_seed) > 1 else None,
            "single": _mean([right for _, right in answers]),
            "attributes": {name: _mean([right for each, right in answers if each == name]) for name in names},
            "judges": {path: _mean(verdicts) for path, verdicts in judges.items()},
            "clip_similarity": _mean([row["clip_similarity"] for row in group]),
            "held_out_similarity": _mean([row["held_out_similarity"] for row in group]),
            "cost": cost,
            "per_success": passes / obey if obey else None,
        }
        if group[0]["features"] is not None:
            made = torch.stack([row["features"] for row in group])
            if reference is not None and len(made) > 1:
                like = reference.of([row["text"] for row in group]) if weight else reference.features
                entry |= {**distances(made, like), "reference": len(like)}
            if weight and plain:
                twins = torch.stack([plain[row["seed"]] for row in group])
                entry["drift"] = (made - twins).norm(dim=1).mean().item()
        table.append(entry)
    return table


def _mean(values: list[float | bool | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def curve(tables: dict[str, list[Row]]) -> Figure:
    """Obedience against fidelity: a line over its weights for each method, and a star for unguided pictures."""
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.add_subplot()
    for name, entries in tables.items():
        guided = [entry for entry in entries if entry["guidance_weight"]]
        axes.plot([entry["fid"] for entry in guided], [100 * entry["obey"] for entry in guided], "o-", label=name)
        for entry in guided:
            place = (entry["fid"], 100 * entry["obey"])
            axes.annotate(f"{entry['guidance_weight']:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
        for entry in entries:
            if not entry["guidance_weight"]:
                axes.plot(entry["fid"], 100 * entry["obey"], "k*", markersize=11, label="unguided")
    axes.set(xlabel="FID (lower is better)", ylabel="pictures that obey their whole text, %", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


COLUMNS = (  # heading, key, format
    ("weight", "guidance_weight", "g"),
    ("pictures", "pictures", "d"),
    ("obey", "obey", ".0%"),
    ("attributes", "single", ".0%"),
    ("CLIP", "clip_similarity", ".3f"),
    ("held-out CLIP", "held_out_similarity", ".3f"),
    ("FID", "fid", ".2f"),
    ("KID", "kid", ".3f"),
    ("drift", "drift", ".2f"),
    ("passes per success", "per_success", ".0f"),
)


def markdown(table: list[Row]) -> str:
    lines = [f"| {' | '.join(head for head, _, _ in COLUMNS)} | seconds |", "|---" * (len(COLUMNS) + 1) + "|"]
    for entry in table:
        cells = [_shown(entry.get(key), form) for _, key, form in COLUMNS]
        lines.append(f"| {' | '.join(cells)} | {entry['cost']['seconds']:.2f} |")
    return "\n".join(lines)


def markdown_of_texts(texts: list[Row]) -> str:
    lines = ["| text | weight | pictures | obey | by attribute | CLIP |", "|---|---|---|---|---|---|"]
    for row in texts:
        each = ", ".join(f"{name} {share:.0%}" for name, share in row["attributes"].items())
        lines.append(
            f"| {row['text']} | {row['guidance_weight']:g} | {row['pictures']} | {row['obey']:.0%} | {each} "
            f"| {_shown(row['clip_similarity'], '.3f')} |"
        )
    return "\n".join(lines)
