"""Pictures laid out as a figure: rows of one seed, a heading for each text, and one for each weight."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP, INK = 2, (20, 20, 24)


@dataclass(frozen=True)
class Cell:
    """Where a picture belongs: unguided pictures have no text and the weight 0."""

    seed: int
    text: str
    guidance_weight: float


def figure(pictures: dict[Cell, Image.Image], cell_size: int | None = None) -> Image.Image:
    """Seeds down; across, the unguided pictures, then each text with its weights, in the order they come in.

    Args:
        pictures: what goes where; a place that nothing is known of stays white.
        cell_size: pixels of a picture's side; by default at least 96, a multiple of the picture's own.
    """
    if not pictures:
        raise ValueError("a figure needs a picture")
    size = max(picture.width for picture in pictures.values())
    cell_size = cell_size or size * max(1, -(-96 // size))
    seeds = list(dict.fromkeys(cell.seed for cell in pictures))
    columns = list(dict.fromkeys((cell.text, cell.guidance_weight) for cell in pictures))
    texts = list(dict.fromkeys(text for text, _ in columns))
    columns.sort(key=lambda column: texts.index(column[0]))
    pitch = cell_size + GAP
    big, small = _font(cell_size * 0.155), _font(cell_size * 0.125)

    spans = {text: [i for i, column in enumerate(columns) if column[0] == text] for text in texts}
    blocks = {text: _wrap(f"“{text}”", big, len(span) * pitch - 8) for text, span in spans.items() if text}
    line = round(cell_size * 0.2)
    top = line * max((len(rows) for rows in blocks.values()), default=0) + round(cell_size * 0.3)
    canvas = Image.new("RGB", (len(columns) * pitch + GAP, top + len(seeds) * pitch + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for text, rows in blocks.items():
        middle = GAP + pitch * (spans[text][0] + spans[text][-1] + 1) / 2
        for i, row in enumerate(rows):
            draw.text((middle, line * (i + 0.6)), row, INK, big, anchor="mm")
    for i, (_, weight) in enumerate(columns):
        heading = f"weight {weight:g}" if weight else "unguided"
        draw.text((GAP + pitch * i + cell_size / 2, top - cell_size * 0.12), heading, INK, small, anchor="mm")
    draw.rectangle((0, top, canvas.width, canvas.height), INK)
    for row, seed in enumerate(seeds):
        for i, (text, weight) in enumerate(columns):
            place = (GAP + pitch * i, top + GAP + pitch * row)
            picture = pictures.get(Cell(seed, text, weight))
            if picture is None:
                draw.rectangle((*place, place[0] + cell_size - 1, place[1] + cell_size - 1), "white")
            else:
                filter_ = Image.Resampling.NEAREST if cell_size % picture.width == 0 else Image.Resampling.LANCZOS
                canvas.paste(picture.resize((cell_size, cell_size), filter_), place)
    return canvas


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(9, round(size)))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> Sequence[str]:
    rows: list[str] = []
    for word in text.split():
        longer = f"{rows[-1]} {word}" if rows else word
        if rows and font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows
