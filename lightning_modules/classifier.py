"""Training of an attribute classifier: one that judges guided pictures, or a noise-aware one that guides."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipward.diffusion.schedule import Schedule, ScheduleName
from clipward.errors import InputError, list_names
from clipward.lightning_modules.degrade import check_noise, degrade, diffuse
from clipward.lightning_modules.optim import OptimConfig, adamw
from clipward.lightning_modules.reproducible import Reproducible
from clipward.networks.classifier import Classifier, check_width, save_classifier
from clipward.networks.vocabulary import check_labels_of, find_labels, load_vocabulary


class ClassifierModule(Reproducible):
    """Learns the labels of pictures.

    Args:
        vocabulary: the attributes, in the order of the labels: a YAML file of them, or the name of one that ships, such
            as ``faces``; see :func:`clipward.networks.vocabulary.load_vocabulary`.
        width: of the network.
        save_path: the safetensors file that is written at the end of ``fit``; none is written without it.
        optim: the optimiser and its schedule.
        max_noise: as in :class:`clipward.lightning_modules.clip.ClipModule`.
        blur: likewise.
        noise_aware: learn from x_t at a random t, for classifier guidance (Dhariwal & Nichol 2021).
        schedule: of that t.
    """

    def __init__(
        self,
        vocabulary: str,
        width: int = 32,
        save_path: str | None = None,
        optim: OptimConfig = OptimConfig(),
        max_noise: float = 0.0,
        blur: bool = False,
        noise_aware: bool = False,
        schedule: ScheduleName = "cosine",
    ) -> None:
        super().__init__()
        check_width(width)
        check_noise(max_noise)
        self.network = Classifier(load_vocabulary(vocabulary, "model.vocabulary")[0], width, noise_aware)
        self.schedule = Schedule.from_name(schedule)
        self.save_path = None if save_path is None else Path(save_path)
        self.optim = optim
        self.max_noise, self.blur = max_noise, blur

    def check_data(self, data: Any) -> None:
        """Raise :class:`InputError` where the labels are not those of the vocabulary."""
        check_labels_of(data, self.network.vocabulary, "model.vocabulary")
        further = list(find_labels(data) or {})[len(self.network.vocabulary) :]
        if further:
            raise InputError(f"data.labels: got {list_names(further)}, which model.vocabulary has not; leave it out")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.save_path is not None and self.save_path.exists():
            raise InputError(f"model.save_path: {self.save_path} exists; choose another name")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, alpha_bar = degrade(batch["image"], self.max_noise, self.blur), 1.0
        if self.network.noise_aware:
            image, alpha_bar = diffuse(image, self.schedule)
        loss = self.network.loss(image, batch["labels"], alpha_bar)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits, labels = self.network(batch["image"]), batch["labels"]
        said = torch.stack([logits[name].argmax(dim=1) for name in self.network.vocabulary], dim=1)
        known, right = labels >= 0, said == labels  # (B, attributes)
        for column, name in enumerate(self.network.vocabulary):
            self._log_share(f"val/accuracy_{name}", right[:, column], known[:, column])
        self._log_share("val/accuracy_all", (right | ~known).all(dim=1), known.any(dim=1), prog_bar=True)

    def _log_share(self, name: str, right: Tensor, known: Tensor, **options: Any) -> None:
        count = int(known.sum())  # every process logs, since the sum over processes waits for all
        share = (right & known).float().sum() / max(count, 1)
        self.log(name, share, batch_size=count, sync_dist=True, **options)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.parameters(), self.optim, self.trainer.max_steps)

    def on_fit_end(self) -> None:
        if self.save_path is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            save_classifier(self.save_path, self.network)
