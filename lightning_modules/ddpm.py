"""The diffusion model: training, fine-tuning and guided sampling."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor
from tqdm import tqdm

from clipward.diffusion.bound import variational_bound
from clipward.diffusion.denoiser import NetworkDenoiser, Parametrisation, VarType, to_x0, training_target
from clipward.diffusion.sampling import Noise, Update, ancestral, ddim, sample
from clipward.diffusion.schedule import Betas, Schedule, ScheduleName, Step, time_travel
from clipward.errors import InputError
from clipward.files import state_hash
from clipward.guidance.core import Clamp, GuidanceError, GuidedDenoiser, RefuseFlat, Within
from clipward.guidance.methods import METHODS, Method
from clipward.guidance.models import Critics, spared
from clipward.lightning_modules.ema import EMA
from clipward.lightning_modules.optim import OptimConfig, adamw
from clipward.lightning_modules.reproducible import Reproducible
from clipward.networks.sharding import fill, shard
from clipward.networks.unet import UNet, UNetConfig
from clipward.sampler import SamplingConfig
from clipward.weights.architecture import Architecture, Weights, default_var_type
from clipward.weights.load import load_weights, save_weights


class DDPMModule(Reproducible):
    """A denoising diffusion model (Ho et al. 2020), sampled under the guidance of a CLIP.

    Args:
        unet: the network's size.
        image_size: height and width of the pictures.
        schedule: ᾱ_t by name.
        num_timesteps: T, the number of noise levels.
        betas: the first and the last β of the schedule, where it has no own.
        parametrisation: what the network puts out.
        weights: a file or folder to start from, or the name of a diffusers model on the hub, in ``fit`` too; see
            :func:`clipward.weights.load.load_weights`. It says itself what network it is for, and the arguments above give
            way to it.
        use_ema: take the averaged weights of a file that has those that train too.
        default_weights: what ``predict`` and ``test`` start from where ``weights`` and ``ckpt_path`` are not given;
            ``fit`` does not look at it.
        clip: what guides, as :meth:`clipward.networks.clip.Clip.load` names it; several are averaged. Needed only where there
            is a text.
        clip_weights: of each CLIP in the average, relative to the others; equal ones by default.
        noisy_clip: a noise-aware CLIP, for the methods that look at x_t.
        opposites: groups of phrases that exclude each other, such as ``[old, young]``. The method ``evidence`` guides
            by what tells a text from the same with one of its phrases exchanged, group by group.
        neutral: what is true of any picture, such as ``a person``; ``evidence`` tells a text from it too, so that what
            no group knows guides as well. A text with neither opposites nor this guides by CLIP's logit.
        classifier: a noise-aware classifier, for classifier guidance.
        sampling: how pictures are made.
        optim: the optimiser and its schedule.
        checkpoint_activations: compute what a backward pass needs of the U-Net's blocks and of CLIP anew, in place of
            keeping it: a third more time and a fraction of the memory.
        ema_decay: of the averaged weights, which validation, sampling and prediction use.
        save_path: safetensors that are written at the end of ``fit``: the averaged weights in half precision, and what
            network they are for; none is written without it.
    """

    def __init__(
        self,
        unet: UNetConfig = UNetConfig(),
        image_size: int = 256,
        schedule: ScheduleName = "linear",
        num_timesteps: int = 1000,
        betas: Betas = (1e-4, 0.02),
        parametrisation: Parametrisation = "eps",
        weights: str | None = None,
        use_ema: bool = True,
        default_weights: str | None = None,
        clip: str | list[str] | None = None,
        clip_weights: list[float] | None = None,
        noisy_clip: str | None = None,
        opposites: list[list[str]] | None = None,
        neutral: str | None = None,
        classifier: str | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        checkpoint_activations: bool = False,
        optim: OptimConfig = OptimConfig(),
        ema_decay: float = 0.9999,
        save_path: str | None = None,
    ) -> None:
        super().__init__()
        self.architecture = Architecture(
            unet, image_size, schedule, num_timesteps, betas, parametrisation, default_var_type(unet)
        )
        self.use_ema = use_ema
        self.weights_path, self.default_weights = weights, default_weights
        names = [clip] if isinstance(clip, str) else clip or []
        self.critics = Critics(names, clip_weights, noisy_clip, opposites, neutral, classifier, checkpoint_activations)
        self.checkpoint_activations = checkpoint_activations
        self.sampling = sampling
        self.optim = optim
        self.ema_decay = ema_decay
        self.save_path = None if save_path is None else Path(save_path)
        self.unet: UNet | None = None
        self.trained = False  # whether the network has weights from anywhere but chance
        self._provenance: dict[str, Any] | None = None
        self._part: int | None = None  # the most pictures that memory has had room for, once it had none for more

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
        architecture = self.architecture
        self.schedule = Schedule.named(architecture.schedule, architecture.num_timesteps, architecture.betas)
        self.unet = UNet(architecture.unet)
        self.unet.checkpointing = self.checkpoint_activations
        if weights is not None:
            weights.into(self.unet)
            self.trained = True
        if self.sharded:
            shard(self.unet, self.unet.blocks(), self.device_mesh["data_parallel"])
        self.ema = EMA(self.unet, self.ema_decay)

    # training

    def loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple (Ho et al. 2020, eq. 14) in the network's own parametrisation, averaged over the batch.

        A network that learns its variance has 0.001·L_vlb added (Nichol & Dhariwal 2021, eq. 16).
        """
        architecture = self.architecture
        alpha_bar = self.schedule.alpha_bar.to(torch.float32).to(x0.device)[t][:, None, None, None]
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        output, *share = self.unet(x, t).float().split(x0.shape[1], dim=1)
        loss = F.mse_loss(output, training_target(x0, eps, alpha_bar, architecture.parametrisation))
        if architecture.var_type == "learned_range":
            predicted = to_x0(output, x, alpha_bar, architecture.parametrisation)
            bound = variational_bound(x0, x, predicted, *share, t, self.schedule)
            loss = loss + 0.001 * len(self.schedule) * bound.mean()
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x0 = batch["image"]
        t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        loss = self.loss(x0, t, torch.randn_like(x0))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x0 = batch["image"]
        fixed = torch.Generator().manual_seed(batch_idx)
        t = torch.randint(len(self.schedule), (len(x0),), generator=fixed).to(x0.device)
        eps = torch.randn(x0.shape, generator=fixed).to(x0.device)
        with self.ema.applied():
            loss = self.loss(x0, t, eps)
        self.log("val/loss", loss, batch_size=len(x0), prog_bar=True, sync_dist=True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = getattr(self.trainer.datamodule, "size", self.architecture.image_size)
        if data != self.architecture.image_size:
            raise InputError(f"data.size: {data} given; {self.architecture.image_size}, the model's, would do")
        if self.save_path is not None and self.save_path.exists():
            raise InputError(f"model.save_path: {self.save_path} exists; another name would do")

    def on_fit_end(self) -> None:
        if self.save_path is not None and not self.trainer.fast_dev_run:
            average = self.ema.whole()
            if self.trainer.is_global_zero:
                save_weights(self.save_path, Weights(self.architecture, average), half=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here rather than at the end of the batch, where a checkpoint may already have been written.
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.trainer.global_step + 1)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.unet.parameters(), self.optim, self.trainer.max_steps)

    # sampling

    def guided_denoiser(self, text: Sequence[str], guidance_weight: Sequence[float], noise: Noise) -> GuidedDenoiser:
        """What denoises one picture for each text and weight.

        A weight of 0 leaves a picture unguided; its text may then be empty.
        """
        denoise = NetworkDenoiser(self.unet, self.architecture.parametrisation, self.var_type)
        guidances = [Clamp()] if self.clip_denoised else []
        if self._anywhere(any(guidance_weight)):
            weight = torch.tensor(guidance_weight, device=self.device)
            critic = self.critics.critic(self.method, text, noise, self.device)
            low, high = self.interval
            if not any(low < step.t <= high for step in self.steps):
                raise InputError(f"sampling.interval: no step lies in ({low:g}, {high:g}]; a wider one would do")
            for guidance in (RefuseFlat(weight), *self.method.guide(critic, weight)):
                guidances.append(Within(guidance, low, high))
        halved = torch.is_autocast_enabled(self.device.type) or self.unet.conv_in.weight.dtype != torch.float32
        halved = halved and not self.sharded  # all parts would have to be computed again together
        return GuidedDenoiser(denoise, guidances, self._in_float32 if halved else None)

    def draw(
        self, text: Sequence[str], seed: Sequence[int], guidance_weight: Sequence[float], progress: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Walk from noise to pictures, one for each text, seed and weight of three lists, by the averaged weights.

        With ``sampling.candidates`` it is walked so often, from other noise each time, and of each the picture is kept
        that the CLIPs find nearest to its text.

        Returns:
            (B, C, H, W) in [-1, 1], and for each the steps that half precision was too little for.
        """
        image, retries = self.walk(text, seed, guidance_weight, progress)
        if self.sampling.candidates > 1 and self._anywhere(any(text)):
            if not self.critics.names:
                raise InputError("clip: none given, by which sampling.candidates would be compared; a name would do")
            found = self.clip_similarity(image, text)
            for number in range(1, self.sampling.candidates):
                others, more = self.walk(text, [f"{each}/{number}" for each in seed], guidance_weight, progress)
                for i, similarity in enumerate(self.clip_similarity(others, text)):
                    if text[i] and similarity > found[i]:
                        image[i], retries[i], found[i] = others[i], more[i], similarity
        return image, retries

    @torch.enable_grad()
    def walk(
        self,
        text: Sequence[str],
        seed: Sequence[int | str],
        guidance_weight: Sequence[float],
        progress: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """:meth:`draw` once."""
        count, training, dtype = len(seed), self.unet.training, torch.get_default_dtype()
        fill = -count % self.sampling.batch_multiple
        text, seed, guidance_weight = ([*values, *[values[-1]] * fill] for values in (text, seed, guidance_weight))
        noise = self.noise(seed)
        self.unet.eval()
        torch.set_default_dtype(torch.float32)  # Lightning sets another for half precision
        try:
            with self.ema.applied():
                denoise = self.guided_denoiser(text, guidance_weight, noise)
                states = sample(denoise, self.steps, self.update, noise)
                for state in tqdm(states, total=len(self.steps), desc="steps", leave=False, disable=not progress):
                    image = state.x
        finally:
            torch.set_default_dtype(dtype)
            self.unet.train(training)
        return image[:count].clamp(-1, 1), denoise.retries[:count].tolist()

    def draw_what_fits(
        self, text: Sequence[str], seed: Sequence[int], guidance_weight: Sequence[float], progress: bool = False
    ) -> tuple[Tensor, list[int]]:
        """:meth:`draw` in parts: where memory runs out, half as many at once from then on.

        Raises:
            InputError: where there is no room for the fewest.
            GuidanceError: with the position in the whole lists.
        """
        images, retries, at = [], [], 0
        while at < len(seed):
            part = slice(at, at + (self._part or len(seed)))
            size = len(seed[part])
            try:
                image, again = self.draw(text[part], seed[part], guidance_weight[part], progress)
            except GuidanceError as error:
                position = min(error.position, size - 1)  # beyond it, the last request fills the batch
                raise GuidanceError(at + position, error.reason) from error
            except RuntimeError as error:
                if self.sharded or not is_oom_error(error):
                    raise
                self._part = self._halved(size, error)
                garbage_collection_cuda()
                continue
            images.append(image)
            retries += again
            at += size
        return torch.cat(images), retries

    def _halved(self, size: int, error: RuntimeError) -> int:
        if size <= self.sampling.batch_multiple:
            raise InputError(
                f"micro_batch: not even {self.sampling.batch_multiple} pictures fit into memory; "
                "--model.checkpoint_activations true or --model.sampling.batch_multiple 1 would need less"
            ) from error
        return size // 2

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        dtype = self.unet.conv_in.weight.dtype
        self.unet.float()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.unet.to(dtype)

    def noise(self, seed: Sequence[int | str]) -> Noise:
        size = self.architecture.image_size
        return Noise(seed, (self.architecture.unet.image_channels, size, size), self.device)

    @property
    def update(self) -> Update:
        return ddim(self.sampling.ddim_eta) if self.sampling.ddim else ancestral

    @property
    def var_type(self) -> VarType:
        return self.sampling.var_type or self.architecture.var_type

    @property
    def clip_denoised(self) -> bool:
        own = self.sampling.clip_denoised
        return self.architecture.clip_denoised if own is None else own

    @property
    def steps(self) -> list[Step]:
        steps = self.schedule.steps(self.sampling.skip_steps, self.sampling.skip_type)
        return time_travel(steps, self.repeats)

    @property
    def method(self) -> Method:
        return METHODS[self.sampling.method]

    @property
    def interval(self) -> tuple[float, float]:
        """The t above which, and down from which, a text guides; all of them from −1 on."""
        low, high = self.sampling.interval or self.method.interval
        top = len(self.schedule)
        return (low * top if low > 0 else -1), high * top

    @property
    def repeats(self) -> int:
        return self.sampling.repeats or self.method.repeats

    def predict_step(self, batch: dict[str, list], batch_idx: int) -> dict[str, Any]:
        """Make the pictures of a batch of requests (a list for each of index, text, seed and guidance_weight).

        Returns:
            ``image``: (B, C, H, W) in [-1, 1]; ``clip_similarity``: a cosine for each picture that has a text, else
            None; ``float32_retries``: for each picture the steps that half precision was too little for;
            ``provenance``: what all pictures of this run have in common.
        """
        # Gradients are needed here, and Lightning's Trainer predicts in inference mode unless told otherwise.
        with torch.inference_mode(False), torch.enable_grad():
            if any(p.is_inference() for p in self.unet.parameters()):
                raise RuntimeError("the network was made in inference mode and can't guide")
            try:
                requests = batch["text"], batch["seed"], batch["guidance_weight"]
                image, retries = self.draw_what_fits(*requests, self._shows_progress)
            except GuidanceError as error:
                request = {name: values[error.position] for name, values in batch.items()}
                raise GuidanceError(error.position, f"{error.reason} in request {request}") from error
            return {
                "image": image,
                "clip_similarity": self.clip_similarity(image, batch["text"]),
                "float32_retries": retries,
                "provenance": self.provenance(),
            }

    def test_step(self, batch: dict[str, list], batch_idx: int) -> dict[str, Any]:
        return self.predict_step(batch, batch_idx)

    @torch.no_grad()
    def clip_similarity(self, image: Tensor, text: Sequence[str]) -> list[float | None]:
        if not self._anywhere(any(text)) or not self.critics.names:
            return [None] * len(text)
        column = {sentence: i for i, sentence in enumerate(dict.fromkeys(spared(text)))}
        cosines = self.critics.cosines(image, list(column)).tolist()
        return [row[column[sentence]] if sentence else None for row, sentence in zip(cosines, text, strict=True)]

    def provenance(self) -> dict[str, Any]:
        """What it takes, beside a request, to make its picture again."""
        if self._provenance is None or self.trainer.training:  # in fit the weights change
            config = self.sampling
            self._provenance = {
                "method": config.method,
                "steps": config.skip_steps,
                "repeats": self.repeats,
                "candidates": config.candidates,
                "interval": list(self.sampling.interval or self.method.interval),
                "skip_type": config.skip_type,
                "sampler": f"ddim(eta={config.ddim_eta:g})" if config.ddim else "ddpm",
                "var_type": self.var_type,
                "clip_denoised": self.clip_denoised,
                "weights": None if self.trainer.training else str(self.weights_path or self.trainer.ckpt_path),
                "weights_hash": state_hash(self.ema.whole()),
                **self.critics.provenance(self.method),
                "precision": str(self.trainer.precision),
                "device": self.device.type,
            }
        return self._provenance

    def setup(self, stage: str) -> None:
        if stage in ("predict", "test"):
            # loaded here, before anything is written, and for the loops that follow run in inference mode
            requests = getattr(self.trainer.datamodule, "requests", ())
            guided = any(request.guidance_weight for request in requests)
            self.critics.load(self.method.critic if guided else None)
            if self.sharded:
                self.critics.shard(self.device_mesh["data_parallel"])

    def on_predict_start(self) -> None:
        self._check_weights()

    def on_test_start(self) -> None:
        self._check_weights()

    def _check_weights(self) -> None:
        if not self.trained:
            raise InputError("weights: none given; --weights with a file or folder, or --ckpt_path, would do")

    @property
    def sharded(self) -> bool:
        return self.device_mesh is not None

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any of the processes that share a network, for they must take the same way through it."""
        return self.trainer.strategy.reduce_boolean_decision(here, all=False) if self.sharded else here

    @property
    def _shows_progress(self) -> bool:
        return self.global_rank == 0 and self.trainer.progress_bar_callback is not None

    # checkpoints: `state_dict` holds the averaged weights, `current_model_state` the ones that train

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["architecture"] = self.architecture.to_dict()
        checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
        checkpoint["state_dict"] |= {f"unet.{name}": average for name, average in self.ema.whole().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.configure_model()
        given = Architecture.from_dict(checkpoint["architecture"])
        difference = given.difference(self.architecture)
        if difference:
            raise InputError(f"ckpt_path: the checkpoint has {difference} as the config; its own config would do")
        training = self._trainer is not None and self.trainer.training
        raw = _of_unet(checkpoint["current_model_state"])
        if "state_dict" in checkpoint:
            averaged = _of_unet(checkpoint["state_dict"]) if training or self.use_ema else raw
            Weights(given, averaged).into(self.unet)
            self.ema.load(averaged)
            if training or not self.use_ema:
                checkpoint["state_dict"] = checkpoint["current_model_state"]
        else:  # a strategy that shards has put it into the network
            if not (training or self.use_ema):
                fill(self.unet, raw)
            self.ema.reset()
            if training:
                fill(self.unet, raw)
        self.trained = True


def _of_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("unet."): value for name, value in state.items()}
