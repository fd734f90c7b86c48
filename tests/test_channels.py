"""Grey, RGBA and N channels, and pictures that are not square: from training to the PNG."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_UNET, metadata, randomise, tiny_module, tiny_trainer
from PIL import Image

from clipward.callbacks.figure import GAP, Cell, draw_figure
from clipward.cli import main
from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.datamodules.faces import Faces, FacesDataModule
from clipward.diffusion.schedule import Scheduler
from clipward.errors import InputError
from clipward.guidance.core import grad_pixels
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.guidance.objectives import ClipSimilarity, Cutouts
from clipward.model import Model, load
from clipward.networks.channels import to_rgb
from clipward.networks.clip import Clip
from clipward.networks.unet import UNet
from clipward.pictures import read_picture
from clipward.sampler import Sampler, to_picture
from clipward.sampling_config import SamplingConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights, save_weights

STEP = replace(Architecture().noise_schedule().steps(10)[5])


def architecture(channels: int = 3, size: int | tuple[int, int] = 16) -> Architecture:
    return replace(TINY, unet=replace(TINY_UNET, image_channels=channels), image_size=size)


def weights_of(given: Architecture) -> Weights:
    return Weights(given, randomise(UNet(given.unet)).state_dict())


def save_pictures(folder: Path, count: int = 12, size: tuple[int, int] = (40, 20)) -> Path:
    """RGBA pictures of ``size``, which is a width and a height."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 4), np.uint8)).save(folder / f"{i}.png")
    return folder


# what the channels mean


def test_grey_is_repeated_and_rgba_lies_on_white() -> None:
    grey = torch.rand(2, 1, 4, 4) * 2 - 1
    assert torch.equal(to_rgb(grey), torch.cat([grey] * 3, dim=1))
    pixels = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8)
    ours = to_rgb((pixels.float() / 127.5 - 1)[None])[0]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    white = Image.new("RGBA", picture.size, "white")
    theirs = np.array(Image.alpha_composite(white, picture).convert("RGB"))
    assert ((ours.permute(1, 2, 0).numpy() + 1) * 127.5 - theirs).__abs__().max() <= 1


def test_a_picture_of_other_channels_is_refused_by_name() -> None:
    for show in (lambda: to_rgb(torch.zeros(1, 5, 4, 4)), lambda: to_picture(torch.zeros(2, 4, 4))):
        with pytest.raises(InputError, match=r"unet.image_channels: got [25], expected 1 \(grey\), 3"):
            show()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_what_is_read_is_what_was_saved(channels: int, mode: str, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (channels, 6, 10), dtype=torch.uint8)
    picture = to_picture(pixels.float() / 127.5 - 1)
    assert (picture.mode, picture.size) == (mode, (10, 6))
    picture.save(tmp_path / "a.png")
    assert torch.equal(read_picture(str(tmp_path / "a.png"), (6, 10), channels), pixels)


def test_grey_is_the_luma_and_an_opaque_picture_has_full_alpha(tmp_path: Path) -> None:
    colour = (200, 100, 20)
    Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
    grey = read_picture(str(tmp_path / "a.png"), (4, 4), 1)
    assert (grey.float() - (0.299 * 200 + 0.587 * 100 + 0.114 * 20)).abs().max() <= 0.5
    assert read_picture(str(tmp_path / "a.png"), (4, 4), 4)[:, 0, 0].tolist() == [*colour, 255]


