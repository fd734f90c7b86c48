"""``gallery.html``: a page of a folder's pictures, which a browser opens without a server and without a network."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib import resources
from typing import Any

from clipward.callbacks.gallery import PAGE, PER_PICTURE, Gallery
from clipward.editing import EDIT_FIELDS
from clipward.errors import InputError
from clipward.files import atomic_write

MOST_PICTURES = 50_000  # of a page, some 5 MB of metadata
MOST_THUMBNAILS = 500  # of a page of shards, which have no file to show for a picture, some 3 MB
THUMBNAIL = 160  # pixels
REQUEST = {"index", "text", "seed", "guidance_weight"}
EDIT = ("class_label", *(name for name in EDIT_FIELDS if name != "image_prompt"))  # what an unguided picture has too


def write_page(gallery: Gallery) -> None:
    """Write ``gallery.html`` beside the pictures, atomically.

    The page links to the PNGs, and loads only those that are seen. Pictures in shards are in the page, as thumbnails.

    Args:
        gallery: the folder.
    """
    with atomic_write(gallery.path / PAGE) as aside:
        aside.write_text(make_page(gallery), encoding="utf-8")


def make_page(gallery: Gallery) -> str:
    """The page as text. It holds the texts as data, which no browser takes for markup, and runs no script but its own.

    Args:
        gallery: the folder.
    """
    template = resources.files("clipward.callbacks").joinpath("gallery.html").read_text(encoding="utf-8")
    before, after = template.split("DATA", 1)
    hashes = {kind: _hash(re.findall(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)) for kind in ("style", "script")}
    # "file:" is for a page that is opened from the disk, 'self' for one that a server gives.
    policy = (
        f"default-src 'none'; img-src 'self' file: data:; style-src {hashes['style']}; script-src {hashes['script']}"
    )
    return before.replace("POLICY", policy, 1) + to_script(collect(gallery)) + after


def _hash(contents: Iterable[str]) -> str:
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def to_script(value: Any) -> str:
    """JSON that can stand within ``<script>``: it has no ``<``, and none but ASCII characters."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def collect(gallery: Gallery) -> dict[str, Any]:
    """What the page shows.

    Returns:
        ``folder``: its path; ``total``: how many pictures it has; ``size``: width and height of the first; ``made``:
        the metadata that all have in common; ``texts`` and ``edits``; and ``rows``, each with the picture's address,
        the number of its text, the number of its edit, its seed (as text, for a browser knows no whole numbers above
        2**53), its weight, its similarity, its name and its shard.
    """
    texts: dict[str, int] = {}
    edits: dict[str, int] = {}
    rows: list[list[Any]] = []
    made: dict[str, Any] | None = None
    total, size = 0, None
    for row in gallery.rows():
        total += 1
        common = {name: value for name, value in row.items() if name not in REQUEST | set(PER_PICTURE)}
        made = common if made is None else {name: value for name, value in made.items() if common.get(name) == value}
        if len(rows) < (MOST_THUMBNAILS if "shard" in row else MOST_PICTURES):
            with suppress(KeyError, TypeError, ValueError, OverflowError, InputError):  # what another one has changed
                size = size or list(gallery.open(row).size)
                rows.append(_to_list(gallery, row, texts, edits))
    return {
        "folder": str(gallery.path),
        "total": total,
        "size": size or [1, 1],
        "made": json.loads(json.dumps(made or {}), parse_constant=str),  # NaN is no JSON to a browser
        "texts": list(texts),
        "edits": list(edits),
        "rows": rows,
    }


def _to_list(gallery: Gallery, row: dict[str, Any], texts: dict[str, int], edits: dict[str, int]) -> list[Any]:
    weight, similarity = float(row["guidance_weight"]), row.get("clip_similarity")
    if not math.isfinite(weight):
        raise ValueError(f"guidance_weight: got {weight}")
    edit = ", ".join(f"{name} {row[name]}" for name in EDIT if row.get(name) is not None)
    return [
        make_thumbnail(gallery, row) if "shard" in row else row["file_name"],
        texts.setdefault(str(row["text"]), len(texts)),
        edits.setdefault(edit, len(edits)),
        str(int(row["seed"])),
        weight,
        None if similarity is None or not math.isfinite(similarity) else similarity,
        row["file_name"],
        row.get("shard"),
    ]


def make_thumbnail(gallery: Gallery, row: dict[str, Any]) -> str:
    """A picture of a shard as a ``data:`` address of a small JPEG."""
    picture, file = gallery.open(row).convert("RGB"), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
