"""What must be known of a diffusion model, beside its parameters, to use it."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipward.diffusion.denoiser import Parametrisation, VarType
from clipward.diffusion.schedule import Betas, Schedule, ScheduleName, Scheduler
from clipward.errors import InputError, list_names, shorten
from clipward.files import check_state
from clipward.networks.unet import UNet, UNetConfig
from clipward.weights.fields import parse_dataclass

DIGITS = re.compile(r"[0-9]{1,18}")
MOST_PIXELS, MOST_TIMESTEPS = 2**14, 10**6  # a file may claim anything

# fields that the first files did not have, whose defaults are what those files mean
ADDED_LATER = {
    *("betas", "var_type", "clip_denoised", "scheduler"),
    *("sampler", "skip_type", "offset", "equal_strides", "to_data", "noise_of_clamped"),
    *("num_classes", "null_class", "class_names"),
    *("head_channels", "scale_shift_norm", "resblock_updown", "downsample_padding", "freq_shift"),
}


@dataclass(frozen=True)
class Architecture:
    """What must be known of a diffusion model to use its weights: its network, schedule and sampling variance.

    Args:
        unet: the network's size.
        image_size: height and width of the pictures it makes, as a pair where they differ; see :attr:`size`.
        schedule: ᾱ_t by name.
        num_timesteps: T, the number of noise levels.
        betas: the first and the last β of the schedule; cosine has its own.
        parametrisation: what the network puts out.
        var_type: the variance that it is sampled with by default: the learned one where the network has one, else
            the small one.
        clip_denoised: whether x̂0 is clamped to [-1, 1] at every step by default.
        class_names: of the classes of ``unet.num_classes``, in their order; ``fit`` takes them from its data.
        scheduler: how steps are taken by default.

    Raises:
        InputError: where a number is out of its range.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    image_size: int | tuple[int, int] = 256
    schedule: ScheduleName = "linear"
    num_timesteps: int = 1000
    betas: Betas = (1e-4, 0.02)
    parametrisation: Parametrisation = "eps"
    var_type: VarType | None = None
    clip_denoised: bool = True
    class_names: tuple[str, ...] | None = None
    scheduler: Scheduler = field(default_factory=Scheduler)

    def __post_init__(self) -> None:
        stride = self.unet.stride
        sides, size = self.size, self.image_size if isinstance(self.image_size, int) else list(self.image_size)
        if not all(1 <= side <= MOST_PIXELS and side % stride == 0 for side in sides):
            wanted = "a multiple" if isinstance(size, int) else "multiples"
            raise InputError(
                f"image_size: got {shorten(size)}, expected {wanted} of {shorten(stride)} for this U-Net, up to "
                f"{MOST_PIXELS}"
            )
        object.__setattr__(self, "image_size", sides[0] if sides[0] == sides[1] else sides)
        if not 1 <= self.num_timesteps <= MOST_TIMESTEPS:
            given = shorten(self.num_timesteps)
            raise InputError(f"num_timesteps: got {given}, expected 1 to {MOST_TIMESTEPS}")
        if not all(0 < beta < 1 for beta in self.betas) or self.betas[0] > self.betas[1]:
            raise InputError(f"betas: got {shorten(list(self.betas))}, expected two rising numbers between 0 and 1")
        self.noise_schedule()  # which has its own demands
        if self.class_names is not None and len(self.class_names) != (self.unet.num_classes or 0):
            raise InputError(
                f"unet.num_classes: got {self.unet.num_classes}, expected {len(self.class_names)}, for the classes "
                f"{list_names(self.class_names)}"
            )
        if self.var_type is None:
            object.__setattr__(self, "var_type", "learned_range" if self.unet.learns_variance else "fixed_small")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    def find_class(self, label: str | int) -> int:
        """The number of a class, by its name or its number.

        Raises:
            InputError: where the model has no such class.
        """
        count, names = self.unet.num_classes, self.class_names or ()
        if count is None:
            raise InputError(f"class_label: got {shorten(label)}, expected none, since the model knows no classes")
        if label in names:
            return names.index(str(label))
        number = int(label) if isinstance(label, int) or DIGITS.fullmatch(label) else -1
        if str(number) in names:
            return names.index(str(number))
        if 0 <= number < count:
            return number
        known = f"one of {list_names(names)}, or a" if names else "a"
        raise InputError(f"class_label: got {shorten(label)}, expected {known} number from 0 to {count - 1}")

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
        """The first thing that ``other`` has another value of, or nothing; any scheduler walks the same network."""
        ours, theirs = ({**d, **d["unet"], "unet": None, "scheduler": None} for d in (self.to_dict(), other.to_dict()))
        return next((f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k]), "")


@dataclass(frozen=True)
class Weights:
    """A U-Net's parameters by name, and what they are the parameters of.

    Args:
        architecture: of the network.
        state: tensors by our names.
        assumed: what the source doesn't say, and ``architecture`` has by its family's custom.
    """

    architecture: Architecture
    state: dict[str, Tensor]
    assumed: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise :class:`InputError` where the parameters are not those of the architecture; this takes no memory."""
        with torch.device("meta"):
            network = UNet(self.architecture.unet)
        check_state(network.state_dict(), self.state, "weights")

    def into(self, network: nn.Module) -> None:
        """Copy into ``network``.

        Raises:
            InputError: on the first key that is missing, extra, of another shape, or not finite.
        """
        check_state(network.state_dict(), self.state, "weights")
        network.load_state_dict(self.state)