def test_the_middle_of_a_picture_is_taken_in_the_proportions_asked_for(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (read_picture(str(tmp_path / "a.png"), (10, 10))[:, :, 1:-1] == 255).all()
    assert read_picture(str(tmp_path / "a.png"), (10, 30)).float().mean() == pytest.approx(255 / 3, abs=1)


# CLIP


@pytest.mark.parametrize("channels", [1, 4])
def test_the_gradient_at_clips_pixels_comes_back_to_the_picture(channels: int, tiny_clip: Path) -> None:
    """Where nothing is resized, it is the true gradient over CLIP's standard deviation."""
    clip = Clip.load(str(tiny_clip))
    objective = ClipSimilarity(clip, ["a man"])
    image = (torch.rand(1, channels, 16, 16) * 1.8 - 0.9).requires_grad_()
    found = objective.pixel_gradient(image)
    assert found.shape == image.shape
    std = torch.tensor(clip.preprocess["std"])[:, None, None]
    rgb = to_rgb(image)
    rgb_gradient = torch.autograd.grad(objective(rgb, STEP).sum(), rgb, retain_graph=True)[0]
    expected = torch.autograd.grad(rgb, image, 2 * std * rgb_gradient)[0]
    torch.testing.assert_close(found, expected)
    assert grad_pixels.needs_graph is False


def test_cutouts_of_a_wide_picture_are_squares_within_it() -> None:
    seen = []

    def objective(cuts: torch.Tensor, step: object) -> torch.Tensor:
        seen.append(cuts)
        return cuts.mean(dim=(1, 2, 3))

    image = torch.linspace(-1, 1, 32).expand(2, 3, 16, 32)
    noise = torch.Generator().manual_seed(0)
    Cutouts(objective, lambda name: torch.randn(2, 3, 16, 32, generator=noise), count=20)(image, STEP)
    assert {cut.shape for cut in seen} == {(2, 3, 16, 16)}
    assert min(cut.min() for cut in seen) < -0.8
    assert max(cut.max() for cut in seen) > 0.8  # they reach both ends


# networks and weights


def test_a_size_is_one_number_or_a_pair() -> None:
    square, wide = architecture(size=(16, 16)), architecture(size=(16, 32))
    assert square == architecture(size=16)
    assert (square.image_size, square.size) == (16, (16, 16))
    assert (wide.image_size, wide.size) == ((16, 32), (16, 32))
    assert json.loads(json.dumps(wide.to_dict()))["image_size"] == [16, 32]
    assert Architecture.from_dict(wide.to_dict()) == wide
    with pytest.raises(InputError, match=r"image_size: got \[16, 30\], expected multiples of 4"):
        architecture(size=(16, 30))


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (4, (16, 32)), (7, (32, 16))])
def test_weights_keep_channels_and_size(channels: int, size: int | tuple[int, int], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = replace(TINY_UNET, patch=1, image_channels=channels, freq_shift=0)
    given = replace(architecture(size=size), unet=unet)
    weights = weights_of(given)
    save_weights(tmp_path / "ours.safetensors", weights)
    assert load_weights(tmp_path / "ours.safetensors").architecture == given
    save_diffusers(tmp_path / "theirs", weights)
    leading = Scheduler(skip_type="leading")
    assert load_weights(tmp_path / "theirs").architecture == replace(given, unet=unet, scheduler=leading)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs/unet")
    network = UNet(unet)
    weights.into(network)
    x, t = torch.randn(2, channels, *given.size), torch.tensor([3, 60])
    torch.testing.assert_close(network.eval()(x, t), theirs(x, t).sample)
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs").unet.config.sample_size in (size, [*given.size])


# Python


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_python_draws_guided_pictures(channels: int, mode: str, tiny_clip: Path, tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", weights_of(architecture(channels, (16, 24))))
    model = load(tmp_path / "a.safetensors", clip=str(tiny_clip), device="cpu", skip_steps=3, method="cutouts")
    guided = model.sample("a man", n_samples=1)[0]
    assert (guided.mode, guided.size) == (mode, (24, 16))
    assert list(guided.getdata()) != list(model.sample(n_samples=1)[0].getdata())


def test_python_draws_tensors_of_any_number_of_channels() -> None:
    given = architecture(5)
    network = UNet(given.unet)
    weights_of(given).into(network)
    model = Model(Sampler(network, given, GuidanceModels(GuidanceConfig()), SamplingConfig(skip_steps=3)))
    assert model.sample(n_samples=2, return_tensors=True).shape == (2, 5, 16, 16)
    with pytest.raises(InputError, match=r"unet\.image_channels: got 5"):
        model.sample(n_samples=2)


# data


def test_faces_may_be_grey_and_not_square() -> None:
    colour, grey, tall = Faces(0, 2, 32), Faces(0, 2, 32, channels=1), Faces(0, 2, (32, 24))
    rgb = ((colour[0]["image"] + 1) * 127.5).round()
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)
    assert ((grey[0]["image"][0] + 1) * 127.5 - luma).abs().max() <= 1
    assert torch.equal(tall[0]["image"], colour[0]["image"][:, :, 4:-4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels": 2}, "data.channels: got 2, expected 1 or 3 or 4"),
        ({"size": (16, 0)}, "data.size: got 0, expected a whole number from 1"),
        ({"size": (16, 16, 3)}, "data.size: got .*, expected a whole number or a height and a width"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CelebAHQDataModule("nowhere", **given)


@pytest.mark.parametrize(
    ("network", "data", "message"),
    [
        ({"channels": 3}, {"channels": 1}, "data.channels: got 1, expected 3, the model's unet.image_channels"),
        ({"size": (16, 24)}, {}, r"data.size: got 16, expected \[16, 24\], the model's"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_data_that_differ_from_the_model_are_one_line(
    command: str, network: dict, data: dict, message: str, tmp_path: Path
) -> None:
    module = tiny_module(unet=architecture(**network).unet, image_size=architecture(**network).image_size)
    faces = FacesDataModule(**{"size": 16, "train_count": 8, "val_count": 8, "batch_size": 8} | data)
    with pytest.raises(InputError, match=message):
        getattr(tiny_trainer(tmp_path, max_steps=1), command)(module, faces)


# the command line


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size", "mode"), [(1, 16, "L"), (3, [16, 24], "RGB"), (4, [32, 16], "RGBA")])
def test_train_draw_and_judge(
    channels: int,
    size: int | list[int],
    mode: str,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = save_pictures(tmp_path / "pictures")
    data = {"path": str(pictures), "size": size, "channels": channels, "batch_size": 4, "val_count": 4}
    (tmp_path / "data.yaml").write_text(
        json.dumps({"class_path": "clipward.datamodules.celebahq.CelebAHQDataModule", "init_args": data})
    )
    shape = ["--model.network.unet.image_channels", str(channels), "--model.network.image_size", str(size)]
    main(["fit", "-c", config, *shape, "--data", "data.yaml", "--model.save_path", "own.safetensors"])
    samples = Image.open(next((tmp_path / "runs").rglob("samples/*.png")))
    assert samples.mode == "RGB"
    for output in ("files", "parquet"):
        flags = ["--weights", "own.safetensors", "--text", "a man", "--n_samples", "2", "--output", output]
        main(["predict", "-c", config, *flags, "--save_dir", output])
        assert len(metadata(tmp_path / output)) == 4
        assert Image.open(tmp_path / output / "grid.png").mode == "RGB"
    with Image.open(tmp_path / "files/000001.png") as picture:
        height, width = (size, size) if isinstance(size, int) else size
        assert (picture.mode, picture.size) == (mode, (width, height))
    assert f"parameters, {width}×{height} pixels" in " ".join(capsys.readouterr().out.split())
    judge = ["--judge", "clipward:faces64/judge.safetensors", "--save_dir", "judged", "--data", "data.yaml"]
    main(["test", "-c", config, "--weights", "own.safetensors", "--text", "a man", "--n_samples", "2", *judge])
    assert json.loads((tmp_path / "judged/report.json").read_text())["table"][0]["fid"] > 0


def test_channels_that_no_picture_has_are_refused_before_anything_is_written(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_weights(tmp_path / "two.safetensors", weights_of(architecture(2)))
    with pytest.raises(SystemExit, match=r"unet\.image_channels: got 2"):
        main(
            ["predict", "-c", config, "--weights", str(tmp_path / "two.safetensors"), "--save_dir", str(tmp_path / "o")]
        )
    assert not (tmp_path / "o").exists()


def test_a_figure_has_cells_in_the_proportions_of_the_pictures() -> None:
    clear = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    sheet = draw_figure({Cell(seed, "a man", 1.0): clear for seed in range(2)})
    assert sheet.width == 2 * (160 + GAP) + GAP
    assert sheet.getpixel((80, sheet.height - GAP - 40)) == (255, 255, 255)
