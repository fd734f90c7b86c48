"""Contrastive training of a CLIP of any size on pictures and captions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipward.diffusion.schedule import Schedule, ScheduleName
from clipward.errors import InputError, shorten
from clipward.lightning_modules.degrade import check_noise, degrade, diffuse
from clipward.lightning_modules.optim import OptimConfig, adamw
from clipward.lightning_modules.reproducible import Reproducible
from clipward.networks.clip import (
    OPENAI_PREPROCESSING,
    Clip,
    check_new_model,
    contrastive_loss,
    count_tokens,
    make_noise_aware,
    new_model,
    new_tokenizer,
    preprocess,
    save_folder,
)
from clipward.networks.noise_level import NoiseConditionedConv, with_noise_level
from clipward.networks.vocabulary import check_labels_of, load_vocabulary


class ClipModule(Reproducible):
    """Trains an open_clip model (Radford et al. 2021) and writes it as an open_clip folder.

    Args:
        embed_dim: length of the features that pictures and texts share.
        vision: open_clip's ``vision_cfg``: ``image_size``, ``layers``, ``width``, …
        text: open_clip's ``text_cfg``: ``context_length``, ``width``, ``heads``, ``layers``, …
        clip: a CLIP to start from, as :meth:`clipward.networks.clip.Clip.load` names it; a folder, for its sizes are
            those of the three arguments above, which give way to it.
        noise_aware: the image tower sees (x_t, t) at a random t, as GLIDE's did (Nichol et al. 2022).
        schedule: of that t.
        save_dir: the folder that is written at the end of ``fit``; none is written without it.
        optim: the optimiser and its schedule.
        max_noise: pictures get Gaussian noise of a standard deviation up to this (pictures span [-1, 1]).
        blur: whether half of the pictures are blurred by up to a factor of four. With noise, it makes a CLIP that
            can read the half-denoised pictures that guidance shows it.
        zero_shot: what to ask of validation pictures that have labels: a YAML file of attributes, or the name of one
            that ships, such as ``faces``; see :func:`clipward.networks.vocabulary.load_vocabulary`. How often the
            answer is right is logged.
        levels: t at which a picture and its caption are looked for, too, under noise.
    """

    def __init__(
        self,
        embed_dim: int = 128,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        clip: str | None = None,
        noise_aware: bool = False,
        schedule: ScheduleName = "cosine",
        save_dir: str | None = None,
        optim: OptimConfig = OptimConfig(),
        max_noise: float = 0.0,
        blur: bool = False,
        zero_shot: str | None = None,
        levels: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_noise(max_noise)
        self.model_cfg = {"embed_dim": embed_dim, "vision_cfg": vision or {}, "text_cfg": text or {}}
        self.preprocess_cfg = {"size": self.model_cfg["vision_cfg"].get("image_size", 224), **OPENAI_PREPROCESSING}
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.optim = optim
        self.max_noise, self.blur = max_noise, blur
        self.zero_shot = {} if zero_shot is None else load_vocabulary(zero_shot, "model.zero_shot")[1]
        self.clip, self.noise_aware = clip, noise_aware
        self.schedule, self.levels = Schedule.from_name(schedule), levels or []
        most = len(self.schedule) - 1
        if not all(0 <= t <= most for t in self.levels):
            raise InputError(f"model.levels: got {shorten(self.levels)}, expected whole numbers from 0 to {most}")
        if clip is None:
            check_new_model(self.model_cfg)
        self.model: torch.nn.Module | None = None
        self._has_cut = False  # a caption

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.clip is None:
            self.model = new_model(self.model_cfg)
            self.tokenizer = new_tokenizer(self.model_cfg["text_cfg"].get("context_length", 77))
        else:
            start = Clip.load(self.clip)
            self.model, self.tokenizer, self.preprocess_cfg = start.model, start.tokenizer, start.preprocess
            self.model_cfg = start.config
            self.model.requires_grad_(True).train()
        if self.noise_aware and not isinstance(self.model.visual.conv1, NoiseConditionedConv):
            make_noise_aware(self.model)

    def check_data(self, data: Any) -> None:
        """Raise :class:`InputError` where there are no captions, or the labels are not those of ``zero_shot``."""
        if not getattr(data, "has_captions", True):
            raise InputError("data.caption_column: got none, expected the column of the captions that the CLIP learns")
        check_labels_of(data, self.zero_shot, "model.zero_shot")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.save_dir is not None and self.save_dir.exists() and any(self.save_dir.iterdir()):
            raise InputError(f"model.save_dir: {self.save_dir} is not empty; choose another folder")
        self.contrastive_loss = contrastive_loss(self.global_rank, self.trainer.world_size)

    def features(self, batch: dict[str, Any], image: Tensor, alpha_bar: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        self._check_lengths(batch["caption"])
        tokens = self.tokenizer(batch["caption"]).to(self.device)
        pixels = preprocess(image, self.preprocess_cfg)
        if self.noise_aware:
            pixels = with_noise_level(pixels, alpha_bar)
        image_features = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        return image_features, F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def _check_lengths(self, captions: list[str]) -> None:
        """Warn of the first caption that is cut, as CLIPs are trained with what fits of a long one."""
        if self._has_cut:  # tokens take time to count
            return
        context = self.tokenizer.context_length
        long = next((each for each in captions if count_tokens(self.tokenizer, each) > context), None)
        if long is not None:
            self._has_cut = True
            rank_zero_warn(
                f"data.caption_column: {shorten(long)}, and perhaps others, is cut to the CLIP's {context} tokens"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, alpha_bar = degrade(batch["image"], self.max_noise, self.blur), 1.0
        if self.noise_aware:
            image, alpha_bar = diffuse(image, self.schedule)
        image_features, text_features = self.features(batch, image, alpha_bar)
        scale = self.model.logit_scale.exp().clamp(max=100)
        loss = self.contrastive_loss(image_features, text_features, scale)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/logit_scale", scale)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image_features, text_features = self.features(batch, batch["image"])
        self._log_answers(image_features, text_features, batch, "")
        for t in self.levels:
            with isolate_rng():
                torch.manual_seed(t)
                image, alpha_bar = diffuse(batch["image"], self.schedule, [t] * len(batch["image"]))
            image_features, _ = self.features(batch, image, alpha_bar)
            self._log_answers(image_features, text_features, batch, f"_t{t}")

    def _log_answers(self, image_features: Tensor, text_features: Tensor, batch: dict[str, Any], suffix: str) -> None:
        """How often a picture finds its own caption in the batch, and the right answer of each attribute."""
        count = len(image_features)
        found = (image_features @ text_features.T).argmax(dim=1) == torch.arange(count, device=self.device)
        self.log(f"val/retrieval{suffix}", found.float().mean(), batch_size=count, sync_dist=True)
        for column, (name, prompts) in enumerate(self.zero_shot.items()):
            answers = F.normalize(
                self.model.encode_text(self.tokenizer(list(prompts.values())).to(self.device)).float(), dim=-1
            )
            labels = batch["labels"][:, column]
            right, known = (image_features @ answers.T).argmax(dim=1) == labels, int((labels >= 0).sum())
            share = right.float().sum() / max(known, 1)
            self.log(f"val/zero_shot_{name}{suffix}", share, batch_size=known, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.model.parameters(), self.optim, self.trainer.max_steps)

    def on_fit_end(self) -> None:
        if self.save_dir is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            save_folder(self.save_dir, self.model, self.model_cfg, self.preprocess_cfg)
            Clip.load(str(self.save_dir))
