"""The settings by which pictures are made."""

from dataclasses import dataclass
from typing import get_args

from clipward.diffusion.denoiser import VarType
from clipward.diffusion.schedule import SkipType
from clipward.diffusion.solvers import SOLVERS, SolverName
from clipward.errors import InputError, shorten
from clipward.guidance.methods import AUTO, METHODS, MethodName
from clipward.guidance.weight_schedule import WeightSchedule
from clipward.values import MOST_WEIGHT, ClassLabel, check_types

STEPS = 50  # where nothing else is said
MOST_TOGETHER = 1024  # pictures that must be drawn at once, and walks of one step


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made.

    Args:
        method: how the text guides; ``auto`` takes what the given models allow: ``contrastive`` with a noise-aware
            CLIP, else ``contrastive_denoised``.
        repeats: how often each step is taken, with the noise put back in between; by default the method's own, and
            with a mask four or more.
        interval: the shares of T between which a text guides, such as 0.2 0.8; the method's own by default.
        weight_schedule: pairs of t/T (0 is the picture, 1 is noise) and the factor of the guidance weight there, such
            as ``0.0:0.5 0.4:1 0.8:0``; linear in between.
        candidates: pictures to draw for each text, all at once. At five steps they are resampled by their weights,
            exp(w·L) of the guidance weight w and the objective L of the method (Feynman-Kac steering); where steps add
            no noise they are not. Of the last ones, the one that the CLIPs find nearest to its text is kept.
        skip_steps: reverse steps to take; by default the method's own number with the method's own solver, else 50.
        skip_type: how they are spread over the noise levels; by default as the weights say, else ``trailing`` for a
            solver and ``uniform`` for DDPM and DDIM.
        solver: take the steps of a solver that needs fewer, in place of DDPM's or DDIM's: ``dpmpp_2m``,
            ``sde_dpmpp_2m`` or ``unipc``. By default the method's own, if it has one and a picture starts from pure
            noise.
        ddim: take DDIM's steps if true, DDPM's if false. By default the method's solver; where it has none, as the
            weights say, else DDPM's.
        ddim_eta: DDIM's noise, from 0 (none) to 1 (as DDPM).
        class_label: the name or the number of the class of all pictures, for a model of classes; by default any class.
        class_weight: w of classifier-free guidance, (1 + w)·ε(x_t, c) − w·ε(x_t), beside what a text guides; 0 draws
            the class as the network knows it, in half the time.
        var_type: DDPM's variance, which also scales the mean's shift; by default what the weights were made for.
        clip_denoised: clamp x̂0 to [-1, 1] at every step; by default what the weights were made for.
        dynamic_thresholding_ratio: in place of that clamp, clamp each x̂0 to [-s, s] and divide it by s, where this
            share of its pixels lies within [-s, s] and s is at least 1 (Imagen, which takes 0.995). Off by default.
        sample_max_value: the largest s; none by default.
        batch_multiple: batches are filled up to a multiple of this, and on a CPU the networks see so many pictures at
            once. A network rounds differently in passes of other sizes (by 1e-6), and guidance amplifies that; so a
            picture is the same in every batch. By default 4, and on a CPU 1 from 128×128 pixels on, where larger passes
            are no faster.
    """

    method: MethodName = "auto"
    repeats: int | None = None
    interval: tuple[float, float] | None = None
    weight_schedule: str | None = None
    candidates: int = 1
    skip_steps: int | None = None
    skip_type: SkipType | None = None
    solver: SolverName | None = None
    ddim: bool | None = None
    ddim_eta: float = 0.0
    class_label: ClassLabel = None
    class_weight: float = 0.0
    var_type: VarType | None = None
    clip_denoised: bool | None = None
    dynamic_thresholding_ratio: float | None = None
    sample_max_value: float | None = None
    batch_multiple: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "sampling")
        for name in ("batch_multiple", "candidates", "repeats"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_TOGETHER:
                raise InputError(f"sampling.{name}: got {shorten(value)}, expected 1 to {MOST_TOGETHER}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise InputError(
                f"sampling.interval: got {shorten(self.interval)}, expected two rising numbers from 0 to 1"
            )
        if self.weight_schedule is not None:
            WeightSchedule.parse(self.weight_schedule)
        if not abs(self.class_weight) <= MOST_WEIGHT:
            raise InputError(f"class_weight: got {shorten(self.class_weight)}, expected a finite number")
        share, most = self.dynamic_thresholding_ratio, self.sample_max_value
        if share is not None and not 0 < share <= 1:
            raise InputError(f"dynamic_thresholding_ratio: got {shorten(share)}, expected above 0, up to 1")
        if most is not None and share is None:
            raise InputError(f"sample_max_value: got {shorten(most)} without dynamic_thresholding_ratio, expected both")
        if most is not None and not most >= 1:
            raise InputError(f"sample_max_value: got {shorten(most)}, expected 1 or more")
        if share is not None and self.clip_denoised is False:
            raise InputError("dynamic_thresholding_ratio: got one beside clip_denoised false, expected one of the two")
        if not 0 <= self.ddim_eta <= 1:
            raise InputError(f"ddim_eta: got {shorten(self.ddim_eta)}, expected 0 to 1")
        for name, known in (("solver", SOLVERS), ("var_type", get_args(VarType)), ("skip_type", get_args(SkipType))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"{name}: got {shorten(value)}, expected one of {', '.join(known)}")
        if self.solver is not None and self.ddim:
            raise InputError(f"solver: got {self.solver} and ddim, expected one of the two")
        if self.method != AUTO and self.method not in METHODS:
            raise InputError(f"method: got {self.method!r}, expected auto or one of {', '.join(METHODS)}")
