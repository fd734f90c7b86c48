"""Guided sampling in Python: ``clipward.load("faces64").sample(["an old man with a smile"])``."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
import yaml
from PIL import Image
from torch import Tensor

from clipward.allocator import keep_freed_memory
from clipward.diffusion.schedule import Schedule
from clipward.editing import Edit, has_picture
from clipward.errors import InputError, shorten
from clipward.files import CHECKPOINTS, CONFIGS, SHIPPED
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.networks.channels import check_shown
from clipward.networks.lean import arrange_weights
from clipward.networks.unet import UNet
from clipward.sampler import Sampler, Watch, to_picture
from clipward.sampling_config import SamplingConfig
from clipward.texts import check_text
from clipward.values import check_seed, check_weight, fits
from clipward.weights.architecture import Architecture
from clipward.weights.load import load_weights

MICRO_BATCH = 16  # pictures at once, as on the command line
MOST_SAMPLES = 1_000_000  # of each text, for a call holds all of its pictures; the command line writes each


class Model:
    """A diffusion model and the models that guide it. :func:`load` makes one.

    Threads may share it: their calls of :meth:`sample` run one after another.

    Attributes:
        sampler: what draws; its ``config`` may be replaced.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._lock = threading.RLock()

    @property
    def network(self) -> UNet:
        """The U-Net: maps x_t, (B, C, H, W), and t, (B,), to (B, C, H, W), as ``architecture.parametrisation`` says."""
        return self.sampler.network

    @property
    def architecture(self) -> Architecture:
        """The size of the network and of its pictures, its noise schedule and what it puts out."""
        return self.sampler.architecture

    @property
    def schedule(self) -> Schedule:
        """ᾱ_t for t = 0 … T−1, in float64."""
        return self.sampler.schedule

    @overload
    def sample(
        self,
        text: str | Sequence[str] = ...,
        *,
        guidance_weight: float | None = ...,
        n_samples: int = ...,
        seed: int = ...,
        progress: bool = ...,
        callback: Watch | None = ...,
        negative_text: str | None = ...,
        return_tensors: Literal[False] = ...,
        **settings: Any,
    ) -> list[Image.Image]: ...

    @overload  # the rest as above
    def sample(self, text: str | Sequence[str] = ..., *, return_tensors: Literal[True], **settings: Any) -> Tensor: ...

    def sample(
        self,
        text: str | Sequence[str] = (),
        *,
        guidance_weight: float | None = None,
        n_samples: int = 4,
        seed: int = 0,
        progress: bool = False,
        callback: Watch | None = None,
        negative_text: str | None = None,
        return_tensors: bool = False,
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Draw pictures; the same seed, text and weight give the pixels of ``clipward predict``.

        Args:
            text: one or more texts; without any, the pictures are unguided. A text may have several parts with weights,
                such as ``"an old man:2 | a beard:-1"``; see :func:`clipward.texts.split_text`.
            guidance_weight: how strongly the text guides; 0 leaves pictures unguided. By default the method's own.
            n_samples: pictures for each text, from seed ``seed`` on.
            seed: the first seed. Pictures of one seed start from the same noise.
            progress: show a bar over the steps.
            callback: called after each step with a state of ``x``, ``x0`` (both (B, C, H, W)) and ``step``.
            negative_text: what the pictures should not show, such as ``"a beard | glasses:2"``, for this call alone.
            return_tensors: return (N, C, H, W) in [-1, 1] in place of pictures.
            **settings: of :class:`clipward.SamplingConfig` for this call alone, such as ``skip_steps=20``; and of
                :class:`clipward.Edit`, such as ``init_image="face.png", mask=picture``, files or pictures of Pillow.

        Returns:
            The pictures of the first text, seed by seed, then those of the next.

        Raises:
            InputError: for a setting out of its range, or a text that is empty or too long for the CLIP.
            GuidanceError: where the guidance has no gradient, or one that is not finite.
        """
        if not isinstance(text, Sequence):
            raise InputError(f"text: got {shorten(text)}, expected a sentence or a list of sentences")
        texts = [check_text(each) for each in ([text] if isinstance(text, str) else text)]
        if not all(each.strip() for each in texts):
            raise InputError("text: got an empty one, expected sentences; leave it out for unguided pictures")
        if not fits(int, n_samples) or not 1 <= n_samples <= MOST_SAMPLES:
            raise InputError(f"n_samples: got {shorten(n_samples)}, expected 1 to {MOST_SAMPLES}")
        check_switches(progress=progress, return_tensors=return_tensors)
        seed = check_seed(seed)
        check_seed(seed + n_samples - 1)
        if callback is not None and not callable(callback):
            raise InputError(f"callback: got {shorten(callback)}, expected a function of a State")
        sampling, editing = (names_of(config) for config in (SamplingConfig, Edit))
        check_names(settings, SamplingConfig, Edit)
        given = {name: value for name, value in settings.items() if name in editing}
        edit = Edit(**given) if given else None
        own = {name: settings[name] for name in sampling if name in settings}
        with self._lock, torch.inference_mode(False), self._configured(own, negative_text):
            weight = self.sampler.method.weight if guidance_weight is None else check_weight(guidance_weight)
            requests = [
                (sentence, each, weight if sentence or has_picture(edit) else 0.0)
                for sentence in texts or [""]
                for each in range(seed, seed + n_samples)
            ]
            self.sampler.check([edit])
            if texts:
                scored = self.sampler.config.candidates > 1
                self.sampler.models.check_texts(texts, self.sampler.method if weight else None, scored)
            if negative_text and not any(weight for *_, weight in requests):
                raise InputError(
                    f"negative_text: got {shorten(negative_text)}, but no picture is guided; give a text too"
                )
            if not return_tensors:
                check_shown(self.architecture.unet.image_channels)
            images = [
                self._draw(requests[start : start + MICRO_BATCH], progress, callback, edit)
                for start in range(0, len(requests), MICRO_BATCH)
            ]
        image = torch.cat(images)
        return image if return_tensors else [to_picture(each) for each in image]

    @contextmanager
    def _configured(self, sampling: dict[str, Any], negative_text: str | None) -> Iterator[None]:
        """Some settings of the sampler, for the calls within."""
        models = self.sampler.models
        before, guidance = self.sampler.config, models.config
        self.sampler.config = replace(before, **sampling)
        if negative_text is not None:
            models.config = replace(guidance, negative_text=negative_text)
        try:
            yield
        finally:
            self.sampler.config, models.config = before, guidance

    def _draw(
        self, requests: list[tuple[str, int, float]], progress: bool, callback: Watch | None, edit: Edit | None
    ) -> Tensor:
        text, seed, weight = (list(values) for values in zip(*requests, strict=True))
        return self.sampler.sample_in_chunks(text, seed, weight, progress, callback, [edit] * len(seed))[0]


@torch.inference_mode(False)  # what is made in that mode has no gradient, ever
def load(
    weights: str | Path,
    *,
    clip: str | list[str] | None = None,
    clip_weights: list[float] | None = None,
    noisy_clip: str | None = None,
    classifier: str | None = None,
    contrasts: str | list[list[str]] | None = None,
    neutral: str | None = None,
    negative_text: str | None = None,
    device: str | torch.device | None = None,
    use_ema: bool = True,
    compile: bool = False,
    **sampling: Any,
) -> Model:
    """Load a diffusion model, and name what guides it.

    Args:
        weights: the name of a model that ships (``"faces64"``), or anything that ``--weights`` takes: a file, a folder,
            a checkpoint that ``fit`` made, or the name of a diffusers model on the hub.
        clip: one or several CLIPs, such as ``"ViT-B-32/openai"``. A model that ships has its own.
        clip_weights: of each CLIP in their average; equal by default.
        noisy_clip: a noise-aware CLIP's folder.
        classifier: a noise-aware classifier's file.
        contrasts: groups of phrases that exclude each other, or the name of a set that ships, such as ``"faces"``.
        neutral: a text that is true of any picture, such as ``"a person"``.
        negative_text: what no picture should show; a call of :meth:`Model.sample` may name another.
        device: such as ``"cuda"``; by default a GPU where there is one, else the CPU.
        use_ema: take the averaged weights of a file that also has those that train.
        compile: run the networks by ``torch.compile``, which takes a minute or more at the first passes.
        **sampling: settings of :class:`clipward.SamplingConfig`, such as ``method="contrastive"``.

    Raises:
        InputError: where the weights cannot be read, or a setting is out of its range.
    """
    keep_freed_memory()
    check_switches(use_ema=use_ema, compile=compile)
    shipped = _settings_of(str(weights).removeprefix(SHIPPED))
    name = f"{SHIPPED}{weights}" if shipped and not str(weights).startswith(SHIPPED) else str(weights)
    given = {
        "clip": clip,
        "clip_weights": clip_weights,
        "noisy_clip": noisy_clip,
        "classifier": classifier,
        "contrasts": contrasts,
        "neutral": neutral,
        "negative_text": negative_text,
    }
    given = {
        key: str(value) if isinstance(value, os.PathLike) else value
        for key, value in given.items()
        if value is not None
    }
    check_names(sampling, SamplingConfig)
    guidance = GuidanceConfig(**{**shipped.get("guidance", {}), **given})
    config = SamplingConfig(**{**shipped.get("sampling", {}), **sampling})
    place = find_device(device)
    loaded = load_weights(name, use_ema)
    network = UNet(loaded.architecture.unet)
    loaded.into(network)
    network.requires_grad_(False).eval()
    network.to(place)
    arrange_weights(network, place)
    if compile:
        network.compile()
    return Model(Sampler(network, loaded.architecture, GuidanceModels(guidance, compiled=compile), config))


def names_of(config: type) -> list[str]:
    """The fields of a dataclass."""
    return [field.name for field in fields(config)]


def check_names(given: Mapping[str, Any], *configs: type) -> None:
    """Raise :class:`InputError` for a name that no field of the ``configs`` has."""
    known = [name for config in configs for name in names_of(config)]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise InputError(f"settings: got {shorten(unknown)}, expected names among {', '.join(known)}")


def check_switches(**given: Any) -> None:
    """Raise :class:`InputError` for what is neither true nor false."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"{name}: got {shorten(value)}, expected true or false")


def find_device(device: str | torch.device | None) -> torch.device:
    """A device of this machine; by default a GPU where there is one, else the CPU.

    Raises:
        InputError: where there is no such device.
    """
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(auto if device is None else device)
        torch.zeros((), device=place).item()  # which meta can't
    except (AssertionError, RuntimeError, TypeError) as error:
        raise InputError(f"device: got {shorten(device)}, expected one of this machine, such as cpu") from error
    return place


def _settings_of(name: str) -> dict[str, Any]:
    """How a model that ships is guided, by the config that has it as its default; nothing for any other name."""
    if os.path.exists(name) or not os.path.isdir(CHECKPOINTS / name):
        return {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model") or {}
        settings: dict[str, Any] = model.get("init_args") or {}
        if settings.get("default_weights") == f"{SHIPPED}{name}":
            return settings
    return {}
