"""``gallery.html``: what it holds, and what a browser makes of it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from browser import browser  # noqa: F401
from PIL import Image

from clipward.callbacks.gallery import Gallery, is_page
from clipward.callbacks.gallery_page import collect, make_page, write_page
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.datamodules.prompts import PromptDataModule

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--<script>"
TEXTS = [HOSTILE, "it's an old man", "\u2028 \U0001f600 & \\u003c", "-c --x"]


def filled(path: Path, seeds: int = 3, output: Any = "files") -> Gallery:
    """Each seed unguided (blue), then each text with two weights (red, as bright as it is similar)."""
    path.mkdir(parents=True, exist_ok=True)
    gallery, index = Gallery(path, output), 0
    for seed in range(2**60, 2**60 + seeds):
        for text, weight in [("", 0.0), *((text, weight) for text in TEXTS for weight in (5.0, 20.0))]:
            similarity = (index * 37 % 101) / 100 if text else None
            row = {"index": index, "text": text, "seed": seed, "guidance_weight": weight, "clip_similarity": similarity}
            colour = (round(255 * similarity), 0, 0) if similarity is not None else (0, 0, 255)
            gallery.add(
                row | {"method": "glide", "steps": 7, "device": f"cpu{seed % 2}"}, Image.new("RGB", (8, 6), colour)
            )
            index += 1
    gallery.pack_left(100)
    gallery.merge()
    return gallery


def embedded(page: str) -> Any:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(content)


def test_the_page_holds_all_pictures_and_no_markup_of_theirs(tmp_path: Path) -> None:
    gallery = filled(tmp_path / "x")
    page = make_page(gallery)
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "onerror" not in page.replace(r"\u003cimg src=x onerror", "")
    data = embedded(page)
    assert data == json.loads(json.dumps(collect(gallery)))
    assert data["texts"] == ["", *TEXTS]
    assert data["total"] == len(data["rows"]) == 27
    assert data["rows"][1] == ["000001.png", 1, 0, str(2**60), 5.0, 0.37, "000001.png", None]
    assert data["size"] == [8, 6]
    assert data["made"] == {"method": "glide", "steps": 7}  # what differs from picture to picture is left out


def test_the_page_allows_no_network_and_no_script_but_its_own(tmp_path: Path) -> None:
    page = make_page(filled(tmp_path / "x"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.keys() == {"default-src", "img-src", "style-src", "script-src"}
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", rules["script-src"])
    assert not re.search(r"https?://", page)


def test_the_twin_of_an_edited_picture_is_of_the_same_edit(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    for i, edit in enumerate([{}, {"init_image": "a.png", "strength": 0.5}, {"init_image": "b.png"}] * 2):
        row = {"index": i, "text": "a" if i > 2 else "", "seed": 1, "guidance_weight": float(i > 2)}
        gallery.add(row | edit | {"image_prompt": f"{i}.png"}, Image.new("L", (4, 4)))
    data = embedded(make_page(gallery))
    assert data["edits"] == ["", "init_image a.png, strength 0.5", "init_image b.png"]
    assert [row[2] for row in data["rows"]] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("output", ["webdataset", "parquet"])
def test_pictures_of_shards_are_in_the_page(tmp_path: Path, output: str) -> None:
    rows = embedded(make_page(filled(tmp_path / "x", 1, output)))["rows"]
    assert len(rows) == 9
    assert all(row[0].startswith("data:image/jpeg;base64,") for row in rows)
    assert rows[1][6] == "000000001.png"
    assert re.fullmatch(r"000000000\.(tar|parquet)", rows[1][7])


def test_lines_that_another_one_has_changed_are_left_out(tmp_path: Path) -> None:
    gallery = filled(tmp_path / "x", 1)
    path = tmp_path / "x/metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    changes: list[dict] = [{"text": "\ud800"}, {"seed": "a"}, {"guidance_weight": float("nan")}, {"seed": None}]
    changes += [{"guidance_weight": 10**400}, {"clip_similarity": float("nan")}, {"made": float("inf")}]
    for line, change in zip(lines, changes, strict=False):
        line |= change
    del lines[7]["text"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = embedded(make_page(gallery))
    assert [row[6] for row in data["rows"]] == ["000000.png", "000005.png", "000006.png", "000008.png"]
    assert data["rows"][1][5] is None
    assert data["total"] == 9


def test_a_run_writes_the_page_anew_and_its_own_alone(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    filled(folder, 1)
    (folder / "config.predict.yaml").write_text("")
    PredictionWriter(str(folder)).finish()
    assert len(embedded((folder / "gallery.html").read_text())["rows"]) == 9
    filled(folder, 2)
    writer = PredictionWriter(str(folder))
    assert len(writer.check(PromptDataModule(n_samples=18).requests)) == 18
    writer.finish()
    assert len(embedded((folder / "gallery.html").read_text())["rows"]) == 18
    assert is_page(folder / "gallery.html")
    writer.gallery.clear()
    assert not (folder / "gallery.html").exists()
    (folder / "mine.html").write_text("<!doctype html>\n")
    (folder / "gallery.html").symlink_to("mine.html")
    assert not is_page(folder / "gallery.html")
    assert writer.gallery.find_stranger(set(), 18) == "gallery.html"


# in a browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,007 pictures and their page."""
    folder = tmp_path_factory.mktemp("pictures") / "it's #1?"
    write_page(filled(folder, 223))
    return folder


@pytest.fixture
def page(browser, folder: Path) -> Any:  # noqa: F811
    """The page, opened from the disk; it must load nothing else and report no fault."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text))
    page.on("request", lambda request: None if request.url.startswith("file:") else page.faults.append(request.url))
    page.goto((folder / "gallery.html").as_uri())
    yield page
    assert page.faults == []
    page.close()


def tiles(page: Any) -> list[dict]:
    return page.locator(".tile").evaluate_all(
        "tiles => tiles.map(tile => ({top: tile.getBoundingClientRect().top, name: tile.querySelector('img').src"
        ".split('/').pop(), whole: tile.querySelector('img').naturalWidth, text: tile.querySelector('img').alt,"
        "says: tile.textContent, similarity: Number(tile.querySelector('.caption').lastChild.textContent)}))"
    )


@pytest.mark.browser
def test_a_browser_shows_what_is_seen_alone_and_scrolls_to_the_end(page: Any) -> None:
    page.wait_for_function("[...document.images].some(image => image.naturalWidth == 8)")
    assert page.title().endswith("it's #1?")
    seen = tiles(page)
    assert 10 < len(seen) < 200
    assert seen[0]["name"] == "000001.png"  # the first text's; unguided pictures come last
    assert seen[0]["text"] == HOSTILE
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("[...document.images].some(image => image.src.endsWith('001998.png'))")
    assert len(tiles(page)) < 200
    assert tiles(page)[-1]["name"] == "001998.png"
    page.wait_for_function("[...document.querySelectorAll('.tile img[src]')].every(image => image.naturalWidth == 8)")


@pytest.mark.browser
def test_a_browser_filters_groups_and_sorts(page: Any) -> None:
    page.locator("[name=text]").fill("OLD man")
    assert page.locator("#shown").inner_text() == "446 of 2007 pictures"
    page.locator("[name=weight]").select_option("20")
    assert page.locator("#shown").inner_text() == "223 of 2007 pictures"
    page.locator("[name=sort]").select_option("high")
    found = [tile["similarity"] for tile in tiles(page)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0
    page.locator("[name=sort]").select_option("low")
    assert tiles(page)[0]["similarity"] == 0.0
    page.locator("[name=seed]").fill(str(2**60 + 7))
    assert [tile["name"] for tile in tiles(page)] == [f"{7 * 9 + 4:06d}.png"]
    page.locator("[name=text]").fill("nothing has this")
    assert page.locator("#none").is_visible()
    for name in ("text", "seed"):
        page.locator(f"[name={name}]").fill("")
    page.locator("[name=weight]").select_option("")
    page.locator("[name=sort]").select_option("")
    for group, first in (("seed", f"seed {2**60}"), ("weight", "weight 5"), ("text", f"“{HOSTILE}”")):
        page.locator("[name=group]").select_option(group)
        assert page.locator("h2 span").first.inner_text() == first
    page.locator("[name=group]").select_option("")
    assert page.locator("h2").count() == 0


@pytest.mark.browser
def test_a_browser_shows_the_unguided_twin_and_gives_the_command(page: Any) -> None:
    tile = page.locator(".tile").nth(2)
    assert tile.locator(".badge").is_hidden()
    tile.hover()
    assert tile.locator(".twin img").get_attribute("src") == "000009.png"  # of the second seed
    assert tile.locator(".badge").is_visible()
    tile.click()
    assert page.locator("dialog").is_visible()
    assert page.locator("#unguided").get_attribute("src") == "000009.png"
    commands = set()
    for _ in range(9):
        command = page.locator("#command").inner_text()
        commands.add(command)
        page.keyboard.press("ArrowRight")
    assert len(commands) == 9
    words = [shlex.split(command) for command in commands]
    assert all(each[:3] == ["clipward", "predict", "--again"] for each in words)
    assert all(Path(each[3]).is_file() and len(each) == 4 for each in words)
    page.locator("#copy").click()
    page.wait_for_function("document.getElementById('copy').textContent == 'Copied'")
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1600])
def test_a_page_is_as_wide_as_the_window_in_both_schemes(page: Any, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 700})
    page.locator(".tile").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
    red = page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
    assert (int(red) < 128) == (scheme == "dark")
