"""The Python API, on small models and on what ships."""

import re
import textwrap
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
        (lambda model: model.sample("a man", n_samples=0), "n_samples: got 0, expected 1 or more"),
        (lambda model: model.sample("a man", steps=3), "sampling: got steps, expected one of method, "),
        (lambda model: model.sample("a man", skip_steps=0), "skip_steps: got 0, expected 1 to 100"),
        (lambda model: model.sample("a man"), "clip: got none"),
        (lambda model: clipward.load("nothing.pt"), "weights: .*nothing.pt"),
        (lambda model: clipward.load("faces64", method="magic"), "method: got 'magic', expected auto or one of"),
    ],
)
def test_bad_input_is_one_line(call, message: str, tiny_weights: Path) -> None:
    with pytest.raises(clipward.InputError, match=message) as raised:
        call(clipward.load(tiny_weights))
    assert "\n" not in str(raised.value)


def test_the_readme_shows_python_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(textwrap.dedent(block).replace("n_samples=4", "n_samples=1, skip_steps=2"), {})
    assert list(tmp_path.glob("*.png"))
