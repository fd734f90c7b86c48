"""The Python API, on small models and on what ships."""

import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_of, tiny_faces, tiny_module, tiny_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import clipward
from clipward.cli import main

TEXT = "an old man with a smile"


def test_python_gives_the_pixels_of_the_command_line(tmp_path: Path) -> None:
    model = clipward.load("faces64", skip_steps=3)
    pictures = model.sample([TEXT], guidance_weight=20, n_samples=2, seed=1)
    request = ["--text", TEXT, "--guidance_weight", "20", "--n_samples", "2", "--seed", "1", "--unguided", "false"]
    main(["predict", *request, "--skip_steps", "3", "--save_dir", str(tmp_path / "x")])
    for index, picture in enumerate(pictures):
        with Image.open(tmp_path / f"x/{index:06d}.png") as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_a_call_may_have_settings_of_its_own(tiny_weights: Path, tiny_clip: Path) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip), skip_steps=4)
    states = []
    image = model.sample(TEXT, n_samples=3, callback=states.append, return_tensors=True, skip_steps=2)
    assert image.shape == (3, 3, 16, 16)
    assert image.abs().max() <= 1
    assert [state.step.s >= 0 for state in states] == [True, False]
    assert states[0].x.shape == states[0].x0.shape == image.shape
    torch.testing.assert_close(states[-1].x.clamp(-1, 1), image)
    assert model.sampler.config.skip_steps == 4
    assert len(model.sample(n_samples=2)) == 2
    assert len(model.schedule) == 100
    assert model.network(torch.zeros(1, 3, 16, 16), torch.zeros(1)).shape == (1, 3, 16, 16)


def test_no_image_prompt_is_none(tiny_weights: Path, tiny_clip: Path) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip), skip_steps=2)
    plain = model.sample(return_tensors=True)
    assert torch.equal(model.sample(return_tensors=True, image_prompt=None), plain)


def test_pictures_can_be_guided_within_inference_mode(tiny_weights: Path, tiny_clip: Path) -> None:
    def draw() -> torch.Tensor:
        return clipward.load(tiny_weights, clip=str(tiny_clip), skip_steps=2).sample(TEXT, return_tensors=True)

    with torch.inference_mode():
        found = draw()
    assert torch.equal(found, draw())


def test_threads_may_share_a_model(tiny_weights: Path, tiny_clip: Path) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip))
    calls = [{"skip_steps": steps, "negative_text": unwanted} for steps in (2, 3, 4) for unwanted in (None, "a hat")]

    def draw(settings: dict) -> torch.Tensor:
        return model.sample(TEXT, n_samples=2, return_tensors=True, **settings)

    alone = [draw(settings) for settings in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(draw, calls))
    assert all(map(torch.equal, together, alone))
    assert not any(torch.equal(alone[0], other) for other in alone[1:])


def test_a_model_that_fit_made(tmp_path: Path, tiny_clip: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2)
    tiny_trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True).fit(tiny_module(), tiny_faces())
    model = clipward.load(checkpoint_of(tmp_path / "ckpt"), clip=str(tiny_clip), skip_steps=2)
    first, second = model.sample([TEXT, "a girl"], n_samples=1, guidance_weight=50)
    assert first.size == second.size == (16, 16)
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample("a man", n_samples=0), "n_samples: got 0, expected 1 to 1000000"),
        (lambda model: model.sample("a man", steps=3), "settings: got 'steps', expected names among method, "),
        (lambda model: model.sample("a man", skip_steps=0), "skip_steps: got 0, expected 1 to 100"),
        (lambda model: model.sample("a man"), "clip: got none"),
        (lambda model: clipward.load("nothing.pt"), "weights: .*nothing.pt"),
        (lambda model: model.sample(var_type="fixed"), "var_type: got 'fixed', expected one of fixed_small, "),
        (lambda model: model.sample(skip_type="even"), "skip_type: got 'even', expected one of uniform, "),
        *(
            (
                lambda model, given=given: model.sample(method="dsg", **given),
                f"method: got dsg with the steps of {name}",
            )
            for given, name in (({"ddim": True}, "ddim"), ({"solver": "sde_dpmpp_2m"}, "sde_dpmpp_2m"))
        ),
        (
            lambda model: clipward.load("faces64", clip=["a", "b"], clip_weights=[float("inf"), 1.0]),
            "clip_weights: got \\[inf, 1.0\\], expected a number above 0 for each of 2 CLIPs",
        ),
        (lambda model: clipward.load("faces64", method="magic"), "method: got 'magic', expected auto or one of"),
    ],
)
def test_bad_input_is_one_line(call, message: str, tiny_weights: Path) -> None:
    with pytest.raises(clipward.InputError, match=message) as raised:
        call(clipward.load(tiny_weights))
    assert "\n" not in str(raised.value)


def test_all_texts_are_checked_before_any_is_drawn(
    tiny_weights: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip))
    monkeypatch.setattr(model, "_draw", None)
    with pytest.raises(clipward.InputError, match=r"text: .* tokens too long"):
        model.sample(["a man", "man " * 99], n_samples=16)


def test_no_clip_is_loaded_that_nothing_needs(tiny_weights: Path, noisy_clip: str) -> None:
    model = clipward.load(tiny_weights, clip="nowhere", noisy_clip=noisy_clip, skip_steps=1)
    model.sample(n_samples=1)
    model.sample("a man", guidance_weight=0, n_samples=1)
    assert not model.sampler.models.loaded()
    model.sample("a man", n_samples=1, skip_steps=4)
    assert [clip.name for clip in model.sampler.models.loaded()] == [noisy_clip]


def test_the_readme_shows_python_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(textwrap.dedent(block).replace("n_samples=4", "n_samples=1, skip_steps=2"), {})
    assert list(tmp_path.glob("*.png"))


@pytest.fixture(scope="module")
def tiny(tiny_weights: Path) -> clipward.Model:
    return clipward.load(tiny_weights)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", 3, "text: got 3, expected a sentence or a list of sentences"),
        ("text", [3], "text: got 3, expected a sentence"),
        ("text", None, "text: got None, expected a sentence or a list"),
        ("text", "\ud800", r"expected one without the character U\+D800"),
        ("text", ["a man", "\t"], "text: got an empty one, expected sentences; leave it out"),
        ("n_samples", "2", "n_samples: got '2', expected 1 to 1000000"),
        ("n_samples", 2**40, "n_samples: got 1099511627776"),
        ("progress", "x", "progress: got 'x', expected true or false"),
        ("return_tensors", 1, "return_tensors: got 1, expected true or false"),
        ("init_image", Image.new("RGB", (0, 5)), "init_image: got a picture of 0×5 pixels"),
        ("n_samples", 1.5, "n_samples: got 1.5"),
        ("n_samples", True, "n_samples: got True"),
        ("seed", -1, "seed: got -1, expected a whole number from 0"),
        ("seed", "1", "seed: got '1'"),
        ("seed", 2**70, "seed: got"),
        ("guidance_weight", "x", "guidance_weight: got 'x', expected a finite number"),
        ("guidance_weight", [1], r"guidance_weight: got \[1\]"),
        ("guidance_weight", 1e300, "guidance_weight: got 1e"),
        ("callback", 3, "callback: got 3, expected a function"),
        ("skip_steps", "x", "sampling.skip_steps: got 'x', expected a whole number"),
        ("skip_steps", 2.5, "sampling.skip_steps: got 2.5"),
        ("ddim", "yes", "sampling.ddim: got 'yes', expected true or false or null"),
        ("ddim_eta", "x", "sampling.ddim_eta: got 'x', expected a number"),
        ("method", ["glide"], r"sampling.method: got \['glide'\]"),
        ("interval", "ab", "sampling.interval: got 'ab', expected a list of 2 numbers or null"),
        ("candidates", "2", "sampling.candidates: got '2'"),
        ("repeats", 1.5, "sampling.repeats: got 1.5"),
        ("weight_schedule", 3, "sampling.weight_schedule: got 3, expected a text or null"),
        ("class_weight", "x", "sampling.class_weight: got 'x'"),
        ("negative_text", " ", "negative_text: got ' ', expected a phrase; leave it out"),
        ("negative_text", 3, "guidance.negative_text: got 3, expected a text or null"),
    ],
)
def test_a_value_of_another_type_is_one_line(field: str, value: object, message: str, tiny: clipward.Model) -> None:
    with pytest.raises(clipward.InputError, match=message) as raised:
        tiny.sample(**{"text": "a man", "n_samples": 1, field: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clip", 3, "guidance.clip: got 3, expected a text or a list of texts or null"),
        ("neutral", 3, "guidance.neutral: got 3"),
        ("contrasts", 5, "guidance.contrasts: got 5, expected a text or a list of lists or null"),
        ("device", "nope", "device: got 'nope', expected one of this machine"),
        ("device", "meta", "device: got 'meta', expected one of this machine"),
        ("device", "", "device: got '', expected one of this machine"),
        ("neutral", "", "neutral: got '', expected a sentence"),
        ("neutral", "\ud800", "neutral: got .*, expected a sentence"),
        ("use_ema", "yes", "use_ema: got 'yes', expected true or false"),
        ("compile", 1, "compile: got 1, expected true or false"),
        ("foo", 1, "settings: got 'foo', expected names among method"),
    ],
)
def test_an_argument_of_another_type_is_one_line(field: str, value: object, message: str) -> None:
    with pytest.raises(clipward.InputError, match=message):
        clipward.load("faces64", **{field: value})


def test_a_negative_text_needs_a_text(tiny: clipward.Model) -> None:
    with pytest.raises(clipward.InputError, match="negative_text: got 'hats', but no picture is guided"):
        tiny.sample(n_samples=1, negative_text="hats")
