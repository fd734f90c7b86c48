"""What judges say of pictures: whether they obey, whether they are still pictures, and what they cost."""

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.classifier import Classifier, Vocabulary, check_named, named
from diffusion.clip import Clip
from diffusion.judge import ClipJudge, load_judge, obeys, seen
from diffusion.weights import whole
from errors import InputError, first_line

Row = dict[str, Any]


class Critics(Protocol):
    """The CLIPs that guide, where there are ``names`` of any."""

    names: list[str]

    def cosines(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B, C, H, W) and T texts -> (B, T)."""


class Judges:
    """Judges that look at the same pictures, none of which may guide.

    A picture obeys where a judge sees every attribute that its text names. An unguided picture, which has no text, is
    asked for all of them.

    Args:
        paths: a classifier's safetensors, or a CLIP's folder with ``judge.json``. The first one's verdict is the
            table's.
        texts: all that will be asked for.
        features: what measures fidelity: ``judge``, the classifier's features or, where there is none, the CLIP's;
            ``inception``, those of FID's own network, downloaded on first use; or a file with its weights.

    Raises:
        InputError: where a judge knows nothing of a text, or there is none.
    """

    def __init__(self, paths: Sequence[str], texts: Iterable[str], features: str = "judge") -> None:
        self.judges = {path: load_judge(Path(path)) for path in paths}
        self.texts = list(dict.fromkeys(filter(None, texts)))
        if not self.texts:
            raise InputError("text: none given; a sentence that the judge can look for would do")
        for text in self.texts:
            for judge in self.judges.values():
                check_named(judge.vocabulary, text, "judge")

        self._inception = None if features == "judge" else Inception(features)

    @property
    def clip(self) -> Clip | None:
        return next((judge.clip for judge in self.judges.values() if isinstance(judge, ClipJudge)), None)

    @property
    def vocabulary(self) -> Vocabulary:
        """The first judge's."""
        return next(iter(self.judges.values())).vocabulary

    def to(self, device: torch.device) -> None:
        for network in (*self.judges.values(), self.clip, self._inception):
            if isinstance(network, nn.Module | Clip):
                network.to(device)

    def features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, features), by which sets of pictures are compared."""
        if self._inception is not None:
            return self._inception(image)
        for judge in self.judges.values():
            if isinstance(judge, Classifier):
                return judge.features(image)
        features = self.clip.encode_image(image)
        return features * features.shape[1] ** 0.5  # about 1 each, as KID's kernel takes them to be

    @torch.no_grad()
    def rows(
        self, requests: Mapping[str, list], image: Tensor, cost: Mapping[str, float], critics: Critics
    ) -> list[Row]:
        """What is to be said of a batch: a row for each picture and text.

        Args:
            requests: a list for each of ``index``, ``text``, ``seed``, ``guidance_weight``, ``valid``; all that is not
                valid is left out.
            image: (B, C, H, W) in [-1, 1].
            cost: what one of them cost.
            critics: what guided, whose opinion is asked too.
        """
        image = image.float()
        self.to(image.device)
        saw = {path: seen(judge, image) for path, judge in self.judges.items()}
        features = self.features(image).cpu()
        guiding = critics.cosines(image, self.texts) if critics.names else None
        clip = self.clip
        held_out = None if clip is None else clip.encode_image(image) @ clip.encode_text(self.texts).T
        rows = []
        for i in (i for i, valid in enumerate(requests["valid"]) if valid):
            request = {name: values[i] for name, values in requests.items()}
            for text in [request["text"]] if request["text"] else self.texts:
                column = self.texts.index(text)
                verdicts = {p: obeys(judge.vocabulary, saw[p][i], text) for p, judge in self.judges.items()}
                rows.append(
                    {
                        **request,
                        "text": text,
                        "seen": verdicts,
                        "clip_similarity": None if guiding is None else guiding[i, column].item(),
                        "held_out_similarity": None if held_out is None else held_out[i, column].item(),
                        "features": features[i],
                        "cost": cost,
                    }
                )
        return rows


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


class Inception(nn.Module):
    """The network of FID (Heusel et al. 2017) as torch-fidelity has it, up to its last pooling.

    Args:
        path: of its weights, or ``inception`` to download them.

    Raises:
        InputError: where the package or the weights can't be had.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError("features: Inception needs the package torch-fidelity, which pip installs") from error
        file = None if path == "inception" else path
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
        except Exception as error:
            raise InputError(f"features: {path} gives no weights of Inception ({first_line(error)})") from error

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048)."""
        return self.network(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]


class Reference:
    """Features of pictures to compare with, and which of them a text is true of.

    Args:
        batches: with ``image``, and ``labels`` in the order of the judges' attributes where there are any.
        judges: whose features.
        device: on which they look.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], judges: Judges, device: torch.device) -> None:
        judges.to(device)
        features, labels = [], []
        with torch.no_grad():
            for batch in batches:
                features.append(judges.features(batch["image"].to(device)).cpu())
                labels.append(batch.get("labels"))
        self.features, self.vocabulary = torch.cat(features), judges.vocabulary
        self.labels = None if labels[0] is None else torch.cat(labels)  # (N, attributes)

    def of(self, texts: list[str]) -> Tensor:
        """(M, C): pictures that the texts are true of, as many as there are in the shares that the texts have.

        All pictures, where there are no labels or a text is true of fewer than two.
        """
        if self.labels is None:
            return self.features
        true = {}
        for text in dict.fromkeys(texts):
            true[text] = torch.ones(len(self.labels), dtype=torch.bool)
            for name, value in named(self.vocabulary, text).items():
                column = list(self.vocabulary).index(name)
                true[text] &= self.labels[:, column] == list(self.vocabulary[name]).index(value)
        found = self._in_shares(true, texts)
        return self.features if found is None else found

    def alike(self, features: Tensor) -> Tensor | None:
        """(M, C): pictures with the same attributes as those of ``features``, in the same shares, named or not.

        None, where there are no labels or too few pictures.
        """
        if self.labels is None or len(self.labels) <= self.features.shape[1]:
            return None
        shown = [tuple(row) for row in self._shown(features).tolist()]
        true = {each: (self.labels == torch.tensor(each)).all(dim=1) for each in dict.fromkeys(shown)}
        return self._in_shares(true, shown)

    def _shown(self, features: Tensor) -> Tensor:
        """(N, attributes): what linear probes of the features see."""
        padded = F.pad(features.double(), (0, 1), value=1)
        return torch.stack([(padded @ probe).argmax(dim=1) for probe in self._probes], dim=1)

    @cached_property
    def _probes(self) -> list[Tensor]:
        """(C + 1, values) for each attribute, fitted to these pictures by least squares."""
        padded = F.pad(self.features.double(), (0, 1), value=1)
        return [
            torch.linalg.lstsq(padded, F.one_hot(column, len(values)).double()).solution
            for column, values in zip(self.labels.T, self.vocabulary.values(), strict=True)
        ]

    def _in_shares(self, true: Mapping[Any, Tensor], asked: Sequence[Any]) -> Tensor | None:
        """As many pictures as there are in the shares of what is asked; None where one is true of fewer than two."""
        if min(mask.sum() for mask in true.values()) < 2:
            return None
        count = Counter(asked)
        times = min(mask.sum().item() / count[each] for each, mask in true.items())
        return torch.cat([self.features[mask][: round(times * count[each])] for each, mask in true.items()])


