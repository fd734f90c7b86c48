"""What must be known of a diffusion model, beside its parameters, to use it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from clipward.diffusion.denoiser import Parametrisation, VarType
from clipward.diffusion.schedule import Betas, Schedule, ScheduleName
from clipward.errors import InputError, shorten
from clipward.networks.unet import UNetConfig
from clipward.weights.fields import parse_dataclass

# fields that the first files did not have, whose defaults are what those files mean
ADDED_LATER = {
    *("betas", "var_type", "clip_denoised"),
    *("head_channels", "scale_shift_norm", "resblock_updown", "downsample_padding", "freq_shift"),
}


@dataclass(frozen=True)
class Architecture:
    """What must be known of a diffusion model to use its weights: its network, schedule and sampling variance.

    Args:
        unet: the network's size.
        image_size: height and width of the pictures it makes.
        schedule: ᾱ_t by name.
        num_timesteps: T, the number of noise levels.
        betas: the first and the last β of the schedule; cosine has its own.
        parametrisation: what the network puts out.
        var_type: the variance that it is sampled with by default: the learned one where the network has one, else
            the small one.
        clip_denoised: whether x̂0 is clamped to [-1, 1] at every step by default.

    Raises:
        InputError: where a number is out of its range.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    image_size: int = 256
    schedule: ScheduleName = "linear"
    num_timesteps: int = 1000
    betas: Betas = (1e-4, 0.02)
    parametrisation: Parametrisation = "eps"
    var_type: VarType | None = None
    clip_denoised: bool = True

    def __post_init__(self) -> None:
        stride = self.unet.stride
        if self.image_size < 1 or self.image_size % stride:
            given = shorten(self.image_size)
            raise InputError(f"image_size: got {given}, expected a multiple of {shorten(stride)} for this U-Net")
        if self.num_timesteps < 1:
            raise InputError(f"num_timesteps: got {shorten(self.num_timesteps)}, expected 1 or more")
        if self.var_type is None:
            object.__setattr__(self, "var_type", "learned_range" if self.unet.learns_variance else "fixed_small")

    @property
    def variance(self) -> VarType:
        """``var_type``, which is known once the object is made."""
        assert self.var_type is not None
        return self.var_type

    def noise_schedule(self) -> Schedule:
        return Schedule.from_name(self.schedule, self.num_timesteps, self.betas)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Any) -> "Architecture":
        """What :meth:`to_dict` gave, perhaps by an earlier version.

        Raises:
            InputError: where a field is missing, unknown or of another type, by its name.
        """
        return parse_dataclass(cls, values, "architecture", optional=ADDED_LATER)

    def difference(self, other: "Architecture") -> str:
        """The first thing that ``other`` has another value of, or nothing."""
        ours, theirs = ({**d, **d["unet"], "unet": None} for d in (self.to_dict(), other.to_dict()))
        return next((f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k]), "")


@dataclass(frozen=True)
class Weights:
    """A U-Net's parameters by name, and what they are the parameters of."""

    architecture: Architecture
    state: dict[str, Tensor]

    def into(self, network: nn.Module) -> None:
        """Copy into ``network``.

        Raises:
            InputError: on the first key that is missing, extra or of another shape.
        """
        own = network.state_dict()
        for name in sorted({*own, *self.state}):
            if name not in self.state:
                raise InputError(f"weights: got no key {name!r}, expected one of shape {tuple(own[name].shape)}")
            if name not in own:
                raise InputError(f"weights: got the key {shorten(name)}, expected no such key for this network")
            if own[name].shape != self.state[name].shape:
                given, wanted = shorten(tuple(self.state[name].shape)), tuple(own[name].shape)
                raise InputError(f"weights: got the key {name!r} of shape {given}, expected {wanted}")
        network.load_state_dict(self.state)
