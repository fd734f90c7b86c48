"""Guided sampling, plain torch."""

from dataclasses import dataclass

from clipward.diffusion.denoiser import VarType
from clipward.diffusion.schedule import SkipType
from clipward.errors import InputError
from clipward.guidance.methods import MethodName


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made.

    Args:
        method: how the text guides.
        repeats: how often each step is walked, with the noise put back in between; the method's own by default.
        interval: the shares of T between which a text guides, such as 0.2 0.8; the method's own by default.
        candidates: pictures to draw for each request, of which the one is kept that the CLIPs find nearest to its text.
        skip_steps: reverse steps to take.
        skip_type: how they are spread over the noise levels.
        ddim: take DDIM's steps in place of DDPM's.
        ddim_eta: DDIM's noise, from 0 (none) to 1 (as DDPM).
        var_type: DDPM's variance, which also scales the mean's shift; what the weights were made for by default.
        clip_denoised: clamp x̂0 to [-1, 1] at every step; what the weights were made for by default.
        batch_multiple: batches are filled up to a multiple of this. A network rounds differently in batches of other
            sizes (by 1e-6, measured on a CPU for sizes that 4 does not divide), and strong guidance makes another
            picture of it. 1 saves the memory and leaves pictures to depend on the micro-batch.
    """

    method: MethodName = "clip_guidance"
    repeats: int | None = None
    interval: tuple[float, float] | None = None
    candidates: int = 1
    skip_steps: int = 50
    skip_type: SkipType = "uniform"
    ddim: bool = False
    ddim_eta: float = 0.0
    var_type: VarType | None = None
    clip_denoised: bool | None = None
    batch_multiple: int = 4

    def __post_init__(self) -> None:
        if self.batch_multiple < 1:
            raise InputError(f"sampling.batch_multiple: {self.batch_multiple} given; 1 or more would do")
        if self.candidates < 1:
            raise InputError(f"sampling.candidates: {self.candidates} given; 1 or more would do")
        if self.repeats is not None and self.repeats < 1:
            raise InputError(f"sampling.repeats: {self.repeats} given; 1 or more would do")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise InputError(f"sampling.interval: {self.interval} given; two rising numbers from 0 to 1 would do")