class _Features(nn.Module):
    """What torchmetrics takes for pictures are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(made: Tensor, reference: Tensor) -> float:
    """FID between two sets of features, (N, C) each (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # one process has gathered all
    return _distance(FrechetInceptionDistance(_Features(made.shape[1]), sync_on_compute=False), made, reference)


def kernel(made: Tensor, reference: Tensor) -> float:
    """KID between two sets of features, (N, C) each: the mean over 50 halves of the smaller (Bińkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    half = max(2, min(len(made), len(reference)) // 2)
    metric = KernelInceptionDistance(_Features(made.shape[1]), subsets=50, subset_size=half, sync_on_compute=False)
    return _distance(metric, made, reference)


def _distance(metric: Any, made: Tensor, reference: Tensor) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metric.set_dtype(torch.float64)
        metric.update(reference.double(), real=True)
        metric.update(made.double(), real=False)
        found = metric.compute()
    return (found[0] if isinstance(found, tuple) else found).item()


def jackknife(statistic: Callable[[Tensor], float], values: Tensor, group: Sequence[int]) -> float | None:
    """The standard error of a statistic of (N, …) values, by leaving out one group of them at a time."""
    groups = list(dict.fromkeys(group))
    if len(groups) < 2:
        return None
    parts = [values[torch.tensor([each != left_out for each in group])] for left_out in groups]
    if min(map(len, parts)) < 2:
        return None
    found = torch.tensor([statistic(part) for part in parts], dtype=torch.float64)
    return ((len(groups) - 1) * found.var(correction=0)).sqrt().item()


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
