"""Editing: init images, masks, outpainting and inversion, by closed forms and on small models."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY_CLIP, metadata, tiny_module
from datasets import load_dataset
from PIL import Image
from pyarrow import parquet
from torch import Tensor

import clipward
from clipward.cli import main
from clipward.datamodules.prompts import Dealt, PromptDataModule, Request
from clipward.datamodules.sources import Folder
from clipward.diffusion.denoiser import Prediction, add_noise, to_eps
from clipward.diffusion.sampling import Inversion, KeepKnown, Noise, ancestral, ddim, sample
from clipward.diffusion.schedule import Schedule, Step, time_travel
from clipward.editing import Edit, list_kinds
from clipward.errors import InputError
from clipward.guidance.methods import METHODS
from clipward.networks.clip import OPENAI_PREPROCESSING, Clip, make_noise_aware, save_folder
from clipward.sampler import Sampler, to_picture
from clipward.sampling_config import SamplingConfig

SCHEDULE = Schedule.from_name("cosine", 1000)


# closed forms: pictures of four pixels in a row, whose distribution is a normal one with a covariance

PIXELS = 4
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
COVARIANCE = 0.25 * 0.8 ** (torch.arange(PIXELS)[:, None] - torch.arange(PIXELS)).abs().double()


def ideal(x: Tensor, step: Step) -> Prediction:
    """E[x0 | x_t], which the best of all networks would predict."""
    a = step.alpha_bar_t
    gain = a**0.5 * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(PIXELS, dtype=torch.float64))
    flat = x.double().reshape(-1, PIXELS)
    x0 = (MEAN + (flat - a**0.5 * MEAN) @ gain.T).reshape(x.shape)
    return Prediction(x0, to_eps(x0, x.double(), a), x.new_tensor(step.posterior_variance))


def draw_around(known: Tensor, is_new: Tensor, n: int, repeats: int, count: int = 8000) -> Tensor:
    """(count, PIXELS): what is drawn where ``is_new``, around what is known."""
    shape = (1, count, PIXELS)  # many pictures as the rows of one, whose noise is quick to draw
    noise = Noise([0], shape)
    keep = KeepKnown(known.expand(1, *shape), is_new.double().expand(1, *shape), 1000, noise)
    *_, last = sample(ideal, time_travel(SCHEDULE.steps(n), repeats), ancestral, noise, constrain=keep)
    return last.x.reshape(count, PIXELS)


def test_what_is_drawn_around_a_known_part_has_its_conditional_mean_and_variance() -> None:
    known, is_new = torch.tensor([0.9, 0.0, 0.0, -0.8], dtype=torch.float64), torch.tensor([False, True, True, False])
    old = ~is_new
    inverse = torch.linalg.inv(COVARIANCE[old][:, old])
    mean = MEAN[is_new] + COVARIANCE[is_new][:, old] @ inverse @ (known - MEAN)[old]
    covariance = COVARIANCE[is_new][:, is_new] - COVARIANCE[is_new][:, old] @ inverse @ COVARIANCE[old][:, is_new]
    drawn = draw_around(known, is_new, n=200, repeats=10)
    assert torch.equal(drawn[:, old], known[old].expand(len(drawn), -1))
    torch.testing.assert_close(drawn[:, is_new].mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn[:, is_new].T.cov(), covariance, atol=0.01, rtol=0)
    errors = [(draw_around(known, is_new, 50, repeats)[:, is_new].mean(dim=0) - mean).abs().max() for repeats in (1, 4)]
    assert errors[1] < 0.4 * errors[0]  # going back up makes the new part fit the old one


def test_an_inversion_comes_back_the_closer_the_more_steps_it_takes() -> None:
    image = (MEAN + torch.randn(16, PIXELS, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCE).T)[:, None, None]

    def round_trip(n: int, passes: int) -> float:
        steps, noise = SCHEDULE.steps(n), Noise([0], (1, 1, PIXELS))
        up = [step for step in reversed(steps) for _ in range(passes)]
        *_, top = sample(ideal, up, Inversion(), noise, image)
        *_, back = sample(ideal, steps, ddim(0.0), noise, top.x)
        return (back.x - image).square().mean().sqrt().item()

    errors = [round_trip(n, 1) for n in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert round_trip(40, 3) < 0.1 * errors[1]
    assert round_trip(160, 3) < 1e-3


# small models


def save_picture(path: Path, size: int = 16, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def save_mask(path: Path, values: np.ndarray) -> str:
    Image.fromarray((255 * values).astype(np.uint8)).save(path)
    return str(path)


LEFT_HALF = np.arange(16)[None, :].repeat(16, axis=0) < 8


@pytest.fixture
def picture(tmp_path: Path) -> str:
    return save_picture(tmp_path / "picture.png")


@pytest.fixture
def mask(tmp_path: Path) -> str:
    return save_mask(tmp_path / "mask.png", LEFT_HALF)


def make_sampler(weights: Path, **settings: object) -> Sampler:
    module = tiny_module(weights=str(weights), sampling=SamplingConfig(**{"skip_steps": 5, **settings}))
    module.configure_model()
    return module.sampler


def draw(sampler: Sampler, edit: Edit | None, count: int = 2) -> Tensor:
    return sampler.sample([""] * count, list(range(count)), [0.0] * count, edits=[edit] * count)[0]


def test_strength_goes_from_the_picture_to_plain_sampling(tiny_weights: Path, picture: str) -> None:
    sampler = make_sampler(tiny_weights, ddim=False)
    image = Edit(picture).read_image((3, 16, 16))
    assert torch.equal(draw(sampler, Edit(picture, strength=0)), image.expand(2, -1, -1, -1))
    assert torch.equal(draw(sampler, Edit(picture, strength=1)), draw(sampler, None))
    assert [step.t for step in sampler.list_steps(Edit(picture, strength=0.5))] == [40, 20, 0]
    states = []
    sampler.sample([""], [3], [0.0], watch=states.append, edits=[Edit(picture, strength=0.5)])
    assert [state.step.t for state in states] == [40, 20, 0]


def test_a_walk_starts_from_the_picture_noised_to_the_strength(
    tiny_weights: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, starts = make_sampler(tiny_weights), []
    forward = type(sampler.network).forward

    def watch(self: torch.nn.Module, x: Tensor, t: Tensor) -> Tensor:
        starts.append(x)
        return forward(self, x, t)

    monkeypatch.setattr(type(sampler.network), "forward", watch)
    draw(sampler, Edit(picture, strength=0.5))
    noise, image = Noise([0, 1], (3, 16, 16))(0), Edit(picture).read_image((3, 16, 16))
    expected = add_noise(image, noise, sampler.schedule.alpha_bar[40].item())
    torch.testing.assert_close(starts[0][:2], expected)


@pytest.mark.parametrize("settings", [{}, {"solver": "unipc"}, {"ddim": True}], ids=str)
def test_what_is_black_comes_back_to_the_byte(tiny_weights: Path, picture: str, tmp_path: Path, settings: dict) -> None:
    grey = np.where(LEFT_HALF, 1.0, 0.0)
    grey[:, 6:8] = 0.5
    drawn = draw(make_sampler(tiny_weights, **settings), Edit(picture, mask=save_mask(tmp_path / "grey.png", grey)))
    original = np.asarray(Image.open(picture))
    for image in drawn:
        pixels = np.asarray(to_picture(image))
        assert np.array_equal(pixels[:, 8:], original[:, 8:])
        assert (pixels[:, :8] != original[:, :8]).mean() > 0.5
    nothing = Edit(picture, mask=save_mask(tmp_path / "black.png", np.zeros((16, 16))))
    assert np.array_equal(np.asarray(to_picture(draw(make_sampler(tiny_weights, **settings), nothing)[0])), original)


def test_grey_is_drawn_anew_from_a_lower_noise_level() -> None:
    image, noise = torch.zeros(1, 1, 1, 3), Noise([0], (1, 1, 3))
    keep = KeepKnown(image, torch.tensor([0.0, 0.5, 1.0])[None, None, None], 1000, noise)
    x = torch.full((1, 1, 1, 3), 9.0)
    changed = {s: (keep(x, SCHEDULE.step(s + 20, s)) == 9)[0, 0, 0].tolist() for s in (900, 499, 498, 0)}
    assert changed == {
        900: [False, False, True],
        499: [False, False, True],
        498: [False, True, True],
        0: [False, True, True],
    }
    assert keep(x, SCHEDULE.step(0, -1)).flatten().tolist() == [0, 9, 9]


def test_a_mask_takes_each_step_several_times(tiny_weights: Path, picture: str, mask: str) -> None:
    sampler = make_sampler(tiny_weights)
    assert (sampler.repeats(), sampler.repeats(Edit(picture)), sampler.repeats(Edit(picture, mask=mask))) == (1, 1, 4)
    assert make_sampler(tiny_weights, repeats=2).repeats(Edit(picture, mask=mask)) == 2
    assert make_sampler(tiny_weights, method="universal").repeats(Edit(picture, mask=mask)) == 5


def test_outpainting_moves_the_picture_and_draws_the_rest(tiny_weights: Path, picture: str) -> None:
    edit = Edit(picture, outpaint=(0.5, 0.25, 0, 0.25))
    small = np.asarray(Image.open(picture).resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    image, mask = edit.read_image((3, 16, 16)), edit.read_mask((3, 16, 16))[0]
    assert torch.equal(((image[:, 4:12, 8:] + 1) * 127.5).round(), torch.tensor(small).float())
    assert torch.equal(mask == 0, torch.nn.functional.pad(torch.ones(8, 8), (8, 0, 4, 4)) == 1)
    drawn = draw(make_sampler(tiny_weights), edit)
    assert torch.equal(drawn[0][:, 4:12, 8:], image[:, 4:12, 8:])
    assert (drawn[0] != image).any()


def test_an_inverted_picture_comes_back_and_says_how_closely(tiny_weights: Path, picture: str) -> None:
    def make(n: int) -> tuple[Sampler, Tensor]:
        sampler = make_sampler(tiny_weights, skip_steps=n, clip_denoised=False)
        return sampler, draw(sampler, Edit(picture, strength=0.5, invert=True))

    errors = []
    for n in (10, 100):
        sampler, drawn = make(n)
        record = sampler.describe(Edit(picture, strength=0.5, invert=True))
        error = (drawn[0] - Edit(picture).read_image((3, 16, 16))).square().mean().sqrt().item()
        assert record["round_trip_error"] == pytest.approx(error, rel=0.05)
        assert record["sampler"] == "ddim(eta=0)"
        assert torch.equal(drawn[0], drawn[1])  # whatever the seed
        errors.append(error)
    assert errors[1] < 0.3 * errors[0]


def test_an_inversion_is_as_close_whichever_steps_the_weights_ask_for(tiny_weights: Path, picture: str) -> None:
    errors, edit = [], Edit(picture, strength=0.5, invert=True)
    for name in ("ddpm", "ddim"):
        sampler = make_sampler(tiny_weights, skip_steps=20, skip_type="uniform")
        scheduler = replace(sampler.architecture.scheduler, sampler=name)
        sampler.architecture = replace(sampler.architecture, scheduler=scheduler)
        draw(sampler, edit)
        errors.append(sampler.describe(edit)["round_trip_error"])
    assert errors[0] == errors[1]


def test_processes_that_share_a_network_pass_it_equally_often(
    tiny_weights: Path, tiny_clip: Path, picture: str, tmp_path: Path
) -> None:
    Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "other.png")
    same, both = (
        [Edit(name, strength=0.5, invert=True) for name in (picture, other)]
        for other in (picture, str(tmp_path / "other.png"))
    )
    passes = []
    for text, edits in (("", None), ("a man", None), ("", same), ("", both)):
        config = SamplingConfig(skip_steps=4, batch_multiple=1, candidates=3)
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=config)
        module.configure_model()
        sampler = module.sampler
        sampler._any_process = lambda here: True
        forward = Mock(wraps=sampler.network.forward)
        sampler.network.forward = forward
        sampler.best_of_n([text] * 2, [1, 2], [9.0 if text else 0.0] * 2, edits=edits)
        passes.append(forward.call_count)
    assert passes[0] == passes[1]
    assert passes[2] == passes[3]


def test_one_batch_has_edits_of_one_kind(tiny_weights: Path, picture: str) -> None:
    edits = [Edit(picture, strength=0.5), Edit(picture, strength=0.6)]
    with pytest.raises(ValueError, match="several kinds"):
        make_sampler(tiny_weights).sample([""] * 2, [0, 1], [0.0] * 2, edits=edits)


# requests


def test_a_folder_of_pictures_by_texts_by_weights_by_seeds(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    files = [save_picture(tmp_path / f"faces/{name}.png") for name in "ba"]
    data = PromptDataModule(["a man"], [5.0, 6.0], n_samples=2, init_image=str(tmp_path / "faces"), strength=0.3)
    made = [(request.seed, request.edit.init_image, request.guidance_weight) for request in data.requests]
    assert made == [(seed, file, weight) for seed in (0, 1) for file in sorted(files) for weight in (0, 5, 6)]
    assert {request.edit.strength for request in data.requests} == {0.3}
    assert len(data.requests) == 12


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_have_edits_of_their_own(tmp_path: Path, picture: str, mask: str) -> None:
    prompts = write_rows(
        tmp_path / "rows.jsonl",
        {"text": "a man", "seed": 1},
        {"text": "a man", "seed": 2, "init_image": "picture.png", "strength": 0.4},
        {"text": "a man", "seed": 3, "init_image": "picture.png", "mask": "mask.png"},
        {"text": "a man", "seed": 4, "strength": 0.2},
    )
    with pytest.raises(InputError, match=r"prompts: row 4 of .*: strength: got no init_image beside it"):
        PromptDataModule(prompts=prompts)
    data = PromptDataModule(prompts=prompts, init_image=picture, guidance_weight=[5.0])
    assert [request.edit for request in data.requests] == [
        Edit(picture, strength=0.6),
        Edit(picture, strength=0.4),
        Edit(picture, strength=1.0, mask=mask),
        Edit(picture, strength=0.2),
    ]
    with pytest.raises(TypeError, match="no length"):
        len(data.predict_dataloader())


def test_batches_hold_edits_of_one_kind(tmp_path: Path, picture: str) -> None:
    rows = [{"text": "a man", "seed": i, "init_image": picture, "strength": [0.3, 0.7][i % 2]} for i in range(7)]
    data = PromptDataModule(prompts=write_rows(tmp_path / "rows.jsonl", *rows), micro_batch=3)
    assert [batch["seed"] for batch in data.predict_dataloader()] == [[0, 2, 4], [1, 3, 5], [6]]


def test_processes_get_edits_of_one_kind_at_a_time_and_each_request_once(picture: str) -> None:
    edits = [None, Edit(picture, strength=0.3), Edit(picture, strength=0.7), Edit(image_prompt=picture)]
    requests = [Request(i, "a man", i, 1.0, edits[i * i % 7 % 4]) for i in range(50)]
    shares = [list(Dealt(requests, 4, {3, 17}, rank, 3)) for rank in range(3)]
    for dealt in zip(*shares, strict=True):
        assert len({len(batch["index"]) for batch in dealt}) == 1
        assert len(list_kinds(edit for batch in dealt for edit in batch["edit"])) == 1
    valid = [
        i for share in shares for batch in share for i, ok in zip(batch["index"], batch["valid"], strict=True) if ok
    ]
    assert sorted(valid) == sorted(set(range(50)) - {3, 17})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init_image nowhere.png", "init_image: 'nowhere.png' can't be read \\(there is no such file\\)"),
        ("--init_image config.yaml", "init_image: 'config.yaml' can't be read \\(no PNG, JPEG"),
        ("--init_image picture.png --strength 1.5", "strength: got 1.5, expected a number from 0 to 1"),
        ("--init_image picture.png --mask nowhere.png", "mask: 'nowhere.png' can't be read"),
        ("--init_image empty", "init_image: got 'empty', which holds no pictures"),
        ("--image_prompt nowhere.png", "image_prompt: 'nowhere.png' can't be read"),
        (
            "--image_prompt picture.png --method classifier_guidance",
            "image_prompt: got a picture for classifier_guidance",
        ),
        ("--mask picture.png", "mask: got no init_image beside it"),
        ("--strength 0.5", "strength: got no init_image beside it"),
        ("--invert", "invert: got no init_image beside it"),
        ("--init_image picture.png --outpaint 0.5", "outpaint: got .*0.5.*, expected four shares"),
        ("--init_image picture.png --outpaint 0.5 0 0 0", "outpaint: .* expected left \\+ right to be as much"),
        ("--init_image picture.png --mask picture.png --outpaint 0 0 .5 .5", "outpaint: got a mask too"),
        ("--prompts rows.jsonl", r"outpaint: .*0\.001"),
        ("--init_image picture.png --invert --solver unipc", "invert: got unipc beside it"),
        ("--init_image picture.png --invert --model.sampling.ddim false", "invert: got ddim false beside it"),
        ("--init_image picture.png --strength 0.001 --skip_type trailing", "strength: got 0.001, but no step begins"),
        ("--init_image picture.png --strength 0.2 --model.sampling.interval [0.5,1]", "sampling.interval: no step"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_drawn(
    flags: str, message: str, config: str, tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shares = [[0.1] * 4, [0.001] * 4]  # of which the second gives no margin
    rows = [
        json.dumps({"text": "", "guidance_weight": 0, "init_image": "picture.png", "outpaint": each}) for each in shares
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(SystemExit, match=f"^error: {message}") as stopped:
        main(["predict", "-c", config, "--n_samples", "1", "--save_dir", "x", *flags.split()])
    assert "\n" not in str(stopped.value)
    assert not Path("x").exists()


def pictures_of(out: Path) -> list[bytes]:
    return [Image.open(out / row["file_name"]).tobytes() for row in metadata(out)]


def test_mixed_rows_give_the_pictures_that_each_gives_alone(
    config: str, tmp_path: Path, picture: str, mask: str, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"text": "a man", "seed": 1},
        {"text": "a man", "seed": 2, "init_image": "picture.png", "strength": 0.4},
        {"text": "a girl", "seed": 3, "init_image": "picture.png", "mask": "mask.png"},
        {"text": "a man", "seed": 4},
        {"text": "a girl", "seed": 5, "init_image": "picture.png", "strength": 0.4},
        {"text": "a girl", "seed": 6, "init_image": "picture.png", "invert": True, "strength": 0.8},
    ]
    command = ["predict", "-c", config, "--guidance_weight", "20"]
    together = write_rows(tmp_path / "rows.jsonl", *rows)
    main([*command, "--prompts", together, "--save_dir", str(tmp_path / "all")])
    drawn = pictures_of(tmp_path / "all")
    for i, row in enumerate(rows):
        main([*command, "--prompts", write_rows(tmp_path / "one.jsonl", row), "--save_dir", str(tmp_path / f"{i}")])
        assert pictures_of(tmp_path / f"{i}") == [drawn[i]], i
    found = metadata(tmp_path / "all")
    assert "init_image" not in found[0]
    assert (found[1]["strength"], found[2]["strength"], found[2]["repeats"], found[1]["repeats"]) == (0.4, 1.0, 4, 1)
    assert found[2]["init_image"] == picture
    assert len(found[2]["mask_sha256"]) == 64
    assert found[5]["round_trip_error"] > 0


def test_a_run_goes_on_and_notices_a_changed_file(config: str, tmp_path: Path, picture: str) -> None:
    out = tmp_path / "x"
    command = ["predict", "-c", config, "--init_image", picture, "--n_samples", "3", "--save_dir", str(out)]
    main(command)
    before = pictures_of(out)
    (out / "000001.png").unlink()
    main(command)
    assert pictures_of(out) == before
    (out / "000001.png").unlink()
    save_picture(Path(picture), seed=1)
    with pytest.raises(SystemExit, match=r"holds pictures made from an earlier .*picture.png \(init_image\)"):
        main(command)
    assert not (out / "000001.png").exists()
    main([*command, "--overwrite", "true"])
    assert len(pictures_of(out)) == 3
    assert pictures_of(out)[0] != before[0]


def test_a_run_notices_other_edits_of_its_rows(config: str, tmp_path: Path, picture: str, mask: str) -> None:
    row = {"text": "a man", "seed": 1, "init_image": "picture.png", "strength": 0.4}
    command = ["predict", "-c", config, "--prompts", str(tmp_path / "rows.jsonl"), "--save_dir", str(tmp_path / "x")]
    write_rows(tmp_path / "rows.jsonl", row)
    main(command)
    main(command)
    save_picture(tmp_path / "other.png", seed=1)
    for changed, difference in (
        ({"strength": 0.5}, "strength: 0.4 there, 0.5 here"),
        ({"invert": True}, "invert: None there, True here"),
        ({"mask": "mask.png"}, "mask: None there, '.*mask.png' here"),
        ({"init_image": "other.png"}, "init_image: '.*picture.png' there, '.*other.png' here"),
    ):
        write_rows(tmp_path / "rows.jsonl", row | changed)
        with pytest.raises(SystemExit, match=rf"holds pictures of other requests \(index 0, {difference}\)"):
            main(command)


def test_another_size_is_resized_and_said_once(
    config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipward.editing._reported", set())
    (tmp_path / "faces").mkdir()
    for i, size in enumerate((24, 32)):
        save_picture(tmp_path / f"faces/{i}.png", size)
    wide = Image.new("RGB", (40, 20), "white")
    wide.save(tmp_path / "mask.png")
    flags = ["--init_image", str(tmp_path / "faces"), "--mask", str(tmp_path / "mask.png"), "--n_samples", "1"]
    main(["predict", "-c", config, *flags, "--save_dir", str(tmp_path / "x")])
    said = [record.getMessage() for record in caplog.records if record.name == "clipward"]
    assert len(said) == 2
    assert "has 24×24 pixels; resized to 16×16" in said[0]
    assert "has 40×20 pixels; its middle is resized to 16×16" in said[1]


def test_python_edits_files_and_pictures_alike(tiny_weights: Path, picture: str, mask: str) -> None:
    model = clipward.load(tiny_weights, skip_steps=4)
    by_name = model.sample(n_samples=2, init_image=Path(picture), mask=mask)
    with Image.open(picture) as opened, Image.open(mask) as white:
        by_picture = model.sample(n_samples=2, init_image=opened, mask=white, strength=1)
        assert np.array_equal(np.asarray(by_name[0])[:, 8:], np.asarray(opened)[:, 8:])
    assert [one.tobytes() for one in by_name] == [one.tobytes() for one in by_picture]
    assert model.sample(n_samples=1, init_image=picture, strength=0)[0].tobytes() == Image.open(picture).tobytes()
    with pytest.raises(InputError, match="init_image: got 3, expected a picture's file"):
        model.sample(init_image=3)
    with pytest.raises(InputError, match="init_image: a picture can't be read"):
        model.sample(init_image=b"PNG", skip_steps=1)


def test_an_edit_is_guided_within_the_same_share_of_its_shorter_walk(
    tiny_weights: Path, tiny_clip: Path, picture: str
) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip), method="contrastive_denoised", skip_steps=20)
    sampler, edit = model.sampler, Edit(init_image=picture, strength=0.5)
    assert METHODS["contrastive_denoised"].interval == (0.3, 1)
    assert sampler.interval() == (0.3, 1)
    assert sampler.interval(edit) == (0.15, 0.5)
    assert sampler.describe(edit)["interval"] == [0.15, 0.5]  # what makes the picture again
    sampler.config = replace(sampler.config, skip_steps=1, skip_type="uniform")
    assert sampler.interval() == (0, 1)  # its only step begins at t = 0
    sampler.config = replace(sampler.config, interval=(0.2, 0.4))
    assert sampler.interval(edit) == (0.2, 0.4)


# a picture in the place of a text


def make_guided(weights: Path, clip: Path, method: str, noisy: bool = False, **settings: object) -> Sampler:
    guides = {"noisy_clip": make_noisy(clip)} if noisy else {}
    sampling = SamplingConfig(**{"skip_steps": 4, "method": method, **settings})
    module = tiny_module(weights=str(weights), clip=str(clip), sampling=sampling, **guides)
    module.configure_model()
    return module.sampler


def make_noisy(folder: Path) -> str:
    """A noise-aware CLIP made of another, with random weights for the noise level."""
    torch.manual_seed(0)
    clip = Clip.load(str(folder))
    make_noise_aware(clip.model)
    target = folder.parent / "noisy"
    save_folder(target, clip.model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    return str(target)


def test_flags_complete_the_edits_of_rows(tmp_path: Path, picture: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a", "init_image": picture}) + "\n")
    (request,) = PromptDataModule(prompts=str(rows), n_samples=1, unguided=False, strength=0.25).requests
    assert request.edit.strength == 0.25
    for row, message in (
        ({"text": "a"}, "strength: got no init"),
        ({"init_image": ""}, "init_image: got an empty name"),
    ):
        rows.write_text(json.dumps({"text": "a"} | row) + "\n")
        with pytest.raises(InputError, match=message):
            list(PromptDataModule(prompts=str(rows), n_samples=1, strength=0.25).requests)


def test_a_folder_whose_texts_have_other_line_breaks_is_read(picture: str, tmp_path: Path) -> None:
    Image.open(picture).save(tmp_path / "0.png")
    row = {"file_name": "0.png", "text": "a\u2028b\x85c"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert Folder(tmp_path, "image").names == ["0.png"]
    for name in ("../0.png", "/0.png", "a/../../0.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
        with pytest.raises(InputError, match=r"^data.path: got .*, whose metadata.jsonl names .*; expected"):
            Folder(tmp_path, "image")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_picture_of_pillow_whose_pixels_have_no_meaning_here_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match=r"^init_image: the picture can't be read \("):
        Edit(init_image=Image.new(mode, (8, 8)))


def test_a_picture_of_pillow_that_is_gone_or_cut_off_is_refused(picture: str, tmp_path: Path) -> None:
    closed = Image.open(picture)
    closed.close()
    (tmp_path / "half.png").write_bytes(Path(picture).read_bytes()[:200])
    for given in (closed, Image.open(tmp_path / "half.png")):
        with pytest.raises(InputError, match=r"^mask: the picture can't be read \("):
            Edit(init_image=picture, mask=given)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16B"])
def test_a_picture_of_pillow_of_any_other_kind_is_the_one_it_shows(mode: str) -> None:
    values = np.full((8, 8), 200 * 257, dtype=">u2")
    grey = Image.fromarray(values) if mode == "I;16B" else Image.new("L", (8, 8), 255).convert("RGB").convert(mode)
    assert grey.mode == mode
    shown = Edit(init_image=grey).read_image((3, 8, 8))
    assert shown.unique().tolist() == pytest.approx([200 / 127.5 - 1 if mode == "I;16B" else 1.0], abs=0.01)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].guided_by != "classifier"])
def test_a_picture_guides_as_a_text_does(tiny_weights: Path, tiny_clip: Path, picture: str, method: str) -> None:
    sampler = make_guided(tiny_weights, tiny_clip, method, noisy=METHODS[method].guided_by == "noisy clip")
    weight = 0.1 * METHODS[method].weight

    def drawn(text: str, edit: Edit | None) -> Tensor:
        return sampler.sample([text], [0], [weight], edits=[edit])[0]

    prompt = Edit(image_prompt=picture)
    images = [drawn("", prompt), drawn("a man", None), drawn("a man", prompt)]
    assert all(torch.isfinite(image).all() for image in images)
    assert not any(torch.equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_objective_of_a_picture_is_its_cosine_and_is_added_to_that_of_a_text(
    tiny_weights: Path, tiny_clip: Path, picture: str
) -> None:
    sampler = make_guided(tiny_weights, tiny_clip, "clip_guidance")
    clip, step = sampler.models.clips[0], sampler.list_steps()[0]
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    prompt = clip.encode_image(Edit(picture).read_image((3, 16, 16))[None])
    of_picture, of_text = (
        clip.encode_image(image) @ prompt[0],
        clip.encode_image(image) @ clip.encode_text(["a man"])[0],
    )
    edits = [Edit(image_prompt=picture)] * 2
    objectives = sampler.models.objectives(sampler.method, ["", "a man"], Noise([0, 1], (3, 16, 16)), "cpu", edits)
    scores = objectives.weigh(objectives.cosine)(image, step)
    torch.testing.assert_close(scores, torch.stack([of_picture[0], of_picture[1] + of_text[1]]))
    found = sampler.clip_similarity(image, ["", "a man"], edits)
    assert found == pytest.approx([of_picture[0].item(), (of_picture[1] + of_text[1]).item() / 2], abs=1e-5)


def test_a_picture_draws_towards_itself(config: str, tmp_path: Path, picture: str) -> None:
    command = ["predict", "-c", config, "--image_prompt", picture, "--n_samples", "2"]
    command += ["--guidance_weight", "300", "--skip_steps", "20", "--candidates", "2"]
    main([*command, "--method", "clip_guidance", "--save_dir", str(tmp_path / "x")])
    rows = metadata(tmp_path / "x")
    assert [(row["text"], row["guidance_weight"]) for row in rows] == [("", 0), ("", 300)] * 2
    assert rows[1]["clip_similarity"] > rows[0]["clip_similarity"]
    assert len(rows[0]["image_prompt_sha256"]) == 64


def test_a_shard_holds_rows_with_and_without_edits(config: str, tmp_path: Path, picture: str) -> None:
    rows = [{"text": "a man", "seed": 1}, {"text": "a man", "seed": 2, "init_image": "picture.png", "invert": True}]
    prompts = write_rows(tmp_path / "rows.jsonl", *rows)
    flags = ["--guidance_weight", "20", "--output", "parquet", "--save_dir", str(tmp_path / "x")]
    main(["predict", "-c", config, "--prompts", prompts, *flags])
    table = parquet.read_table(tmp_path / "x/000000000.parquet").to_pylist()
    assert [row["init_image"] for row in table] == [None, picture]
    assert [row["invert"] for row in table] == [None, True]


@pytest.mark.parametrize("output", ["webdataset", "parquet"])
def test_shards_of_rows_with_and_without_edits_open_together(
    output: str, config: str, tmp_path: Path, picture: str, mask: str
) -> None:
    rows: list[dict] = [
        {"text": "", "guidance_weight": 0},
        {"text": "a man", "init_image": "picture.png", "invert": True},
        {"text": "a man", "init_image": "picture.png", "mask": "mask.png"},
        {"text": "a man", "init_image": "picture.png", "outpaint": [0.5, 0, 0, 0.5]},
        {"text": "", "guidance_weight": 0, "init_image": "picture.png", "strength": 0.25},
        {"text": "a man"},
    ]
    prompts = write_rows(tmp_path / "rows.jsonl", *rows)
    flags = ["--output", output, "--shard_size", "1", "--n_samples", "1", "--save_dir", str(tmp_path / "x")]
    main(["predict", "-c", config, "--prompts", prompts, *flags])
    shards = sorted(map(str, (tmp_path / "x").glob("0*")))
    loaded = load_dataset(output, data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    if output == "webdataset":
        assert [row["json"]["text"] for row in loaded] == [row["text"] for row in rows]
        return
    assert {name for row in metadata(tmp_path / "x") for name in row} | {"image"} <= set(loaded.column_names)
    for row, there in zip(loaded, metadata(tmp_path / "x"), strict=True):
        assert {name: value for name, value in row.items() if value is not None and name != "image"} == {
            name: value for name, value in there.items() if value is not None
        }
        assert row["image"].size == (16, 16)
