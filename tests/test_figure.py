import pytest
from PIL import Image

from clipward.callbacks.figure import GAP, Cell, draw_figure


def test_rows_share_a_seed_and_columns_a_text_and_weight() -> None:
    colours = {}
    for row, seed in enumerate((4, 5)):
        for column, (text, weight) in enumerate([("", 0.0), ("a man", 10.0), ("a girl", 10.0), ("a man", 50.0)]):
            colours[Cell(seed, text, weight)] = (60 * column, 120 * row, 200)
    sheet = draw_figure({cell: Image.new("RGB", (32, 32), colour) for cell, colour in colours.items()})
    pitch = 160 + GAP
    assert sheet.width == 4 * pitch + GAP
    top = sheet.height - 2 * pitch - GAP
    shown = [[sheet.getpixel((GAP + 80 + pitch * c, top + GAP + 80 + pitch * r)) for c in range(4)] for r in (0, 1)]
    columns = [("", 0.0), ("a man", 10.0), ("a man", 50.0), ("a girl", 10.0)]
    assert shown == [[colours[Cell(seed, *column)] for column in columns] for seed in (4, 5)]
    assert any(sheet.getpixel((x, y)) != (255, 255, 255) for x in range(sheet.width) for y in range(top - 1))


def test_a_place_with_no_picture_stays_white() -> None:
    black = Image.new("RGB", (160, 160))
    sheet = draw_figure({Cell(1, "a", 1.0): black, Cell(2, "a", 2.0): black})
    assert sheet.getpixel((sheet.width - 80, sheet.height - 240)) == (255, 255, 255)


def test_a_long_text_is_broken_to_fit() -> None:
    text = "an old man with grey hair and glasses and a smile in front of a very long wall"
    tall = draw_figure({Cell(0, text, 1.0): Image.new("RGB", (160, 160))})
    low = draw_figure({Cell(0, "a man", 1.0): Image.new("RGB", (160, 160))})
    assert tall.width == low.width
    assert tall.height > low.height


def test_a_figure_needs_a_picture() -> None:
    with pytest.raises(ValueError, match="pictures: got none"):
        draw_figure({})


def test_a_single_column_is_folded_into_a_square() -> None:
    colours = [(20 * seed, 100, 50) for seed in range(7)]
    sheet = draw_figure(
        {Cell(seed, "", 0.0): Image.new("RGB", (160, 160), colour) for seed, colour in enumerate(colours)}
    )
    pitch, top = 160 + GAP, sheet.height - 3 * (160 + GAP) - GAP
    assert sheet.width == 3 * pitch + GAP
    shown = [sheet.getpixel((50 + pitch * (i % 3), top + 50 + pitch * (i // 3))) for i in range(9)]
    assert shown == [*colours, (255, 255, 255), (255, 255, 255)]


def test_an_edited_picture_stands_beside_its_init_image() -> None:
    colours = {"a": "red", "b": "blue"}
    places = [(seed, name) for seed in (1, 2) for name in colours]
    originals = {Cell(seed, "", None, name): Image.new("RGB", (16, 16), colours[name]) for seed, name in places}
    edited = {Cell(seed, "a man", 20, name): Image.new("RGB", (16, 16), "green") for seed, name in places}
    figure = draw_figure(originals | edited, cell_size=64)
    row = [figure.getpixel((34, figure.height - 66 * i - 34)) for i in range(4)]
    assert row == [(0, 0, 255), (255, 0, 0)] * 2
