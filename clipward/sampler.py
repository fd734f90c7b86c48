"""Guided sampling, plain torch: ``fit``, ``test``, ``predict`` and Python share it."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipward.diffusion.denoiser import ClassConditional, NetworkDenoiser, Prediction, VarType, add_noise, to_eps
from clipward.diffusion.particles import Resampling
from clipward.diffusion.sampling import Constraint, Inversion, KeepKnown, Noise, State, Update, ancestral, ddim
from clipward.diffusion.sampling import sample as walk
from clipward.diffusion.schedule import Schedule, Scheduler, Step, time_travel
from clipward.diffusion.solvers import SOLVERS
from clipward.editing import Edit, has_picture, hash_source, list_kinds
from clipward.errors import InputError, shorten
from clipward.guidance.core import (
    Clamp,
    Guidance,
    GuidanceError,
    GuidanceInterval,
    GuidedDenoiser,
    RefuseFlat,
    SplitDenoiser,
    is_lost,
    rms,
)
from clipward.guidance.methods import METHODS, Method
from clipward.guidance.models import GuidanceModels, choose_method, fill_empty_texts
from clipward.guidance.objectives import Objectives
from clipward.guidance.weight_schedule import ScheduledGuidance, WeightSchedule
from clipward.networks.channels import check_shown
from clipward.networks.unet import UNet
from clipward.sampling_config import STEPS, SamplingConfig
from clipward.values import ClassLabel
from clipward.weights.architecture import Architecture

Watch = Callable[[State], None]
MASK_REPEATS = 4
INVERSION_PASSES = 3  # of the network for each step of an inversion
SMALL = 128 * 128  # pixels below which a CPU is faster where it computes several pictures at once
OUT_OF_MEMORY = (  # what errors of other types say
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
MOST_INVERSIONS = 64  # kept, since many requests may edit one picture


class Sampler:
    """Walks from noise to pictures under the guidance of a text.

    Args:
        network: maps x_t and t to what ``architecture`` says.
        architecture: what else must be known of the network.
        models: what guides.
        config: how pictures are made.
        averaged: a context within which the network has the weights to sample with.
        any_process: whether something is so in any of the processes that share a sharded network, which must all take
            the same way through it; None where each process has a network of its own.

    Attributes:
        share_asked: the share of what the networks see now that was asked for; other pictures fill up a batch.
    """

    def __init__(
        self,
        network: UNet,
        architecture: Architecture,
        models: GuidanceModels,
        config: SamplingConfig,
        averaged: Callable[[], AbstractContextManager[Any]] = nullcontext,
        any_process: Callable[[bool], bool] | None = None,
    ) -> None:
        self.network, self.architecture, self.models, self.config = network, architecture, models, config
        self.averaged, self._any_process = averaged, any_process
        self.schedule: Schedule = architecture.noise_schedule()
        self.share_asked = 1.0
        self._chunk: int | None = None  # the most pictures that fit, once memory has run out
        self._inversions: dict[Any, tuple[Tensor, float]] = {}  # a picture's noise, and the error of its round trip

    @property
    def device(self) -> torch.device:
        return self.network.conv_in.weight.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height, width."""
        return self.architecture.unet.image_channels, *self.architecture.size

    @property
    def batch_multiple(self) -> int:
        """``config.batch_multiple``, or what suits the device and the size of the pictures."""
        alone = self.device.type == "cpu" and math.prod(self.architecture.size) >= SMALL
        return self.config.batch_multiple or (1 if alone else 4)

    @property
    def method_name(self) -> str:
        """``config.method``, or what ``auto`` stands for."""
        return choose_method(self.config.method, self.models.config)

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    def repeats(self, edit: Edit | None = None) -> int:
        """How often each step is taken."""
        by_default = max(self.method.repeats, MASK_REPEATS if edit is not None and edit.masked else 1)
        return self.config.repeats or by_default

    def list_steps(self, edit: Edit | None = None, repeats: int | None = None) -> list[Step]:
        """The steps of a walk: with an init image, those that begin below its strength."""
        steps = self.schedule.steps(self.count_steps(edit), self.scheduler(edit))
        if edit is not None and edit.strength is not None:
            steps = [step for step in steps if step.t < edit.strength * len(self.schedule)]
        return time_travel(steps, repeats or self.repeats(edit))

    def count_steps(self, edit: Edit | None = None) -> int:
        """The steps from pure noise to a picture, of which an edit takes the share that its strength says."""
        if self.config.skip_steps is not None:
            return self.config.skip_steps
        return self.method.steps if self.scheduler(edit).sampler == self.method.solver else STEPS

    def scheduler(self, edit: Edit | None = None) -> Scheduler:
        """How steps are taken: as ``config`` says, else as the method does, else as the weights say."""
        scheduler, config = self.architecture.scheduler, self.config
        sampler: str | None = config.solver
        if edit is not None and edit.invert:  # the way back goes through the same levels
            sampler = "ddim"
        elif config.ddim is not None:
            sampler = "ddim" if config.ddim else "ddpm"
        elif sampler is None and scheduler.sampler == "ddpm" and (edit is None or edit.init_image is None):
            sampler = self.method.solver
        if sampler is not None:
            skip_type = "trailing" if sampler in SOLVERS else scheduler.skip_type
            scheduler = Scheduler(sampler, skip_type, scheduler.offset)
        if config.skip_type is not None:
            scheduler = replace(scheduler, skip_type=config.skip_type, offset=0, equal_strides=False)
        return scheduler

    def make_update(self, edit: Edit | None = None) -> Update:
        """What takes the steps of one walk, and may remember them.

        Raises:
            InputError: where the weights ask for steps that can't be taken here.
        """
        name = self.scheduler(edit).sampler
        if name in SOLVERS:
            return SOLVERS[name]()
        if name not in ("ddpm", "ddim"):
            raise InputError(
                f"weights: got the scheduler {shorten(name)}, whose steps can't be taken here; choose others by "
                "--solver dpmpp_2m, --ddim or --model.sampling.ddim false"
            )
        return ddim(self.config.ddim_eta) if name == "ddim" else ancestral

    def adds_noise(self, edit: Edit | None = None) -> bool:
        """Whether steps add noise, without which candidates that were resampled would stay alike."""
        name = self.scheduler(edit).sampler
        return name in ("ddpm", "sde_dpmpp_2m") or (name == "ddim" and self.config.ddim_eta > 0)

    @property
    def var_type(self) -> VarType:
        return self.config.var_type or self.architecture.variance

    @property
    def clip_denoised(self) -> bool:
        own = self.config.clip_denoised
        if self.config.dynamic_thresholding_ratio is not None:
            return True
        return self.architecture.clip_denoised if own is None else own

    def find_class(self, label: ClassLabel) -> int:
        """The number of the class of a picture that has this label; −1 for any. One without is of the settings' class.

        Raises:
            InputError: where the model has no such class.
        """
        given = self.config.class_label if label is None else label
        return -1 if given is None else self.architecture.find_class(given)

    def interval(self, edit: Edit | None = None) -> tuple[float, float]:
        """The shares of T between which a text guides.

        A method's own are shares of where the walk begins, which is lower for an edit; where no step lies between them,
        it guides all.
        """
        if self.config.interval is not None:
            return self.config.interval
        top = 1.0 if edit is None or edit.strength is None else edit.strength
        low, high = (share * top for share in self.method.interval)
        shares = [step.t / len(self.schedule) for step in self.list_steps(edit)]
        return (low if any(low < share <= high for share in shares) else 0.0), high

    @property
    def weight_schedule(self) -> WeightSchedule | None:
        given = self.config.weight_schedule
        return None if given is None else WeightSchedule.parse(given)

    def _times(self, edit: Edit | None) -> tuple[float, float]:
        """The t above which, and up to which, a text guides."""
        low, high = (share * len(self.schedule) for share in self.interval(edit))
        return (low if low > 0 else -1), high  # from 0 on, the last step is guided too

    def check(self, edits: Iterable[Edit | None] = (None,), labels: Iterable[ClassLabel] = (None,)) -> None:
        """Raise :class:`InputError` where the settings do not fit the model, or an edit does not fit the settings.

        Args:
            edits: those of the requests; one of each kind is enough.
            labels: the class labels of the requests, each at least once.
        """
        for edit in edits:
            low, high = self._times(edit)
            if edit is not None:
                edit.margins(*self.architecture.size)
            steps, strength = self.list_steps(edit), None if edit is None else edit.strength
            if strength and not steps:
                raise InputError(
                    f"strength: got {strength:g}, but no step begins below {strength * len(self.schedule):g}; use more"
                )
            times = [step.t for step in steps if low < step.t <= high]
            if steps and not times:
                raise InputError(f"sampling.interval: no step lies in ({low:g}, {high:g}]; use a wider one")
            schedule = self.weight_schedule
            if times and schedule is not None and not any(schedule.factor(t / len(self.schedule)) for t in times):
                raise InputError(
                    f"sampling.weight_schedule: got {self.config.weight_schedule!r}, which is 0 at all steps that guide"
                )
            if has_picture(edit) and self.method.guided_by == "classifier":
                raise InputError(
                    f"image_prompt: got a picture for {self.method_name}, which is guided by a classifier that reads "
                    "texts alone; use a method that a CLIP guides"
                )
            config = self.config
            if edit is not None and edit.invert and (config.solver or config.ddim_eta or config.ddim is False):
                beside = config.solver or (f"ddim_eta {config.ddim_eta:g}" if config.ddim_eta else "ddim false")
                raise InputError(
                    f"invert: got {beside} beside it, expected "
                    "neither a solver nor noise; an inverted picture goes back by DDIM's steps"
                )
            sampler = self.scheduler(edit).sampler
            if self.method.turns_noise and sampler != "ddpm":
                raise InputError(
                    f"method: got {self.method_name} with the steps of {sampler}, expected those of ddpm, whose noise "
                    "it turns; leave out --solver, --ddim and --invert, or use --model.sampling.ddim false"
                )
            self.make_update(edit)
        if self.config.ddim_eta and self.scheduler().sampler != "ddim":
            raise InputError(f"ddim_eta: got {self.config.ddim_eta} without DDIM's steps, expected --ddim beside it")
        self._check_class(labels)
        if self.var_type == "learned_range" and not self.architecture.unet.learns_variance:
            raise InputError("var_type: got learned_range, but the network has no variance; use fixed_small")

    def _check_class(self, labels: Iterable[ClassLabel]) -> None:
        unet, weight = self.architecture.unet, self.config.class_weight
        numbers = {self.find_class(label) for label in labels}
        if weight and numbers == {-1}:
            raise InputError(f"class_weight: got {weight:g} without a class, expected --class_label with it")
        if unet.num_classes is not None and not unet.null_class:
            if -1 in numbers:
                raise InputError(f"class_label: got none, expected one of the {unet.num_classes} classes of this model")
            if weight:
                raise InputError(
                    f"class_weight: got {weight:g}, expected 0, since this model was trained without label dropout"
                )

    def sample_in_chunks(
        self,
        text: Sequence[str],
        seed: Sequence[int],
        guidance_weight: Sequence[float],
        progress: bool = False,
        watch: Watch | None = None,
        edits: Sequence[Edit | None] | None = None,
        labels: Sequence[ClassLabel] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """:meth:`best_of_n` for as many requests at once as fit: where memory runs out, half as many from then on.

        Raises:
            InputError: where not even the fewest fit.
            GuidanceError: with the position in the whole lists.
        """
        images, retries, start = [], [], 0
        edits, labels = edits or [None] * len(seed), labels or [None] * len(seed)
        together = max(1, len(seed) // self.config.candidates)
        while start < len(seed):
            chunk = slice(start, start + (self._chunk or together))
            size, part = len(seed[chunk]), (text[chunk], seed[chunk], guidance_weight[chunk])
            try:
                image, again = self.best_of_n(*part, progress, watch, edits[chunk], labels[chunk])
            except GuidanceError as error:
                position = min(error.position, size - 1)  # beyond it, the last request fills the batch
                raise GuidanceError(start + position, error.reason) from error
            except RuntimeError as error:
                if self._any_process is not None or not is_out_of_memory(error):
                    raise
                self._chunk = self._halve(size, error)
            else:
                images.append(image)
                retries += again
                start += size
                continue
            free_memory()  # here, where no traceback holds the tensors of the failed batch
        return torch.cat(images), retries

    def _halve(self, size: int, error: RuntimeError) -> int:
        fewest = self.batch_multiple
        if size * self.config.candidates <= fewest or size == 1:
            fewer = "" if self.config.candidates == 1 else "fewer --candidates, "
            raise InputError(
                f"micro_batch: not even {max(fewest, self.config.candidates)} pictures fit into memory; use {fewer}"
                "--model.checkpoint_activations true or --model.sampling.batch_multiple 1"
            ) from error
        return size // 2

    def best_of_n(
        self,
        text: Sequence[str],
        seed: Sequence[int],
        guidance_weight: Sequence[float],
        progress: bool = False,
        watch: Watch | None = None,
        edits: Sequence[Edit | None] | None = None,
        labels: Sequence[ClassLabel] | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Draw ``candidates`` pictures for each text, seed and weight of three lists, and keep the best of each.

        The best is the one that the CLIPs find nearest to its text. A request without a text has one candidate.

        Returns:
            (B, C, H, W) in [-1, 1], and for each the number of steps that were computed again in float32.
        """
        given = list(edits or [None] * len(seed))
        prompted = [bool(sentence) or has_picture(edit) for sentence, edit in zip(text, given, strict=True)]
        if self.config.candidates == 1 or not self._in_any_process(any(prompted)):
            return self.sample(text, seed, guidance_weight, progress, watch, edits, labels)
        if not self.models.names:
            raise InputError("clip: got none, expected the name of a CLIP to choose among candidates by")
        most = self.config.candidates  # of all requests where processes share the network, and pass it together
        owners = [i for i, each in enumerate(prompted) for _ in range(most if each or self.is_shared else 1)]
        firsts = [owners.index(i) for i in range(len(text))]
        names = [f"{seed[i]}/{at - firsts[i]}" if at > firsts[i] else seed[i] for at, i in enumerate(owners)]
        groups = [slice(first, end) for first, end in zip(firsts, [*firsts[1:], len(owners)], strict=True)]
        texts, weights = [text[i] for i in owners], [guidance_weight[i] for i in owners]
        given = [given[i] for i in owners]
        labels = labels and [labels[i] for i in owners]

        def watch_first(state: State) -> None:
            if watch is not None:
                watch(State(state.x[firsts], state.x0[firsts], state.step))

        try:
            image, retries = self.sample(texts, names, weights, progress, watch_first, given, labels, groups)
        except GuidanceError as error:
            raise GuidanceError(owners[min(error.position, len(owners) - 1)], error.reason) from error
        similarity = self.clip_similarity(image, texts, given)
        best = [max(range(each.start, each.stop), key=lambda at: similarity[at] or 0.0) for each in groups]
        return image[best], [retries[at] for at in best]

    @torch.enable_grad()
    def sample(
        self,
        text: Sequence[str],
        seed: Sequence[int | str],
        guidance_weight: Sequence[float],
        progress: bool = False,
        watch: Watch | None = None,
        edits: Sequence[Edit | None] | None = None,
        labels: Sequence[ClassLabel] | None = None,
        groups: Sequence[slice] = (),
    ) -> tuple[Tensor, list[int]]:
        """Draw one picture for each text, seed and weight of three lists; see :meth:`best_of_n`.

        Args:
            text: sentences; an empty one where the weight is 0.
            seed: what names the noise of each picture.
            guidance_weight: of each picture; 0 leaves it unguided.
            progress: show a bar over the steps.
            watch: called after each step with x, x̂0 and the step; without the pictures that fill up the batch.
            edits: what each picture is made from beside that, all of them of one kind (``Edit.kind``).
            labels: the class of each picture, by name or number; that of the settings where it has none.
            groups: where the candidates of one request lie, which are resampled.
        """
        count = len(seed)
        given = list(edits or [None] * count)
        if len(list_kinds(given)) > 1:
            raise ValueError("edits: got several kinds, expected one for all pictures of a batch")
        texts, seeds, weights, given = (self._fill(values) for values in (text, seed, guidance_weight, given))
        classes = self._fill([self.find_class(label) for label in labels or [None] * count])
        noise, edit = self._noise(seeds), given[0]
        steps = self.list_steps(edit)
        with self._sampling(), self._filled(count):
            start, constrain = self._begin(given, noise, classes)
            objectives = [
                self._make_objectives(texts[part], seeds[part], weights[part], given[part])
                for part in self._split(len(seeds))
            ]
            denoise = self._make_denoiser(objectives, weights, classes, edit)
            update = self.make_update(edit)
            if groups and steps and any(each is not None for each in objectives) and self.adds_noise(edit):
                followers = [each.follow for each in (denoise, update) if hasattr(each, "follow")]
                names = [seeds[group.start] for group in groups]
                log_potential = partial(self._log_potential, objectives, torch.tensor(weights, device=self.device))
                update = Resampling(update, log_potential, groups, names, steps, followers)
            image = noise(0) if start is None else start
            states = self._walk(denoise, steps, update, noise, start, constrain)
            for state in tqdm(states, total=len(steps), desc="steps", leave=False, disable=not progress):
                image = state.x
                if watch is not None:
                    watch(State(state.x[:count], state.x0[:count], state.step))
        for position, (weight, moved) in enumerate(zip(weights, denoise.moved.tolist(), strict=True)):
            if steps and weight and not moved:
                reason = f"{self.method_name} does not guide any of these steps; use more of them"
                raise GuidanceError(position, reason)
        return image[:count].clamp(-1, 1), denoise.retries[:count].tolist()

    def _walk(self, *walked: Any) -> Iterator[State]:
        """:func:`clipward.diffusion.sampling.sample`, which ends where a picture is lost.

        Raises:
            GuidanceError: for the first picture that is not finite, or beyond any picture.
        """
        for state in walk(*walked):
            lost = is_lost(state.x).flatten(1).any(dim=1)
            if lost.any():
                raise GuidanceError(int(lost.nonzero()[0]), f"the picture diverges at t={state.step.t}")
            yield state

    def _fill(self, values: Sequence[Any]) -> list[Any]:
        """Fill a batch up to a multiple of ``batch_multiple``."""
        return [*values, *[values[-1]] * (-len(values) % self.batch_multiple)]

    @contextmanager
    def _filled(self, count: int) -> Iterator[None]:
        """Within, ``share_asked`` is that of a batch that is filled up from ``count``."""
        self.share_asked = count / len(self._fill([None] * count))
        try:
            yield
        finally:
            self.share_asked = 1.0

    def _split(self, count: int) -> list[slice]:
        """The parts of a batch that networks see at once: on a CPU of one size, elsewhere all of it."""
        size = self.batch_multiple if self.device.type == "cpu" else count
        return [slice(start, start + size) for start in range(0, count, size)]

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Within, the network has the weights to sample with and computes as it does when it samples."""
        training, dtype = self.network.training, torch.get_default_dtype()
        self.network.eval()
        torch.set_default_dtype(torch.float32)  # Lightning sets another for half precision
        try:
            with self.averaged(), self._frozen():
                yield
        finally:
            torch.set_default_dtype(dtype)
            self.network.train(training)

    def _begin(
        self, edits: Sequence[Edit | None], noise: Noise, classes: Sequence[int]
    ) -> tuple[Tensor | None, Constraint | None]:
        """Where a walk starts, (B, C, H, W), and what it keeps to; None for both without an init image."""
        given = [edit for edit in edits if edit is not None and edit.init_image is not None]
        if not given:
            return None, None
        edit, steps = given[0], self.list_steps(given[0])
        image = start = torch.stack([each.read_image(noise.shape) for each in given]).to(self.device)
        draw: Callable[[int | str], Tensor] = noise
        if edit.invert and steps:
            keys = [self._inversion_key(each, number) for each, number in zip(given, classes, strict=True)]
            inverted = self._invert(dict(zip(keys, zip(given, classes, strict=True), strict=True)), len(given))
            start = torch.stack([inverted[key][0] for key in keys])
            found = to_eps(image, start, steps[0].alpha_bar_t)
            draw = partial(lambda eps, _: eps, found)  # what is known comes from the same noise
        elif steps:
            start = noise(0) if edit.strength == 1 else add_noise(image, noise(0), steps[0].alpha_bar_t)
        if not edit.masked:
            return start, None
        mask = torch.stack([each.read_mask(noise.shape) for each in given]).to(self.device)
        return start, KeepKnown(image, (edit.strength or 0) * mask, len(self.schedule), draw)

    def _invert(self, wanted: dict[Any, tuple[Edit, int]], count: int) -> dict[Any, tuple[Tensor, float]]:
        """For each edit and class, the x_t at which DDIM's steps without guidance lead to its picture, and the error.

        The error is a root mean square, of pictures in [-1, 1]. Processes that share the network pass it together, so
        each of them inverts ``count``, the pictures of a batch.
        """
        missing = {key: value for key, value in wanted.items() if key not in self._inversions}
        found = {key: self._inversions[key] for key in wanted if key in self._inversions}
        if self._in_any_process(bool(missing)):
            missing = missing or dict([next(iter(wanted.items()))])
            entries = list(missing.values())
            entries = self._fill(entries + entries[-1:] * (count - len(entries) if self.is_shared else 0))
            noise = self._noise([0] * len(entries))
            edits, classes = zip(*entries, strict=True)
            image = torch.stack([edit.read_image(noise.shape) for edit in edits]).to(self.device)
            parts = self._split(len(image))
            denoise = self._make_denoiser([None] * len(parts), [0.0] * len(image), classes, edits[0])
            steps = self.list_steps(edits[0], repeats=1)
            up = [step for step in reversed(steps) for _ in range(INVERSION_PASSES)]
            *_, top = self._walk(denoise, up, Inversion(), noise, image)
            *_, back = self._walk(denoise, steps, ddim(0.0), noise, top.x)
            errors = rms(back.x - image).flatten().tolist()
            found |= {key: (top.x[i], errors[i]) for i, key in enumerate(missing)}
        self._inversions = dict([*self._inversions.items(), *found.items()][-max(MOST_INVERSIONS, len(found)) :])
        return found

    def _inversion_key(self, edit: Edit, number: int) -> tuple[Any, ...]:
        return hash_source(edit.init_image or ""), edit.outpaint, edit.strength, number, repr(self.config)

    def describe(self, edit: Edit | None, label: ClassLabel = None) -> dict[str, Any]:
        """How a picture is made otherwise than :meth:`settings` says, and what was given for it."""
        record = self._describe_class(label)
        if edit is None:
            return record
        record |= edit.to_record()
        if edit.init_image is not None:
            record |= self.describe_steps(edit) | {"interval": list(self.interval(edit))}
        if edit.masked:
            record["repeats"] = self.repeats(edit)
        if edit.invert:
            key = self._inversion_key(edit, self.find_class(label))
            record["round_trip_error"] = self._inversions[key][1] if key in self._inversions else None
        return record

    def _noise(self, seed: Sequence[int | str]) -> Noise:
        return Noise(seed, self.shape, self.device)

    @torch.no_grad()
    def _log_potential(
        self, objectives: Sequence[Objectives | None], weight: Tensor, x: Tensor, pred: Prediction, step: Step
    ) -> Tensor:
        """(B,): w·L of x_s for a model that was trained on noisy pictures, else of x̂0 without guidance."""
        seen = x
        if self.method.guided_by == "clip" and step.s >= 0:
            seen = pred.x0 if pred.unguided_x0 is None else pred.unguided_x0
        at = replace(step, t=step.s, alpha_bar_t=step.alpha_bar_s)
        scores = torch.zeros_like(weight)
        for part, each in zip(self._split(len(weight)), objectives, strict=True):
            if each is not None:
                scores[part] = each.weigh(each.cosine if self.method.unit == "cosine" else each.log_likelihood)(
                    seen[part], at
                )
        broken = (weight != 0) & ~torch.isfinite(scores)
        if broken.any():
            raise GuidanceError(int(broken.nonzero()[0]), f"the objective is not finite at t={step.t}")
        return torch.where(weight == 0, 0, weight * scores)

    def _make_objectives(
        self, text: list[str], seed: list[int | str], weight: list[float], edits: list[Edit | None]
    ) -> Objectives | None:
        """What guides one part of a batch; None where nothing does."""
        if not self._in_any_process(any(weight)):
            return None
        return self.models.objectives(self.method, text, self._noise(seed), self.device, edits)

    def _make_denoiser(
        self,
        objectives: Sequence[Objectives | None],
        weight: Sequence[float],
        classes: Sequence[int],
        edit: Edit | None = None,
    ) -> SplitDenoiser:
        """What denoises one picture for each weight and class, with the objectives of each part of the batch."""
        parts = self._split(len(weight))
        weights = torch.tensor(weight, device=self.device)
        denoisers = [
            self._guided_denoiser(each, weights[part], classes[part], edit)
            for part, each in zip(parts, objectives, strict=True)
        ]
        return SplitDenoiser(denoisers, parts[0].stop)

    def _guided_denoiser(
        self, objectives: Objectives | None, weight: Tensor, classes: Sequence[int], edit: Edit | None = None
    ) -> GuidedDenoiser:
        """What denoises one picture for each weight, (B,), and each class; without objectives, unguided."""
        network: Callable[[Tensor, Tensor], Tensor] = self.network
        if self.architecture.unet.num_classes is not None:
            channels = self.architecture.unet.image_channels
            of_a_class = self._in_any_process(any(number >= 0 for number in classes))
            label = torch.tensor(classes, device=self.device)
            network = ClassConditional(self.network, channels, label, self.config.class_weight if of_a_class else 0.0)
        denoise = NetworkDenoiser(network, self.architecture.parametrisation, self.var_type)
        guidances: list[Guidance] = []
        place = self.method.clamp if self.clip_denoised else "never"
        config = self.config
        clamping = self.scheduler(edit).noise_of_clamped, config.dynamic_thresholding_ratio, config.sample_max_value
        if self.clip_denoised:
            guidances.append(Clamp(None if place == "first" else weight == 0, *clamping))
        if objectives is not None:
            guide, schedule = partial(self._list_guidances, objectives), self.weight_schedule
            guides = (
                guide(weight) if schedule is None else [ScheduledGuidance(guide, weight, schedule, len(self.schedule))]
            )
            times = self._times(edit)
            guidances += [GuidanceInterval(guidance, *times) for guidance in guides]
        if place == "last":
            guidances.append(Clamp(weight != 0, *clamping))
        halved = torch.is_autocast_enabled(self.device.type) or self.network.conv_in.weight.dtype != torch.float32
        halved = halved and self._any_process is None  # a sharded network would have to be computed again everywhere
        return GuidedDenoiser(denoise, guidances, self._in_float32 if halved else None)

    def _list_guidances(self, objectives: Objectives, weight: Tensor) -> list[Guidance]:
        """The method's guidances, after a look at x̂0 where a CLIP is to see it; other models look at x_t."""
        looked_at: list[Guidance] = [RefuseFlat(weight)] if self.method.guided_by == "clip" else []
        return looked_at + self.method.guidances(objectives, weight)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Within, no gradient is kept for weights, so that :mod:`clipward.networks.lean` saves memory."""
        training = [p for p in self.network.parameters() if p.requires_grad and self._any_process is None]
        for p in training:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in training:
                p.requires_grad_(True)

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        dtype = self.network.conv_in.weight.dtype
        self.network.float()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.network.to(dtype)

    @torch.no_grad()
    def clip_similarity(
        self, image: Tensor, text: Sequence[str], edits: Sequence[Edit | None] | None = None
    ) -> list[float | None]:
        """The cosine between each picture and its text, averaged over the CLIPs; None where there is no text.

        That between a picture and its image prompt takes its place, or where there are both, their mean.
        """
        of_texts = self._text_similarity(image, text)
        if not edits or not self.models.names or not has_picture(edits[0]):
            return of_texts
        of_pictures = self.models.picture_cosines(image, edits)
        return [b if a is None else (a + b) / 2 for a, b in zip(of_texts, of_pictures, strict=True)]

    def _text_similarity(self, image: Tensor, text: Sequence[str]) -> list[float | None]:
        if not self._in_any_process(any(text)) or not self.models.names:
            return [None] * len(text)
        texts = fill_empty_texts(self._fill(text))
        filled = torch.cat([image, image[-1:].expand(len(texts) - len(text), *image.shape[1:])])
        found: list[float] = []
        with self._filled(len(text)):
            for part in self._split(len(texts)):  # as the pictures were drawn
                found += self.models.similarities(filled[part], texts[part]).tolist()
        return [similarity if sentence else None for similarity, sentence in zip(found, text, strict=False)]

    @property
    def is_shared(self) -> bool:
        """Whether processes share the network, so that all must take part in what is computed."""
        return self._any_process is not None

    def _in_any_process(self, here: bool) -> bool:
        return here if self._any_process is None else self._any_process(here)

    def _describe_class(self, label: ClassLabel = None) -> dict[str, Any]:
        if self.architecture.unet.num_classes is None:
            return {}
        number, names = self.find_class(label), self.architecture.class_names
        known = None if number < 0 else names[number] if names else number
        return {"class_label": known, "class_weight": self.config.class_weight}

    def describe_steps(self, edit: Edit | None = None) -> dict[str, Any]:
        """How steps are taken; ``by_weights`` names what the weights chose, where they have a choice of their own."""
        config, scheduler, own = self.config, self.scheduler(edit), self.architecture.scheduler
        name, by_weights = scheduler.sampler, []
        if own != Scheduler():
            chosen = config.ddim is None and config.solver is None and name == own.sampler
            spaced = config.skip_type is None and (chosen or name not in SOLVERS)
            by_weights = ["sampler"] * chosen + ["skip_type"] * spaced
        return {
            "steps": self.count_steps(edit),
            "skip_type": scheduler.skip_type,
            "sampler": f"ddim(eta={config.ddim_eta:g})" if name == "ddim" else name,
            **({"ddim_eta": config.ddim_eta} if name == "ddim" else {}),
            **({} if own == Scheduler() else {"by_weights": by_weights}),
        }

    def settings(self) -> dict[str, Any]:
        """How pictures are made, for the record."""
        config = self.config
        return {
            "method": self.method_name,
            **self.describe_steps(),
            "repeats": self.repeats(),
            "candidates": config.candidates,
            "interval": list(self.interval()),
            **({} if config.weight_schedule is None else {"weight_schedule": config.weight_schedule}),
            "batch_multiple": self.batch_multiple,
            "var_type": self.var_type,
            **self._describe_class(),
            "clip_denoised": self.clip_denoised,
            **{
                name: getattr(config, name)
                for name in ("dynamic_thresholding_ratio", "sample_max_value")
                if getattr(config, name) is not None
            },
        }


class HasSampler(Protocol):
    """A module that samples, and says how."""

    watchers: list[Watch]

    @property
    def sampler(self) -> Sampler: ...

    def provenance(self) -> dict[str, Any]: ...


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def free_memory() -> None:
    """Give back what a failed batch held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_picture(image: Tensor) -> Image.Image:
    """(1, H, W), (3, H, W) or (4, H, W) in [-1, 1] -> a picture in grey (L), RGB or RGBA.

    Raises:
        ValueError: where it is not finite.
    """
    check_shown(len(image))
    if not torch.isfinite(image).all():
        raise ValueError("image: got values that are not finite, expected about -1 to 1")
    pixels = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
