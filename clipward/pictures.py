"""Picture files of the kinds that people have: opened with care, turned upright, in 8-bit grey, RGB or RGBA."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clipward.errors import first_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a pixel
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *DEEP_GREY)
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would print lines about files that are left out


class UnreadablePicture(Exception):
    """Says in a few words why a file can't be read as a picture."""


def check_picture(source: str | bytes) -> None:
    """Open a picture, a file's path or its bytes, as far as its header.

    Raises:
        UnreadablePicture: for what is no regular file, no PNG, JPEG, WebP, BMP, GIF or TIFF, has more pixels than
            Pillow opens without a warning (89 million), or has 32 bits a channel.
    """
    with _reporting():
        _open(source).close()


def size_of(source: str | bytes) -> tuple[int, int]:
    """The width and height of a picture, a file's path or its bytes, once it is upright.

    Raises:
        UnreadablePicture: as :func:`check_picture`.
    """
    with _reporting(), _open(source) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) >= 5 else (width, height)


def read_picture(source: str | bytes, size: int | tuple[int, int], channels: int = 3) -> Tensor:
    """Read a picture, a file's path or its bytes, upright by its EXIF.

    Of a GIF or another file of several pictures this is the first. Grey of 16 bits is scaled to 8.

    Args:
        source: a path, or the bytes of a file.
        size: height and width, or one number for both.
        channels: 3 for RGB with transparent parts on white; 1 for the luma of that, 0.299·R + 0.587·G + 0.114·B (ITU-R
            BT.601); 4 for RGBA, where a picture without transparency is opaque.

    Returns:
        (channels, height, width) in uint8: the part in the middle that has these proportions, resized with
        antialiasing.

    Raises:
        UnreadablePicture: as :func:`check_picture`, and where the pixels are damaged.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with _reporting(), _open(source) as picture:
        picture.load()  # which turns a TIFF by itself
        turn = UPRIGHT.get(_orientation(picture))
        converted = CONVERTERS[channels](picture)
        upright = converted if turn is None else converted.transpose(turn)
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def to_png(picture: Image.Image) -> bytes:
    """What a PNG of a picture holds, which loses nothing that :func:`read_picture` would see.

    Raises:
        UnreadablePicture: where its pixels are damaged or gone, or have 32 bits a channel.
    """
    with _reporting():
        if picture.mode in ("F", "I"):  # of which Pillow would keep the values up to 255
            raise UnreadablePicture(f"pixels of the kind {picture.mode}")
        file = io.BytesIO()
        (picture if picture.mode in PNG_MODES else _to_rgb(picture)).save(file, "PNG")
        return file.getvalue()


def _open(source: str | bytes) -> Image.Image:
    if isinstance(source, str) and not os.path.isfile(source):  # opening a FIFO would wait for its writer
        raise UnreadablePicture("no regular file" if os.path.exists(source) else "there is no such file")
    if not source:
        raise UnreadablePicture("empty")
    picture = Image.open(source if isinstance(source, str) else io.BytesIO(source), formats=FORMATS)
    if picture.mode not in MODES:
        raise UnreadablePicture(f"pixels of the kind {picture.mode}")
    return picture


@contextmanager
def _reporting() -> Iterator[None]:
    """Make whatever Pillow raises for a faulty file, which may be anything, an UnreadablePicture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UnreadablePicture:
            raise
        except UnidentifiedImageError as error:
            raise UnreadablePicture("no PNG, JPEG, WebP, BMP, GIF or TIFF") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadablePicture(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
        except Exception as error:
            raise UnreadablePicture(first_line(error)) from error


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # a picture with faulty EXIF is still a picture
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in DEEP_GREY:
        return _to_grey(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _to_rgba(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA") if picture.has_transparency_data else _to_rgb(picture).convert("RGBA")


def _to_luma(picture: Image.Image) -> Image.Image:
    return _to_rgb(picture).convert("L")


CONVERTERS = {1: _to_luma, 3: _to_rgb, 4: _to_rgba}


def _to_grey(picture: Image.Image) -> Image.Image:
    """Scale grey of 16 bits (or 12, in a TIFF) to 8, where Pillow would cut it off at 255."""
    tags = getattr(picture, "tag_v2", {})
    brightest = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    scaled = (np.minimum(np.arange(2**16), brightest) * 255 + brightest // 2) // brightest
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    values = np.asarray(picture)
    grey = scaled.astype(np.uint8)[values]
    if "transparency" in picture.info:  # the value that is transparent
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey)
