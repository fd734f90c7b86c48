"""Distillation of a noise-aware CLIP from any CLIP: no captions, and no pictures but the diffusion model's own."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipward.diffusion.denoiser import add_noise
from clipward.errors import InputError, shorten
from clipward.lightning_modules.optim import OptimConfig, adamw
from clipward.lightning_modules.reproducible import Reproducible
from clipward.networks.clip import Clip, make_noise_aware, preprocess, save_folder
from clipward.networks.noise_level import with_noise_level
from clipward.networks.vocabulary import check_labels_of, find_labels, load_vocabulary

TEMPERATURE = 0.05  # of the softmax over a batch's similarities; the features of one domain lie close together
LOWEST, HIGHEST = 0.02, 0.98  # the noise levels to learn, as shares of the quarter circle from clean to pure noise


class NoisyClipModule(Reproducible):
    """Trains the image tower of a CLIP to say of (x_t, t) what the clean tower says of x0.

    The loss is 1 − cosine to the clean tower's features, and ``relational`` times the cross-entropy between the softmax
    of similarities to the other pictures of the batch, the clean tower's against the student's. The text tower is
    frozen, so the student answers every text that its teacher knows.

    The noise level is given by ᾱ, so the student serves any schedule. Training draws the angle φ of the level,
    ᾱ = cos²(φ·π/2), uniformly: a cosine schedule's t.

    Args:
        clip: the teacher, by the names that :meth:`clipward.networks.clip.Clip.load` takes. Its image tower is a ViT or
            a ResNet of open_clip.
        weights: the diffusion model whose own samples are learned from, where the data has no ``path``.
        save_dir: the open_clip folder that is written at the end of ``fit``; none is written without it.
        relational: weight of the relational term.
        shift: pictures are moved by up to this share of a side, at random.
        levels: φ at which validation compares student and teacher.
        zero_shot: questions to ask of validation pictures, as in :class:`clipward.lightning_modules.clip.ClipModule`:
            how often student and teacher give the same answer is logged, and how often the student is right where
            pictures have labels.
        optim: the optimiser and its schedule.
    """

    def __init__(
        self,
        clip: str,
        weights: str | None = None,
        save_dir: str | None = None,
        relational: float = 0.2,
        shift: float = 0.06,
        levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
        zero_shot: str | None = None,
        optim: OptimConfig = OptimConfig(),
    ) -> None:
        super().__init__()
        if not 0 <= relational < float("inf"):
            raise InputError(f"model.relational: got {shorten(relational)}, expected a finite number from 0 on")
        if not all(0 <= level <= 1 for level in levels):
            raise InputError(f"model.levels: got {shorten(levels)}, expected numbers from 0 to 1")
        if not 0 <= shift < 0.5:
            raise InputError(f"model.shift: got {shift}, expected 0 to below 0.5")
        self.clip, self.weights = clip, weights
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.relational, self.shift, self.levels, self.optim = relational, shift, levels, optim
        self.prompts = {} if zero_shot is None else load_vocabulary(zero_shot, "model.zero_shot")[1]
        self.student: Any = None

    def configure_model(self) -> None:
        if self.student is not None:
            return
        teacher = Clip.load(self.clip)
        if teacher.noise_aware:
            raise InputError(f"clip: got {self.clip}, which is noise-aware already; expected a CLIP of clean pictures")
        if not isinstance(getattr(teacher.model.visual, "conv1", None), torch.nn.Conv2d):
            raise InputError(f"clip: got {self.clip}, expected a CLIP whose image tower is open_clip's ViT or ResNet")
        if teacher.config is None:
            raise InputError(
                f"clip: got {self.clip}, expected a folder or a name of open_clip's, which know their sizes"
            )
        self._teacher = [teacher]  # in a list, so that it is no part of the module's state
        self.student = deepcopy(teacher.model).requires_grad_(False)
        make_noise_aware(self.student)
        self.student.visual.requires_grad_(True)

    @property
    def teacher(self) -> Clip:
        return self._teacher[0].to(self.device)

    def check_data(self, data: Any) -> None:
        """Raise :class:`InputError` where there are labels, but not those of ``zero_shot``."""
        if find_labels(data) is not None:
            check_labels_of(data, self.prompts, "model.zero_shot")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.save_dir is not None and self.save_dir.exists() and any(self.save_dir.iterdir()):
            raise InputError(f"model.save_dir: {self.save_dir} is not empty; choose another folder")

    def encode(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """(B, C, H, W), x_t, and (B,), ᾱ_t -> (B, D), the student's features, of unit length."""
        pixels = with_noise_level(preprocess(x, self.teacher.preprocess), alpha_bar)
        return F.normalize(self.student.encode_image(pixels).float(), dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image = move_at_random(batch["image"], self.shift)
        angle = LOWEST + (HIGHEST - LOWEST) * torch.rand(len(image), device=image.device)
        alpha_bar = alpha_bar_of(angle)
        with torch.no_grad():
            target = self.teacher.encode_image(image)
        found = self.encode(add_noise(image, torch.randn_like(image), alpha_bar), alpha_bar)
        cosine = (found * target).sum(dim=-1).mean()
        loss = 1 - cosine + self.relational * relational_loss(found, target)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/cosine", cosine)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image = batch["image"]
        target = self.teacher.encode_image(image)
        self._log_answers(target, target, batch, "clean")
        for level in self.levels:
            with isolate_rng():
                torch.manual_seed(batch_idx)
                noise = torch.randn(image.shape).to(image.device)
            alpha_bar = alpha_bar_of(torch.full((len(image),), level, device=image.device))
            found = self.encode(add_noise(image, noise, alpha_bar), alpha_bar)
            cosine = (found * target).sum(dim=-1).mean()
            self.log(f"val/cosine/{level:g}", cosine, batch_size=len(image), sync_dist=True)
            self._log_answers(found, target, batch, f"{level:g}")

    def _log_answers(self, found: Tensor, target: Tensor, batch: dict[str, Any], level: str) -> None:
        """How often the student answers as its teacher does, and as the labels say."""
        for column, (name, prompts) in enumerate(self.prompts.items()):
            answers = self.teacher.encode_text(list(prompts.values())).T
            said = (found @ answers).argmax(dim=1)
            agrees = said == (target @ answers).argmax(dim=1)
            self.log(f"val/agreement_{name}/{level}", agrees.float().mean(), batch_size=len(said), sync_dist=True)
            if "labels" in batch:
                labels = batch["labels"][:, column]
                known = int((labels >= 0).sum())
                share = (said == labels).float().sum() / max(known, 1)
                self.log(f"val/right_{name}/{level}", share, batch_size=known, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.student.visual.parameters(), self.optim, self.trainer.max_steps)

    def on_fit_end(self) -> None:
        if self.save_dir is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            save_folder(self.save_dir, self.student, self.teacher.config, self.teacher.preprocess)
            Clip.load(str(self.save_dir))


def alpha_bar_of(angle: Tensor) -> Tensor:
    """ᾱ = cos²(φ·π/2) of a noise level φ between 0, clean, and 1, pure noise."""
    return torch.cos(angle * math.pi / 2) ** 2


def relational_loss(found: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy between softmaxes of similarities to the other pictures of a batch, the target's against ours.

    Args:
        found: (B, D), of unit length.
        target: (B, D), of unit length, whose neighbours are to be kept.
    """
    if len(found) < 2:
        return found.sum() * 0
    own = torch.eye(len(found), dtype=torch.bool, device=found.device)
    ours = (found @ target.T / TEMPERATURE).masked_fill(own, -1e4)
    theirs = (target @ target.T / TEMPERATURE).masked_fill(own, -1e4)
    divergence = F.kl_div(ours.log_softmax(dim=1), theirs.log_softmax(dim=1), log_target=True, reduction="none")
    return divergence.masked_fill(own, 0).sum(dim=1).mean()


def move_at_random(image: Tensor, shift: float) -> Tensor:
    """(B, C, H, W), each picture moved by up to ``shift`` of a side in both directions; the border is repeated."""
    reach = round(shift * image.shape[-1])
    if reach == 0:
        return image
    height, width = image.shape[-2:]
    padded = F.pad(image, [reach] * 4, "replicate")
    corners = torch.randint(2 * reach + 1, (len(image), 2)).tolist()
    return torch.stack([each[:, y : y + height, x : x + width] for each, (y, x) in zip(padded, corners, strict=True)])
