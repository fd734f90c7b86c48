"""Drawn, captioned faces: a data set that needs no download.

A face is a pure function of ``(seed, index)``: five attributes that a person can name at a glance, over
varied skin, background, clothes, pose and scale. Its caption names some of them.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from clipward.datamodules.loading import (
    MOST_PICTURES,
    PictureDataModule,
    Size,
    check_channels,
    check_loading,
    check_training,
    check_whole,
    to_pair,
    training_loader,
    validation_loader,
)
from clipward.errors import InputError, shorten

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("woman", "man"),
    "age": ("young", "old"),
    "hair": ("black", "brown", "blond", "red", "grey"),
    "smile": ("serious", "smiling"),
    "glasses": ("without", "with"),
}

RGB = tuple[float, float, float]
HAIR: dict[str, RGB] = {
    "black": (28, 24, 30),
    "brown": (112, 66, 32),
    "blond": (236, 200, 96),
    "red": (200, 72, 24),
    "grey": (172, 174, 180),
}
SKIN: tuple[RGB, ...] = ((255, 224, 196), (244, 204, 168), (224, 176, 134), (190, 136, 96), (146, 98, 66))
BACKGROUND: tuple[RGB, ...] = ((126, 164, 200), (150, 190, 160), (206, 186, 214), (222, 206, 176), (96, 128, 140))
CLOTHES: tuple[RGB, ...] = ((44, 72, 132), (150, 40, 60), (50, 110, 80), (90, 70, 120), (60, 60, 66), (224, 224, 220))
SUPERSAMPLING = 4


def attributes(seed: int, index: int) -> dict[str, str]:
    """The attributes of face ``index``, each drawn uniformly and independently: ``{"gender": "woman", …}``."""
    rng = random.Random(f"{seed}/{index}/attributes")
    return {name: rng.choice(values) for name, values in ATTRIBUTES.items()}


def caption(seed: int, index: int, detail: float = 0.5) -> str:
    """A sentence that names some of the attributes of face ``index``, or with a chance of ``detail`` all of them."""
    rng = random.Random(f"{seed}/{index}/caption")
    return describe(attributes(seed, index), rng, full=rng.random() < detail)


def describe(face: dict[str, str], rng: random.Random, full: bool = False) -> str:
    """A random sentence that is true of ``face``: a subject, and hair, smile and glasses, all of them if ``full``."""
    young, woman = face["age"] == "young", face["gender"] == "woman"
    noun = rng.choice(("woman", "lady") if woman else ("man", "gentleman"))
    child = "girl" if woman else "boy"
    if full or rng.random() < 0.75:
        subject = rng.choice((f"a young {noun}", f"a young {child}", f"a {child}") if young else (f"an old {noun}",))
    else:
        subject = rng.choice((f"a {noun}", f"a {noun}", "an old person" if not young else "a young person", "a person"))

    smiling, glasses = face["smile"] == "smiling", face["glasses"] == "with"
    extras = {
        "hair": f"{face['hair']} hair",
        "smile": "a smile" if smiling else "a serious face",
        "glasses": "glasses" if glasses else "no glasses",
    }
    named = [name for name in extras if full or rng.random() < 0.5]
    rng.shuffle(named)

    adjective = ""
    if "smile" in named and rng.random() < 0.4:
        named.remove("smile")
        adjective = "smiling" if smiling else "serious"
    if adjective:
        words = subject.split()
        subject = " ".join(["a", adjective, *words[1:]])
    tail = ""
    if "glasses" in named and rng.random() < 0.35:
        named.remove("glasses")
        tail = " wearing glasses" if glasses else " without glasses"
    parts = [extras[name] for name in named]
    joined = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
    prefix = rng.choice(("", "", "", "a drawing of ", "a portrait of ", "a picture of "))
    return prefix + subject + (f" with {joined}" if joined else "") + tail


def draw(seed: int, index: int, size: int = 64) -> Image.Image:
    """Draw face ``index`` as an antialiased RGB picture of ``size`` × ``size`` pixels."""
    return _Pen(random.Random(f"{seed}/{index}/picture"), size).face(attributes(seed, index))


class _Pen:
    """Draws in face coordinates: x to the right, y down, from the middle of the face; the unit is half a picture."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng, self.size = rng, size
        self.pixels = size * SUPERSAMPLING
        angle, scale = rng.gauss(0, 0.07), rng.uniform(1.0, 1.14)
        self.cos, self.sin = scale * math.cos(angle), scale * math.sin(angle)
        self.dx, self.dy = rng.uniform(-0.07, 0.07), rng.uniform(-0.05, 0.07)
        self.yaw = rng.uniform(-0.06, 0.06)
        self.image = Image.new("RGB", (self.pixels, self.pixels))
        self.draw = ImageDraw.Draw(self.image)

    def place(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        half = self.pixels / 2
        return [
            (
                half * (1 + self.dx + self.cos * x - self.sin * y),
                half * (1 + self.dy + self.sin * x + self.cos * y),
            )
            for x, y in points
        ]

    def polygon(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon(self.place(points), fill=_rgb(colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: RGB, jaw: float = 1.0) -> None:
        """An ellipse; ``jaw`` > 1 squares its lower half."""
        self.polygon(_oval(x, y, rx, ry, jaw), colour)

    def line(self, points: Sequence[tuple[float, float]], colour: RGB, width: float) -> None:
        pixels = max(1, round(width * self.pixels / 2))
        self.draw.line(self.place(points), fill=_rgb(colour), width=pixels, joint="curve")

    def ring(self, x: float, y: float, rx: float, ry: float, colour: RGB, width: float) -> None:
        oval = _oval(x, y, rx, ry)
        self.line([*oval, *oval[:2]], colour, width)

    def face(self, face: dict[str, str]) -> Image.Image:
        rng = self.rng
        woman, old = face["gender"] == "woman", face["age"] == "old"
        hair = _jitter(rng, HAIR[face["hair"]], 10)
        first, second = sorted(rng.sample(range(len(SKIN)), 2))
        skin = _mix(SKIN[first], SKIN[second], rng.random())
        shade, deep = _mix(skin, (90, 40, 30), 0.22), _mix(skin, (70, 30, 30), 0.5)
        width = (0.43 if woman else 0.47) + rng.uniform(-0.025, 0.025) - (0.02 if old else 0.0)
        chin = (0.60 if woman else 0.64) + rng.uniform(-0.03, 0.03) + (0.02 if old else -0.03)
        long = woman
        length = rng.uniform(0.75, 1.15)

        self.backdrop(_jitter(rng, rng.choice(BACKGROUND), 16), rng.uniform(0.55, 0.85))
        if long:
            self.hair_behind(width, length, _mix(hair, (0, 0, 0), 0.12))
        self.polygon([(-0.19, 0.3), (0.19, 0.3), (0.22, 1.0), (-0.22, 1.0)], shade)
        clothes = _jitter(rng, rng.choice(CLOTHES), 14)
        self.ellipse(0, 1.25, 0.95 if not woman else 0.82, 0.46, clothes)
        if not long:
            for side in (-1, 1):
                self.ellipse(side * width, 0.06, 0.08, 0.13, shade)
        self.ellipse(0, -0.02, width, chin, skin, jaw=1.0 if woman else 1.25)
        self.hair_in_front(width, chin, old, woman, hair)
        self.features(face, skin, shade, deep, hair, width)
        return self.image.resize((self.size, self.size), Image.Resampling.BOX)

    def backdrop(self, colour: RGB, dark: float) -> None:
        rows = np.linspace(1.0, dark, self.pixels, dtype=np.float32)[:, None, None]
        tile = np.broadcast_to(rows * np.array(colour, np.float32), (self.pixels, self.pixels, 3))
        self.image.paste(Image.fromarray(tile.clip(0, 255).astype(np.uint8)))

    def hair_behind(self, width: float, length: float, hair: RGB) -> None:
        outer = width + 0.19
        top = [(outer * math.cos(a), -0.16 - 0.66 * math.sin(a)) for a in np.linspace(math.pi, 0, 24)]
        self.polygon(
            [
                *top,
                (outer + 0.04, length - 0.1),
                (outer - 0.14, length),
                (0.14 - outer, length),
                (-outer - 0.04, length - 0.1),
            ],
            hair,
        )

    def hair_in_front(self, width: float, chin: float, old: bool, woman: bool, hair: RGB) -> None:
        """A cap over the skull; the hairline is higher in the old, parted in women, and ends above the ears in men."""
        rng = self.rng
        outer, crown = width + (0.07 if woman else 0.05), -chin - (0.12 if woman else 0.09)
        line = rng.uniform(-0.38, -0.33) - (0.13 if old else 0.0)
        cap = [(outer * math.cos(a), -0.14 + (crown + 0.14) * math.sin(a)) for a in np.linspace(math.pi, 0, 24)]
        if woman:
            part = rng.uniform(-0.2, 0.2)
            inner = [
                (outer, 0.25),
                (width - 0.05, 0.12),
                (width - 0.1, line + 0.16),
                (part, line - 0.06),
                (0.1 - width, line + 0.16),
                (0.05 - width, 0.12),
                (-outer, 0.25),
            ]
        else:
            inner = [
                (outer, 0.02),
                (width - 0.05, 0.0),
                (width - 0.08, line + 0.08),
                (0.12, line),
                (-0.12, line),
                (0.08 - width, line + 0.08),
                (0.05 - width, 0.0),
                (-outer, 0.02),
            ]
        self.polygon([*cap, *inner], hair)

    def features(self, face: dict[str, str], skin: RGB, shade: RGB, deep: RGB, hair: RGB, width: float) -> None:
        rng, yaw = self.rng, self.yaw
        woman, old = face["gender"] == "woman", face["age"] == "old"
        dark: RGB = (34, 26, 30)
        apart, level = 0.2 + rng.uniform(-0.012, 0.012), -0.06
        eye = (0.092, 0.062) if old else (0.108, 0.098)
        iris = rng.choice(((60, 90, 130), (80, 60, 40), (60, 100, 70), (40, 36, 40)))

        if not old:
            for side in (-1, 1):
                self.ellipse(yaw + side * 0.26, 0.16, 0.085, 0.06, _mix(skin, (236, 96, 100), 0.32))
        if old:
            for row in (0, 1):
                y = -0.34 + 0.075 * row
                self.line([(yaw - 0.2, y + 0.015), (yaw, y - 0.01), (yaw + 0.2, y + 0.015)], deep, 0.024)
            for side in (-1, 1):
                x = yaw + side * apart
                self.line([(x - 0.08, level + 0.1), (x, level + 0.13), (x + 0.08, level + 0.1)], deep, 0.024)
                self.line(
                    [(yaw + side * 0.13, 0.14), (yaw + side * 0.22, 0.24), (yaw + side * 0.24, 0.36)], deep, 0.026
                )
                self.line([(x + side * 0.13, level - 0.02), (x + side * 0.19, level - 0.05)], deep, 0.022)
                self.line([(x + side * 0.13, level + 0.03), (x + side * 0.19, level + 0.05)], deep, 0.022)
        for side in (-1, 1):
            x = yaw + side * apart
            self.ellipse(x, level, *eye, (250, 250, 248))
            self.ellipse(x + yaw * 0.4, level, eye[1] * 0.72, eye[1] * 0.9, iris)
            self.ellipse(x + yaw * 0.4, level, eye[1] * 0.38, eye[1] * 0.5, (16, 14, 18))
            lid = [(x - eye[0], level - 0.01), (x, level - eye[1] - 0.012), (x + eye[0], level - 0.01)]
            self.line(lid, dark, 0.04 if woman else 0.024)
            if woman:
                self.line([(x + side * eye[0], level - 0.02), (x + side * (eye[0] + 0.05), level - 0.06)], dark, 0.03)
            brow = _mix(hair, (30, 20, 20), 0.45)
            y = level - 0.165 + (0.02 if old else 0.0)
            self.line([(x - 0.1, y + 0.015), (x, y - 0.015), (x + 0.1, y + 0.015)], brow, 0.034 if woman else 0.062)

        self.line([(yaw * 1.6, 0.0), (yaw * 1.6 + 0.035, 0.13), (yaw * 1.6 - 0.035, 0.14)], deep, 0.026)
        self.mouth(face["smile"] == "smiling", woman, skin, deep)
        if face["glasses"] == "with":
            frame: RGB = rng.choice(((20, 20, 24), (70, 26, 20), (30, 30, 80)))
            for side in (-1, 1):
                self.ring(yaw + side * apart, level + 0.01, 0.155, 0.135, frame, 0.042)
                self.line([(yaw + side * (apart + 0.155), level), (side * width, level - 0.02)], frame, 0.036)
            self.line([(yaw - apart + 0.15, level), (yaw, level - 0.025), (yaw + apart - 0.15, level)], frame, 0.04)

    def mouth(self, smiling: bool, woman: bool, skin: RGB, deep: RGB) -> None:
        x, y = self.yaw * 1.2, 0.33
        lips = _mix(skin, (204, 30, 56), 0.75) if woman else deep
        if smiling:
            wide, deepness = 0.19 + self.rng.uniform(-0.015, 0.015), 0.13
            angles = np.linspace(0, math.pi, 14)
            for grow, colour in ((0.03, lips), (0.0, (252, 252, 250))):
                lower = [(x + (wide + grow) * math.cos(a), y - 0.05 + (deepness + grow) * math.sin(a)) for a in angles]
                self.polygon(
                    [
                        *lower,
                        (x - wide - grow, y - 0.06 - grow),
                        (x, y - 0.03 - grow),
                        (x + wide + grow, y - 0.06 - grow),
                    ],
                    colour,
                )
        else:
            wide = 0.125 + self.rng.uniform(-0.015, 0.015)
            self.line([(x - wide, y + 0.02), (x, y + 0.01), (x + wide, y + 0.02)], lips, 0.075 if woman else 0.048)


def _oval(x: float, y: float, rx: float, ry: float, jaw: float = 1.0) -> list[tuple[float, float]]:
    """Points of an ellipse; the lower half is a superellipse of exponent 2·``jaw``."""
    points = []
    for a in np.linspace(0, 2 * math.pi, 32, endpoint=False):
        c, s = math.cos(a), math.sin(a)
        power = 1 / jaw if s > 0 else 1.0
        points.append((x + rx * math.copysign(abs(c) ** power, c), y + ry * math.copysign(abs(s) ** power, s)))
    return points


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    return tuple(p + share * (q - p) for p, q in zip(a, b, strict=True))


def _jitter(rng: random.Random, colour: RGB, amount: float) -> RGB:
    return tuple(channel + rng.uniform(-amount, amount) for channel in colour)


def _rgb(colour: RGB) -> tuple[int, int, int]:
    return tuple(min(255, max(0, round(channel))) for channel in colour)


class Faces(Dataset[dict]):
    """Map-style set of drawn faces, each drawn on first use and then kept (3·size² bytes a face).

    An item is ``{"image": (channels, *size) in [-1, 1], "caption": str, "labels": (5,) int64}``; a label is the
    position of the value in :data:`ATTRIBUTES`.

    Args:
        seed: which faces.
        count: how many.
        size: height and width in pixels, or a pair of them; of a face with other sides, the middle.
        detail: share of the captions that name all attributes.
        channels: 3 for RGB, or 1 for its luma.
        classes: the attribute whose label is ``class_label`` too.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        size: Size = 64,
        detail: float = 0.5,
        channels: int = 3,
        classes: str | None = None,
    ) -> None:
        self.classes = classes
        self.seed, self.count, self.size, self.detail = seed, count, to_pair(size), detail
        self.mode = "RGB" if channels == 3 else "L"
        self._pixels = torch.zeros(count, channels, *self.size, dtype=torch.uint8)
        self._drawn = torch.zeros(count, dtype=torch.bool)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not self._drawn[index]:
            height, width = self.size
            face = draw(self.seed, index, max(self.size))
            top, left = (face.height - height) // 2, (face.width - width) // 2
            picture = face.crop((left, top, left + width, top + height)).convert(self.mode)
            pixels = torch.from_numpy(np.asarray(picture).copy())
            self._pixels[index] = pixels.reshape(height, width, -1).permute(2, 0, 1)
            self._drawn[index] = True
        image = self._pixels[index].float() / 127.5 - 1
        face = attributes(self.seed, index)
        labels = torch.tensor([values.index(face[name]) for name, values in ATTRIBUTES.items()])
        item = {"image": image, "caption": caption(self.seed, index, self.detail), "labels": labels}
        return item if self.classes is None else item | {"class_label": labels[list(ATTRIBUTES).index(self.classes)]}


class FacesDataModule(PictureDataModule):
    """Drawn faces for training and validation, no two of them the same.

    Args:
        size: height and width in pixels, or a pair of them.
        train_count: faces to train on.
        val_count: faces to validate on.
        seed: which faces; the validation set is that of ``seed + 1``.
        caption_detail: share of the captions that name all attributes; the others name some. A CLIP learns a small
            thing such as a smile from captions that tell pictures apart, and hardly from those that many share.
        batch_size: faces a batch, on each device.
        num_workers: processes that draw; 0 draws in the training process and keeps what it drew.
        channels: 3 for colour, or 1 for grey.
        classes: the attribute whose values are the classes of ``unet.num_classes``, such as ``hair``.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 64,
        train_count: int = 50_000,
        val_count: int = 1_000,
        seed: int = 0,
        caption_detail: float = 0.5,
        batch_size: int = 64,
        num_workers: int = 0,
        channels: int = 3,
        classes: str | None = None,
    ) -> None:
        super().__init__()
        if classes is not None and classes not in ATTRIBUTES:
            raise InputError(f"data.classes: got {shorten(classes)}, expected one of {', '.join(ATTRIBUTES)}")
        self.classes = classes
        self.class_names = None if classes is None else list(ATTRIBUTES[classes])
        check_loading(size, batch_size, num_workers)
        check_channels(channels, (1, 3))
        check_whole(0, MOST_PICTURES, train_count=train_count, val_count=val_count)
        check_whole(0, 2**63 - 1, seed=seed)
        if not 0 <= caption_detail <= 1:
            raise InputError(f"data.caption_detail: got {shorten(caption_detail)}, expected a number from 0 to 1")
        self.size, self.train_count, self.val_count = size, train_count, val_count
        self.seed, self.caption_detail = seed, caption_detail
        self.batch_size, self.num_workers, self.channels = batch_size, num_workers, channels
        self.train_set: Faces | None = None

    @property
    def attributes(self) -> dict[str, list[str]]:
        return {name: list(values) for name, values in ATTRIBUTES.items()}

    @property
    def has_captions(self) -> bool:
        return True

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_training(self.train_count, self.batch_size, self.trainer)
        if stage == "validate" and self.val_count == 0:
            raise InputError("data.val_count: got 0, expected 1 or more, since there is nothing to validate on")
        if self.train_set is None:
            self.train_set = self._faces(self.seed, self.train_count)
            self.val_set = self._faces(self.seed + 1, self.val_count)

    def _faces(self, seed: int, count: int) -> Faces:
        try:
            return Faces(seed, count, self.size, self.caption_detail, self.channels, self.classes)
        except RuntimeError as error:  # torch has no memory for them
            raise InputError(
                f"data.size: got {self.size}, expected less, or fewer than {count} faces, to fit in memory"
            ) from error

    def train_dataloader(self) -> DataLoader:
        return training_loader(self.train_set, self.batch_size, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return validation_loader(self.val_set, self.batch_size, self.num_workers)
