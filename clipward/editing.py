"""The pictures that a request comes with: one to start from, a mask of it, and one in the place of a text."""

import hashlib
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipward.errors import InputError, shorten
from clipward.pictures import UnreadablePicture, read_picture, size_of, to_png
from clipward.values import is_number

Source = str | bytes  # a file's path, or what a file holds
State = tuple[int, int] | None  # when a file was last changed, and its size
STRENGTH, MASKED_STRENGTH = 0.6, 1.0
PICTURES = ("init_image", "mask", "image_prompt")

log = logging.getLogger("clipward")


@dataclass(frozen=True)
class Edit:
    """What a picture is made from, beside its text and its seed.

    Pictures are given as a file's path, as what a file holds, or as a picture of Pillow.

    Args:
        init_image: the picture that is edited.
        strength: the noise level that the picture begins at, as a share of T: from 0, where it stays as it is, to 1,
            where it begins as pure noise. By default 0.6, or 1 with a mask.
        mask: where to draw: white is drawn, black stays as it is. Grey of a share g is drawn from the noise
            level g·strength on (Levin & Fried 2023, Differential Diffusion).
        outpaint: in place of a mask: the shares of the model's width and height that are drawn beside the picture, on
            its left, top, right and bottom. Left and right together are as much as top and bottom, so that it keeps its
            shape.
        invert: begin at the noise that DDIM's steps turn into the picture, in place of noise of the seed.
        image_prompt: a picture that guides as a text does.

    Raises:
        InputError: for what is out of its range or does not go together.
    """

    init_image: Source | None = None
    strength: float | None = None
    mask: Source | None = None
    outpaint: tuple[float, float, float, float] | None = None
    invert: bool = False
    image_prompt: Source | None = None

    def __post_init__(self) -> None:
        for name in PICTURES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, to_source(getattr(self, name), name))
        if not isinstance(self.invert, bool):
            raise InputError(f"invert: got {shorten(self.invert)}, expected true or false")
        if self.init_image is None:
            for name in ("strength", "mask", "outpaint", "invert"):
                if getattr(self, name) not in (None, False):
                    raise InputError(f"{name}: got no init_image beside it, expected a picture to edit")
            return
        if self.outpaint is not None:
            object.__setattr__(self, "outpaint", check_outpaint(self.outpaint))
            if self.mask is not None:
                raise InputError("outpaint: got a mask too, expected one of the two")
        strength = (MASKED_STRENGTH if self.masked else STRENGTH) if self.strength is None else self.strength
        if not is_number(strength) or not 0 <= strength <= 1:
            raise InputError(f"strength: got {shorten(strength)}, expected a number from 0 to 1")
        object.__setattr__(self, "strength", float(strength))

    @property
    def masked(self) -> bool:
        """Whether a part of the picture stays as it is."""
        return self.mask is not None or self.outpaint is not None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the steps and the guidance of a batch depend on; the pictures of one batch have it in common."""
        return self.strength, self.masked, self.invert, self.image_prompt is not None

    def check(self, name: str) -> None:
        """Read one of its pictures.

        Args:
            name: of its field.

        Raises:
            InputError: where it can't be read.
        """
        _read(name, getattr(self, name), (8, 8), 3)

    def read_image(self, shape: Sequence[int]) -> Tensor:
        """(C, H, W) of this shape, in [-1, 1]: the picture that is edited; what lies beside it repeats its border."""
        channels, height, width = shape
        left, top, right, bottom = self.margins(height, width)
        inner = height - top - bottom, width - left - right
        pixels = _read("init_image", self.init_image, inner, channels, reports=True).float() / 127.5 - 1
        return F.pad(pixels[None], (left, right, top, bottom), "replicate")[0]

    def read_mask(self, shape: Sequence[int]) -> Tensor:
        """(1, H, W) from 0, which stays as it is, to 1, which is drawn."""
        _, height, width = shape
        if self.mask is not None:
            return _read("mask", self.mask, (height, width), 1, reports=True).float() / 255
        left, top, right, bottom = self.margins(height, width)
        mask = torch.ones(1, height, width)
        mask[:, top : height - bottom, left : width - right] = 0
        return mask

    def read_prompt(self, size: tuple[int, int]) -> Tensor:
        """(3, H, W) of this size, in [-1, 1]: the picture that guides."""
        return _read("image_prompt", self.image_prompt, size, 3).float() / 127.5 - 1

    def margins(self, height: int, width: int) -> list[int]:
        """Pixels on the left, the top, the right and the bottom of the picture.

        Raises:
            InputError: where they are none at all, or leave no pixel for the picture.
        """
        if self.outpaint is None:
            return [0, 0, 0, 0]
        found = [round(side * share) for side, share in zip((width, height) * 2, self.outpaint, strict=True)]
        left, top, right, bottom = found
        if not any(found) or left + right >= width or top + bottom >= height:
            raise InputError(
                f"outpaint: got {shorten(list(self.outpaint))}, which is {found} pixels of {width}×{height}; expected "
                "some, and some left for the picture"
            )
        return found

    def to_record(self) -> dict[str, Any]:
        """What was given, for metadata, with the SHA-256 of each file."""
        record: dict[str, Any] = {}
        for name in EDIT_FIELDS:
            value = getattr(self, name)
            if value is None or value is False:
                continue
            if not isinstance(value, bytes):
                record[name] = list(value) if isinstance(value, tuple) else value
            if name in PICTURES:
                record[f"{name}_sha256"] = hash_source(value)
        return record


EDIT_FIELDS = tuple(field.name for field in fields(Edit))


def has_picture(edit: Edit | None) -> bool:
    """Whether a picture guides."""
    return edit is not None and edit.image_prompt is not None


def to_source(value: Any, field: str) -> Source:
    """A path as text, or what a file of a picture of Pillow would hold.

    Raises:
        InputError: where ``field`` holds something else.
    """
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise InputError(f"{field}: got a picture of {value.width}×{value.height} pixels, expected at least 1×1")
        try:
            return to_png(value)
        except UnreadablePicture as error:
            raise InputError(f"{field}: the picture can't be read ({error}); expected another one") from error
    if isinstance(value, str | os.PathLike | bytes) and value:
        return value if isinstance(value, bytes) else str(os.fspath(value))
    raise InputError(f"{field}: got {shorten(value)}, expected a picture's file")


def check_outpaint(value: Any) -> tuple[float, ...]:
    """Four shares, LEFT TOP RIGHT BOTTOM.

    Raises:
        InputError: where they are not, or leave no place for the picture.
    """
    shares = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []
    if len(shares) != 4 or not all(is_number(share) and 0 <= share < 1 for share in shares):
        raise InputError(
            f"outpaint: got {shorten(value)}, expected four shares from 0 to below 1: left top right bottom"
        )
    left, top, right, bottom = (float(share) for share in shares)
    if not math.isclose(left + right, top + bottom, abs_tol=1e-6) or not 0 < left + right < 1:
        raise InputError(
            f"outpaint: got {shorten(value)}, expected left + right to be as much as top + bottom, above 0 and below 1"
        )
    return left, top, right, bottom


def hash_source(source: Source) -> str:
    """SHA-256 of a file."""
    return _hash(source, _state(source))


def find_changed(record: dict[str, Any]) -> str | None:
    """The field of a record of :meth:`Edit.to_record` whose file is another one by now; None where there is none."""
    for name in PICTURES:
        source, there = record.get(name), record.get(f"{name}_sha256")
        if there is not None and isinstance(source, str) and os.path.isfile(source) and hash_source(source) != there:
            return name
    return None


def _read(field: str, source: Any, size: tuple[int, int], channels: int, reports: bool = False) -> Tensor:
    """(channels, *size) in uint8; the first picture of another size is reported where it ``reports``.

    Raises:
        InputError: where it can't be read.
    """
    state = _state(source)
    try:
        if reports:
            _report_size(field, size, _size(source, state), source)
        return _decoded(source, state, size, channels)
    except UnreadablePicture as error:
        name = shorten(source) if isinstance(source, str) else "a picture"
        raise InputError(f"{field}: {name} can't be read ({error}); expected a picture's file") from error


def _state(source: Source) -> State:
    """What tells whether a file was changed since it was read."""
    if isinstance(source, bytes) or not os.path.isfile(source):
        return None
    found = os.stat(source)
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=256)
def _decoded(source: Source, state: State, size: tuple[int, int], channels: int) -> Tensor:
    return read_picture(source, size, channels)


@lru_cache(maxsize=1024)
def _size(source: Source, state: State) -> tuple[int, int]:
    return size_of(source)


@lru_cache(maxsize=1024)
def _hash(source: Source, state: State) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_reported: set[tuple[str, tuple[int, int]]] = set()


def _report_size(field: str, size: tuple[int, int], given: tuple[int, int], source: Source) -> None:
    """Say once for each field that a picture, of a ``given`` width and height, is resized to a height and width."""
    (height, width), (wide, high) = size, given
    if (high, wide) == size or (field, size) in _reported:
        return
    _reported.add((field, size))
    if _is_first_process():
        name = shorten(source) if isinstance(source, str) else "the picture"
        what = "" if wide * height == high * width else "its middle is "
        log.warning(
            f"{field}: {name} has {wide}×{high} pixels; {what}resized to {width}×{height}; others are resized too"
        )


def _is_first_process() -> bool:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together or torch.distributed.get_rank() == 0


def list_kinds(edits: Iterable[Edit | None]) -> list[Edit | None]:
    """One edit of each kind; None is a kind of its own."""
    return list({edit and edit.kind: edit for edit in edits}.values())
