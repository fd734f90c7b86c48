"""The diffusion model: training, fine-tuning and guided sampling."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clipward.diffusion.bound import variational_bound
from clipward.diffusion.denoiser import Parametrisation, add_noise, to_x0, training_target
from clipward.diffusion.sampling import State
from clipward.editing import Edit
from clipward.errors import InputError, shorten
from clipward.files import state_hash
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import AUTO, METHODS
from clipward.guidance.models import REASONS, GuidanceConfig, GuidanceModels, choose_method
from clipward.lightning_modules.ema import EMA
from clipward.lightning_modules.optim import OptimConfig, adamw
from clipward.lightning_modules.reproducible import Reproducible
from clipward.networks.channels import check_shown
from clipward.networks.lean import arrange_weights
from clipward.networks.sharding import fill, full_state, own_parameters, shard
from clipward.networks.unet import UNet
from clipward.sampler import Sampler, Watch
from clipward.sampling_config import SamplingConfig
from clipward.values import ClassLabel
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.load import load_weights, save_weights

NO_CLASSES = "data.classes: got none, expected what the classes are, since the model has num_classes"


@dataclass(frozen=True)
class TrainingConfig(OptimConfig):
    """The optimiser of a diffusion model, its averaged weights, and how its loss weighs noise levels.

    Args:
        learning_rate: as in :class:`OptimConfig`.
        weight_decay: as in :class:`OptimConfig`.
        warmup_steps: as in :class:`OptimConfig`.
        cooldown_steps: as in :class:`OptimConfig`.
        ema_decay: of the averaged weights, which validation, sampling and prediction use; from 0 to below 1.
        label_dropout: the share of pictures that train the null class in place of their own, where ``unet.num_classes``
            is given (Ho & Salimans 2022, Alg. 1, who use 0.1 to 0.2).
        min_snr_gamma: weigh the loss of x0 at each level by min(SNR, γ), SNR = ᾱ/(1−ᾱ) (Hang et al. 2023, who use 5),
            which needs fewer pictures; by default all levels weigh the same in the network's own parametrisation.
    """

    ema_decay: float = 0.9999
    min_snr_gamma: float | None = None
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"optim.ema_decay: got {self.ema_decay}, expected 0 to below 1")
        if not 0 <= self.label_dropout <= 1:
            raise InputError(f"optim.label_dropout: got {self.label_dropout}, expected 0 to 1")
        gamma = self.min_snr_gamma
        if gamma is not None and not 0 < gamma < float("inf"):
            raise InputError(f"optim.min_snr_gamma: got {gamma}, expected a finite number above 0")


@runtime_checkable
class HasRequests(Protocol):
    """Data of ``predict`` and ``test``."""

    def guiding_texts(self) -> Iterator[str]:
        """The texts of all requests that are guided, each at least once."""
        ...

    def all_texts(self) -> Iterator[str]:
        """The texts of all requests, each at least once, whatever their weight."""
        ...

    def has_texts(self) -> bool:
        """Whether a picture is compared with a text, or with a picture in its place, whatever its weight."""
        ...

    def list_kinds(self) -> list[Edit | None]: ...

    def list_labels(self) -> list[ClassLabel]: ...


@runtime_checkable
class HasPictures(Protocol):
    """Data of pictures: their height and width in pixels, one number or a pair, and their channels."""

    size: int | Sequence[int]
    channels: int


@runtime_checkable
class HasClasses(Protocol):
    """Data that may be of classes."""

    class_names: list[str] | None


class DDPMModule(Reproducible):
    """A denoising diffusion model (Ho et al. 2020), sampled under the guidance of a CLIP.

    Beside what all training logs, it logs ``train/loss_t1`` to ``train/loss_t4``, the mean losses of the quarters of t
    since the last log (the first is nearest to the picture), and ``train/ema_decay``.

    Args:
        network: the U-Net, the noise schedule and what the network puts out.
        guidance: which models guide, and what a text is compared with.
        sampling: how pictures are made.
        optim: the optimiser, its schedule and the averaged weights.
        weights: a file or folder to start from, or the name of a diffusers model on the hub; see
            :func:`clipward.weights.load.load_weights`. They say what network they are for, and take the place of
            ``network``.
        use_ema: take the averaged weights of a file that also has those that train.
        default_weights: what ``predict`` and ``test`` start from where neither ``weights`` nor ``ckpt_path`` is given;
            ``fit`` ignores them.
        checkpoint_activations: recompute activations of the U-Net and of CLIP in the backward pass instead of keeping
            them: a third more time and a fraction of the memory.
        compile: run the U-Net and the image towers of the CLIPs by ``torch.compile``. The first passes take a minute or
            more; the step's numbers are tensors, so that nothing is compiled again from step to step.
        save_path: safetensors to write at the end of ``fit``: the averaged weights in half precision, and what network
            they are for.
    """

    can_shard = True

    def __init__(
        self,
        network: Architecture = Architecture(),
        guidance: GuidanceConfig = GuidanceConfig(),
        sampling: SamplingConfig = SamplingConfig(),
        optim: TrainingConfig = TrainingConfig(),
        weights: str | None = None,
        use_ema: bool = True,
        default_weights: str | None = None,
        checkpoint_activations: bool = False,
        compile: bool = False,
        save_path: str | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.sampling, self.optim = network, sampling, optim
        self.models = GuidanceModels(guidance, checkpoint_activations, compile)
        self.weights_path, self.default_weights, self.use_ema = weights, default_weights, use_ema
        self.checkpoint_activations, self.compiled = checkpoint_activations, compile
        self.save_path = None if save_path is None else Path(save_path)
        self.unet: UNet | None = None
        self.ema: EMA | None = None
        self.trained = False  # whether the network has weights from anywhere but chance
        self._provenance: dict[str, Any] | None = None
        self.watchers: list[Watch] = []  # called after each step of predict and test
        self._quarters: Tensor | None = None  # (2, 4): sums of the losses in each quarter of t, and how many they are

    def configure_model(self) -> None:
        if self.unet is not None:
            return
        source = self.weights_path
        if (
            source is None
            and self._trainer is not None
            and not self.trainer.training
            and self.trainer.ckpt_path is None
        ):
            source = self.default_weights
        weights = None if source is None else load_weights(source, self.use_ema)
        if weights is not None:
            self.architecture, self.weights_path = weights.architecture, source
        self._take_class_names()
        self.unet = UNet(self.architecture.unet)
        self.unet.checkpointing = self.checkpoint_activations
        if weights is not None:
            weights.into(self.unet)
            self.trained = True
        if self.sharded:
            shard(self.unet, self.unet.blocks(), self.device_mesh["data_parallel"])
        if self.compiled:
            self.unet.compile()
        if self._trainer is None or self.trainer.training:  # else the network holds the averages, and nothing changes
            self.ema = EMA(self.unet, self.optim.ema_decay)
        any_process = self._any_process if self.sharded else None
        self.sampler = Sampler(self.unet, self.architecture, self.models, self.sampling, self.averaged, any_process)
        self.schedule = self.sampler.schedule
        if self._trainer is not None and (self.trainer.predicting or self.trainer.testing):
            data = self.trainer.datamodule
            known = isinstance(data, HasRequests)
            self.sampler.check(data.list_kinds() if known else [None], data.list_labels() if known else [None])
            check_shown(self.architecture.unet.image_channels)
        else:
            self.sampler.make_update()  # which the weights may ask for in vain

    def _take_class_names(self) -> None:
        """Record the names of the data's classes, which the weights are trained on."""
        data = None if self._trainer is None or not self.trainer.training else self.trainer.datamodule
        names = data.class_names if isinstance(data, HasClasses) else None
        if names is not None and self.architecture.unet.num_classes is not None:
            self.architecture = replace(self.architecture, class_names=tuple(names))

    def averaged(self) -> AbstractContextManager[None]:
        """A context within which the network has the averaged weights."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def average(self) -> dict[str, Tensor]:
        """The averaged weights in float32, with all their parts in every process."""
        return full_state(own_parameters(self.unet) if self.ema is None else self.ema.average)

    # training

    def loss(
        self, x0: Tensor, t: Tensor, eps: Tensor, gamma: float | None = None, label: Tensor | None = None
    ) -> Tensor:
        """The mean of :meth:`losses`."""
        return self.losses(x0, t, eps, gamma, label).mean()

    def losses(
        self, x0: Tensor, t: Tensor, eps: Tensor, gamma: float | None = None, label: Tensor | None = None
    ) -> Tensor:
        """(B,): L_simple (Ho et al. 2020, eq. 14) in the network's own parametrisation, averaged over each picture.

        A network that learns its variance has 0.001·L_vlb added (Nichol & Dhariwal 2021, eq. 16).

        Args:
            x0: (B, C, H, W) in [-1, 1].
            t: (B,).
            eps: (B, C, H, W), the noise of x_t.
            gamma: of the min-SNR weights, see :class:`TrainingConfig`; None weighs all levels the same.
            label: (B,) classes, −1 for any, for a network of classes.
        """
        architecture = self.architecture
        alpha_bar = self.schedule.alpha_bar.to(torch.float32).to(x0.device)[t][:, None, None, None]
        x = add_noise(x0, eps, alpha_bar)
        output, *share = self.unet(x, t, label).float().split(x0.shape[1], dim=1)
        squares = (output - training_target(x0, eps, alpha_bar, architecture.parametrisation)) ** 2
        if gamma is not None:
            squares = min_snr_weight(alpha_bar, gamma, architecture.parametrisation) * squares
        losses = squares.flatten(1).mean(dim=1)
        if architecture.var_type == "learned_range":
            predicted = to_x0(output, x, alpha_bar, architecture.parametrisation)
            bound = variational_bound(x0, x, predicted, *share, t, self.schedule)
            losses = losses + 0.001 * len(self.schedule) * bound
        return losses

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x0 = batch["image"]
        t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        eps, label = torch.randn_like(x0), self._label(batch)
        if label is not None and self.architecture.unet.null_class:
            label = torch.where(torch.rand(len(x0), device=x0.device) < self.optim.label_dropout, -1, label)
        losses = self.losses(x0, t, eps, self.optim.min_snr_gamma, label)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True)
        self._add_to_quarters(t, losses.detach())
        return loss

    def _label(self, batch: dict[str, Any]) -> Tensor | None:
        """The classes of a batch, (B,), for a network of classes."""
        if self.architecture.unet.num_classes is None:
            return None
        if "class_label" not in batch:
            raise InputError(NO_CLASSES)
        return batch["class_label"]

    def _add_to_quarters(self, t: Tensor, losses: Tensor) -> None:
        """Sum the losses in each quarter of t, of which the first is nearest to the picture."""
        quarters = t * 4 // len(self.schedule)
        sums = [losses.new_zeros(4).index_add_(0, quarters, each) for each in (losses, torch.ones_like(losses))]
        self._quarters = torch.stack(sums) if self._quarters is None else self._quarters + torch.stack(sums)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x0 = batch["image"]
        fixed = torch.Generator().manual_seed(batch_idx)
        t = torch.randint(len(self.schedule), (len(x0),), generator=fixed).to(x0.device)
        eps = torch.randn(x0.shape, generator=fixed).to(x0.device)
        with self.averaged():
            loss = self.loss(x0, t, eps, label=self._label(batch))
        self.log("val/loss", loss, batch_size=len(x0), prog_bar=True, sync_dist=True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_data()
        if self.save_path is not None and self.save_path.exists():
            raise InputError(f"model.save_path: {self.save_path} exists; choose another name")

    def on_validation_start(self) -> None:
        self._check_data()

    def _check_data(self) -> None:
        """Raise :class:`InputError` where the pictures are not of the size and the channels of the model's."""
        data, channels = self.trainer.datamodule, self.architecture.unet.image_channels
        if not isinstance(data, HasPictures):
            return
        given, wanted = (
            [size, size] if isinstance(size, int) else list(size) for size in (data.size, self.architecture.size)
        )
        if given != wanted:
            show = [size[0] if size[0] == size[1] else size for size in (given, wanted)]
            raise InputError(f"data.size: got {show[0]}, expected {show[1]}, the model's")
        if self.architecture.unet.num_classes is not None and isinstance(data, HasClasses) and data.class_names is None:
            raise InputError(NO_CLASSES)
        if data.channels != channels:
            raise InputError(
                f"data.channels: got {data.channels}, expected {channels}, the model's unet.image_channels"
            )

    def on_fit_end(self) -> None:
        if self.save_path is not None and not self.trainer.fast_dev_run:
            average = self.average()
            if self.trainer.is_global_zero:
                save_weights(self.save_path, Weights(self.architecture, average), half=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here rather than at the end of the batch, where a checkpoint may already have been written.
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self._quarters is not None and self.logs_step(self.global_step + 1):
            self.log("train/ema_decay", self.ema.decay_at(self.global_step + 1))
            for i, (total, count) in enumerate(self._quarters.T.tolist(), start=1):
                if count:
                    self.log(f"train/loss_t{i}", total / count)
            self._quarters = None

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.unet.parameters(), self.optim, self.trainer.max_steps)

    # sampling

    def predict_step(self, batch: dict[str, list], batch_idx: int) -> dict[str, Any]:
        """Make the pictures of a batch of requests (a list for each field of a request).

        Returns:
            ``image``: (B, C, H, W) in [-1, 1]; ``clip_similarity``: a cosine for each picture that has a text, else
            None; ``float32_retries``: for each picture, the number of steps that were computed again in float32;
            ``own``: for each picture, its class and what was edited and how, where it has them of its own;
            ``provenance``: what all pictures of this run have in common.
        """
        # Gradients are needed here, and Lightning's Trainer predicts in inference mode by default.
        with torch.inference_mode(False), torch.enable_grad():
            if any(p.is_inference() for p in self.unet.parameters()):
                raise RuntimeError("the network was made in inference mode and can't guide")
            try:
                request = batch["text"], batch["seed"], batch["guidance_weight"]
                image, retries = self.sampler.sample_in_chunks(
                    *request, self._shows_progress, self._watch, edits=batch["edit"], labels=batch["class_label"]
                )
            except GuidanceError as error:
                asked = {name: values[error.position] for name, values in batch.items() if name != "valid"}
                where = ", ".join(f"{name!r}: {shorten(value)}" for name, value in asked.items() if value is not None)
                raise GuidanceError(error.position, f"{error.reason} in request {{{where}}}") from error
            return {
                "image": image,
                "clip_similarity": self.sampler.clip_similarity(image, batch["text"], batch["edit"]),
                "float32_retries": retries,
                "own": [self.sampler.describe(*each) for each in zip(batch["edit"], batch["class_label"], strict=True)],
                "provenance": self.provenance(),
            }

    def _watch(self, state: State) -> None:
        for watch in self.watchers:
            watch(state)

    def test_step(self, batch: dict[str, list], batch_idx: int) -> dict[str, Any]:
        return self.predict_step(batch, batch_idx)

    def provenance(self) -> dict[str, Any]:
        """What it takes, beside a request, to make its picture again.

        Raises:
            InputError: where the network has no weights but random ones.
        """
        if not self.trained and not self.trainer.training:
            raise InputError("weights: got none, expected --weights with a file or folder, or --ckpt_path")
        if self._provenance is None or self.trainer.training:  # in fit the weights change
            self._provenance = {
                **self.sampler.settings(),
                "weights": None if self.trainer.training else str(self.weights_path or self.trainer.ckpt_path),
                "weights_hash": state_hash(self.average()),
                "use_ema": self.use_ema,
                **self.models.provenance(self.sampler.method),
                **({"compile": True} if self.compiled else {}),
                "precision": str(self.trainer.precision),
                "device": self.device.type,
                "threads": torch.get_num_threads(),
            }
        return self._provenance

    def setup(self, stage: str) -> None:
        if stage in ("predict", "test"):
            # loaded here, before anything is written, and because the loops that follow run in inference mode
            data = self.trainer.datamodule
            has_requests = isinstance(data, HasRequests)
            guided = has_requests and next(data.guiding_texts(), None) is not None
            name = choose_method(self.sampling.method, self.models.config)
            if guided or stage == "test" or not has_requests or data.has_texts():
                self.models.load(METHODS[name].guided_by if guided else None)
                texts = data.all_texts() if has_requests else iter(())
                self.models.check_texts(filter(None, texts), METHODS[name] if guided else None)
            if guided and self.sampling.method == AUTO and self.trainer.is_global_zero and stage == "test":
                print(f"method: {name}, {REASONS[name]}")
            if self.sharded:
                self.models.shard(self.device_mesh["data_parallel"])

    def on_predict_start(self) -> None:
        self.provenance()
        if not self.sharded:
            with torch.inference_mode(False):
                arrange_weights(self.unet, self.device)

    def on_test_start(self) -> None:
        self.on_predict_start()

    @property
    def sharded(self) -> bool:
        return self.device_mesh is not None

    def _any_process(self, here: bool) -> bool:
        """Whether it is so in any of the processes that share a sharded network."""
        return self.trainer.strategy.reduce_boolean_decision(here, all=False)

    @property
    def _shows_progress(self) -> bool:
        return self.global_rank == 0 and self.trainer.progress_bar_callback is not None

    # checkpoints: `state_dict` holds the averaged weights, `current_model_state` the ones that train

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["architecture"] = self.architecture.to_dict()
        checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
        checkpoint["state_dict"] |= {f"unet.{name}": average for name, average in self.average().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.configure_model()
        given = Architecture.from_dict(checkpoint["architecture"])
        names = given.class_names if self.architecture.class_names is None else self.architecture.class_names
        self.architecture = replace(self.architecture, class_names=names, scheduler=given.scheduler)
        self.sampler.architecture = self.architecture
        difference = given.difference(self.architecture)
        if difference:
            raise InputError(f"ckpt_path: the checkpoint has {difference} as the config; use its own config")
        training = self._trainer is not None and self.trainer.training
        raw = _of_unet(checkpoint["current_model_state"])
        if "state_dict" in checkpoint:
            averaged = _of_unet(checkpoint["state_dict"]) if training or self.use_ema else raw
            Weights(given, averaged).into(self.unet)
            if self.ema is not None:
                self.ema.load(averaged)
            if training or not self.use_ema:
                checkpoint["state_dict"] = checkpoint["current_model_state"]
        else:  # a strategy that shards has put it into the network
            if not (training or self.use_ema):
                fill(self.unet, raw)
            if self.ema is not None:
                self.ema.reset()
            if training:
                fill(self.unet, raw)
        self.trained = True


def _of_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("unet."): value for name, value in state.items()}


def min_snr_weight(alpha_bar: Tensor, gamma: float, parametrisation: Parametrisation) -> Tensor:
    """min(SNR, γ) over what an error of x0 is multiplied by to be one of the network's output (Hang et al. 2023)."""
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(max=gamma)
    return {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}[parametrisation]
