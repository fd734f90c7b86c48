"""A figure of pictures: a row for each seed, a column for each text and guidance weight."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP, INK = 2, (20, 20, 24)


@dataclass(frozen=True)
class Cell:
    """The place of a picture in a figure.

    Args:
        seed: of its row.
        text: empty for an unguided picture.
        guidance_weight: 0 for an unguided picture, and None for an init image that was edited.
        edit: what its row has in common beside the seed, such as the name of an init image.
    """

    seed: int
    text: str
    guidance_weight: float | None
    edit: str = ""


def draw_figure(pictures: dict[Cell, Image.Image], cell_size: int | None = None, quoted: bool = True) -> Image.Image:
    """Draw a figure with a heading for each text and each weight.

    Rows and columns are in the order of ``pictures``; the columns of a text stand side by side. A single column is
    folded into a square.

    Args:
        pictures: the picture of each cell; a cell without one stays white.
        cell_size: the longer side of a cell in pixels; by default the smallest multiple of the pictures' own that is
            160 or more. A picture with transparent parts is laid on white.
        quoted: whether the headings are texts that guide, and stand in quotes.

    Raises:
        ValueError: where there is no picture.
    """
    if not pictures:
        raise ValueError("pictures: got none, expected one or more")
    first = next(iter(pictures.values()))
    size = max(first.size)
    cell_size = cell_size or size * max(1, -(-160 // size))
    wide, high = (max(1, round(cell_size * side / size)) for side in first.size)
    places = list(dict.fromkeys((cell.seed, cell.edit) for cell in pictures))
    columns = list(dict.fromkeys((cell.text, cell.guidance_weight) for cell in pictures))
    texts = list(dict.fromkeys(text for text, _ in columns))
    columns.sort(key=lambda column: texts.index(column[0]))
    across, down = len(columns), len(places)
    if across == 1:
        across = math.isqrt(down - 1) + 1
        down = -(-down // across)

    pitch, step = wide + GAP, high + GAP
    spans = {text: [i for i, column in enumerate(columns) if column[0] == text] for text in texts}
    if len(columns) == 1:
        spans = {texts[0]: list(range(across))}
    big, small = _font(wide * 0.155), _font(wide * 0.125)
    blocks = {
        text: _wrap(f"“{text}”" if quoted else text, big, len(span) * pitch - 8) for text, span in spans.items() if text
    }
    line = round(wide * 0.2)
    top = line * max((len(rows) for rows in blocks.values()), default=0) + round(wide * 0.3)
    canvas = Image.new("RGB", (across * pitch + GAP, top + down * step + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for text, rows in blocks.items():
        middle = GAP + pitch * (spans[text][0] + spans[text][-1] + 1) / 2
        for i, row in enumerate(rows):
            draw.text((middle, line * (i + 0.6)), row, INK, big, anchor="mm")
    for i, (_, weight) in enumerate(columns):
        heading = "init image" if weight is None else f"weight {weight:g}" if weight else "unguided"
        middle = GAP + pitch * (across / 2 if len(columns) == 1 else i + 0.5)
        draw.text((middle, top - wide * 0.12), heading, INK, small, anchor="mm")

    draw.rectangle((0, top, canvas.width, canvas.height), INK)
    cells = [Cell(seed, text, weight, edit) for seed, edit in places for text, weight in columns]
    for i in range(across * down):
        left, upper = GAP + pitch * (i % across), top + GAP + step * (i // across)
        picture = pictures.get(cells[i]) if i < len(cells) else None
        if picture is None:
            draw.rectangle((left, upper, left + wide - 1, upper + high - 1), "white")
        else:
            scaled = picture.resize((wide, high), Image.Resampling.LANCZOS)
            canvas.paste("white", (left, upper, left + wide, upper + high))
            canvas.paste(scaled, (left, upper), scaled if scaled.mode == "RGBA" else None)
    return canvas


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(9, round(size)))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break a text into rows of at most ``width`` pixels, where its words are not longer."""
    rows: list[str] = []
    for word in text.split():
        longer = f"{rows[-1]} {word}" if rows else word
        if rows and font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows
