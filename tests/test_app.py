"""``clipward app``: what it draws, what it says of it, and the page in a browser."""

import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import browser  # noqa: F401
from PIL import Image

from clipward.cli import main
from clipward.cli.app import OWN_HOST, Order, Studio, check_free, load_studio, make_server
from clipward.errors import InputError

ORDER = Order("an old man", 20.0, 3, 2, "contrastive_denoised", 4)


@pytest.fixture
def studio(config: str, tmp_path: Path) -> Studio:
    studio = load_studio(config, device="cpu", save_dir=str(tmp_path / "app"))
    return studio


def test_pictures_form_step_by_step(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipward.cli.app.BETWEEN", 0)
    seen = list(studio.draw(ORDER))
    pictures, said = seen[-1]
    assert said.startswith("done in ")
    assert [caption.split(",")[0] for _, caption in pictures] == ["seed 3", "seed 4"]
    expected = studio.model.sample("an old man", guidance_weight=20, n_samples=2, seed=3, method=ORDER.method)
    assert [picture.tobytes() for picture, _ in pictures] == [picture.tobytes() for picture in expected]
    for pictures, said in seen[:-1]:
        assert said.startswith("step ")
        assert [picture.size for picture, _ in pictures] == [(16, 16)] * 2


def test_the_command_draws_the_picture(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("it's --an 'old' man", ""):
        order = Order(text, 20.0, 3, 2, "contrastive_denoised", 4)
        *_, (pictures, _) = studio.draw(order)
        for (picture, _), command, seed in zip(pictures, studio.commands(order), (3, 4), strict=True):
            program, *arguments = shlex.split(command)
            assert program == "clipward"
            main([*arguments, f"--save_dir=out/{text}{seed}"])
            assert Image.open(f"out/{text}{seed}/000000.png").tobytes() == picture.tobytes()
            assert len(list(Path(f"out/{text}{seed}").glob("0*.png"))) == 1


def test_the_command_edits_the_picture(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer = Image.new("RGBA", (40, 40))
    layer.paste("white", (0, 0, 40, 20))
    image, mask = studio.keep({"background": Image.effect_noise((40, 40), 90).convert("RGBA"), "layers": [layer]})
    drawn = []
    for number, edit in enumerate([{}, {"init_image": image}, {"init_image": image, "mask": mask, "strength": 0.8}]):
        order = Order(**(vars(ORDER) | {"n_samples": 1, "strength": 0.5} | edit))
        *_, (pictures, _) = studio.draw(order)
        drawn.append(pictures[0][0].tobytes())
        main([*shlex.split(studio.commands(order)[0])[1:], f"--save_dir={number}"])
        assert Image.open(f"{number}/000000.png").tobytes() == drawn[-1]
    assert len(set(drawn)) == 3


def test_a_new_drawing_ends_the_one_before(studio: Studio) -> None:
    first = studio.draw(Order("", 0.0, 0, 1, "auto", 100))
    next(first)
    worker = studio._worker
    assert worker.is_alive()
    *_, (pictures, _) = studio.draw(ORDER)
    assert len(pictures) == 2
    assert not worker.is_alive()
    assert "step" in next(first, ((), "step"))[1]
    assert list(first) == []


def test_what_cannot_be_drawn_is_told(studio: Studio) -> None:
    for values, message in (
        ({"n_samples": 17}, "pictures: got 17, expected 1 to 16"),
        ({"seed": -1}, "seed: got -1"),
        ({"guidance_weight": float("nan")}, "guidance_weight: got nan"),
        ({"text": "a\0"}, "text: got"),
    ):
        with pytest.raises(InputError, match=message):
            Order(**(vars(ORDER) | values))
    with pytest.raises(InputError, match="text: "):
        list(studio.draw(Order("word " * 100, 20.0, 0, 1, "contrastive_denoised", 4)))
    studio.model.sampler.models.objectives = None
    with pytest.raises(TypeError):  # an error of ours is not hidden
        list(studio.draw(Order("a", 20.0, 0, 1, "clip_guidance", 1)))


def test_the_methods_are_those_whose_models_are_at_hand(studio: Studio) -> None:
    assert {"auto", "clip_guidance", "glide", "classifier_guidance"} <= set(studio.methods)
    object.__setattr__(studio.model.sampler.models.config, "noisy_clip", None)
    assert "glide" not in studio.methods
    assert "clip_guidance" in studio.methods


def test_what_is_brushed_becomes_a_mask(studio: Studio, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (20, 30), (200, 10, 10, 255))
    layer = Image.new("RGBA", (20, 30))
    assert studio.keep(None) == studio.keep({"background": None, "layers": []}) == (None, None)
    assert studio.keep({"background": layer, "layers": [layer]}) == (None, None)
    path, mask = studio.keep({"background": picture, "layers": [layer]})
    assert mask is None
    assert Image.open(path).getpixel((0, 0)) == (200, 10, 10)
    layer.paste((255, 255, 255, 255), (5, 6, 10, 20))
    again, mask = studio.keep({"background": picture, "layers": [layer]})
    assert again == path
    assert Image.open(mask).mode == "L"
    assert Image.open(mask).getbbox() == (5, 6, 10, 20)
    assert sorted((tmp_path / "app").iterdir()) == sorted([path, mask])


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r'error: app: Gradio is not installed; use pip install "gradio>=6\.31,<7"$'):
        main(["app", "--save_dir", str(tmp_path / "x")])
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind((OWN_HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port: can't listen at {OWN_HOST}:{port} "):
            check_free(OWN_HOST, port)


@pytest.mark.parametrize("host", ["a b", "8.8.8.8", "x" * 300, "nowhere.invalid"])
def test_an_address_of_another_machine_is_told(host: str) -> None:
    with pytest.raises(InputError, match=f"host: got .*, expected an address of this machine, such as {OWN_HOST}"):
        check_free(host, 7860)


def test_a_config_that_draws_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config: got 'faces_clip', expected one of a model that draws"):
        load_studio("faces_clip")
    with pytest.raises(InputError, match="config: got 'nowhere', expected a YAML file or one of "):
        load_studio("nowhere")
    for section in ("null", "other.yaml", "{class_path: clipward.lightning_modules.ddpm.DDPMModule}"):
        (tmp_path / "other.yaml").write_text(f"model: {section}")
        with pytest.raises(InputError, match=r"config: got .*other.yaml', expected one of a model that draws"):
            load_studio(str(tmp_path / "other.yaml"))


def test_the_page_draws_with_the_model_of_its_config(config: str, tmp_path: Path, tiny_weights: Path) -> None:
    other = yaml.safe_load(Path(config).read_text())
    model = other["model"]["init_args"]
    model |= {"weights": model.pop("default_weights"), "default_weights": "nowhere.safetensors"}
    model["guidance"]["negative_text"] = "a beard"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    sampler = load_studio(str(tmp_path / "other.yaml"), device="cpu").model.sampler
    assert sampler.models.config.negative_text == "a beard"
    model["guidance"]["clipp"] = "x"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(InputError, match="settings: got 'clipp', expected names among clip, "):
        load_studio(str(tmp_path / "other.yaml"))


# in a browser


@pytest.fixture
def address(studio: Studio) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("gradio")
    import uvicorn

    with socket.socket() as free:
        free.bind((OWN_HOST, 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_server(studio, OWN_HOST, port), OWN_HOST, port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://{OWN_HOST}:{port}"
    server.should_exit = True
    studio.stop()
    thread.join(10)


@pytest.fixture
def page(browser, address: str) -> Any:  # noqa: F811
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.browser
def test_a_browser_draws_and_shows_the_commands(page: Any, studio: Studio) -> None:
    page.get_by_label("Text").fill("<b>an old man</b> it's")
    page.get_by_label("number input for Steps").fill("4")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelector('#said textarea, #said input').value.startsWith('done in')")
    page.wait_for_function("document.querySelectorAll('#pictures img').length == 4")
    assert page.locator("#pictures b").count() == 0
    order = Order("<b>an old man</b> it's", 20.0, 1, 4, "auto", 4)
    lines = page.locator("#commands .cm-line").all_inner_texts()
    assert lines == studio.commands(order)


@pytest.mark.browser
def test_a_browser_edits_what_is_brushed(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (10, 200, 10)).save(tmp_path / "green.png")
    page.get_by_text("Edit a picture").click()
    said = page.locator("#edit").get_by_text("Upload an image")
    said.wait_for()
    for _ in range(20):  # an upload is lost where the editor is not ready yet
        if said.is_visible():
            page.locator("#edit input[type=file]").first.set_input_files(tmp_path / "green.png")
            page.wait_for_timeout(3000)
    page.get_by_role("button", name="Brush", exact=True).click()
    canvas = page.locator("#edit canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 20, middle[1])
    page.mouse.down()
    page.mouse.move(*middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.get_by_label("number input for Steps").fill("4")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_function("document.querySelector('#said textarea, #said input').value.startsWith('done in')")
    assert all("--mask=" in line for line in page.locator("#commands .cm-line").all_inner_texts())
    (picture,), (mask,) = ([*(tmp_path / "app").glob(f"{kind}-*.png")] for kind in ("picture", "mask"))
    assert Image.open(picture).getpixel((2, 2)) == (10, 200, 10)
    brushed = Image.open(mask).histogram()[255]
    assert 0 < brushed < Image.open(mask).width * Image.open(mask).height / 2


@pytest.mark.browser
def test_a_browser_stops_a_drawing_and_shows_what_is_wrong(page: Any) -> None:
    page.get_by_label("number input for Steps").fill("100")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelector('#said textarea, #said input').value.startsWith('step')")
    page.get_by_role("button", name="Stop").click()
    page.get_by_label("Text").fill("word " * 100)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("text: ").first.wait_for()
