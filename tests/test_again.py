"""Pictures are made again, and varied, from what they say of themselves."""

import json
from pathlib import Path

import pytest
from conftest import metadata
from PIL import Image

from clipward.callbacks.gallery import save_png
from clipward.cli import main
from clipward.cli.again import to_settings

FLAGS = [
    *("--text", "an old man:2 | a hat:-1", "a girl", "--negative_text", "glasses", "--guidance_weight", "7.5", "30"),
    *("--seed", "4", "--n_samples", "2", "--skip_steps", "3", "--skip_type", "uniform2", "--ddim"),
    *("--ddim_eta", "0.3337"),
    *("--weight_schedule", "0:0.5 1:1", "--model.sampling.interval", "[0.0, 0.95]", "--candidates", "2"),
    *("--method", "clip_guidance_pixel"),
]  # fmt: skip


def run(*args: object) -> None:
    main(["predict", *map(str, args)])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, tiny_clip: Path, noisy_clip: str) -> Path:
    """A folder of ten pictures, and in ``shards`` the same in one shard."""
    out = tmp_path_factory.mktemp("drawn") / "x"
    model = [
        "--model",
        "clipward.lightning_modules.ddpm.DDPMModule",
        "--weights",
        tiny_weights,
        "--noisy_clip",
        noisy_clip,
    ]
    clips = ["--clip", tiny_clip, noisy_clip, "--clip_weights", "2", "1", "--model.guidance.contrasts", "faces"]
    (out.parent / "mine.yaml").write_text("trainer: {accelerator: cpu, enable_progress_bar: false}\n")
    config = ["-c", out.parent / "mine.yaml", *model, *clips]
    run(*config, *FLAGS, "--save_dir", out)
    run(*config, *FLAGS, "--save_dir", out.parent / "shards", "--output", "webdataset")
    return out


@pytest.mark.parametrize("index", [0, 3, 9])
def test_a_picture_is_made_again_to_the_byte(
    index: int, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = f"{index:06d}.png"
    run("--again", drawn / name, "--save_dir", tmp_path / "y")
    assert (tmp_path / "y" / name).read_bytes() == (drawn / name).read_bytes()
    assert metadata(tmp_path / "y") == [metadata(drawn)[index]]
    assert f"again: as {drawn / name} says\n" in capsys.readouterr().out


def test_a_picture_by_the_methods_own_steps_is_made_again(drawn: Path, tmp_path: Path) -> None:
    config = ["-c", drawn.parent / "mine.yaml", "--model", "clipward.lightning_modules.ddpm.DDPMModule"]
    model = ["--weights", metadata(drawn)[0]["weights"], "--clip", metadata(drawn)[0]["clips"][0]]
    run(*config, *model, "--n_samples", "1", "--text", "a man", "--save_dir", tmp_path / "x")
    assert metadata(tmp_path / "x")[1]["sampler"] == "sde_dpmpp_2m"
    run("--again", tmp_path / "x/000001.png", "--save_dir", tmp_path / "y")
    assert (tmp_path / "y/000001.png").read_bytes() == (tmp_path / "x/000001.png").read_bytes()


def test_a_picture_of_ddpm_steps_is_made_again_by_them(drawn: Path) -> None:
    record = {**metadata(drawn)[0], "sampler": "ddpm"}
    assert to_settings(record, drawn / "000000.png", "again")["model.sampling.ddim"] is False


def test_a_picture_of_a_shard_is_made_again_from_its_metadata(drawn: Path, tmp_path: Path) -> None:
    run(f"--again={drawn.parent / 'shards/000003.png'}", "--save_dir", tmp_path / "y")
    assert (tmp_path / "y/000003.png").read_bytes() == (drawn / "000003.png").read_bytes()


def test_a_picture_is_varied_by_the_next_seeds(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("--vary", drawn / "000001.png", "--n_samples", "2")
    first, second = metadata(tmp_path / "out/vary/x_000001")
    assert (first["seed"], second["seed"]) == (5, 6)
    there = metadata(drawn)[6]  # the same text and weight, seed 5
    assert {**first, "file_name": "", "index": 0} == {**there, "file_name": "", "index": 0}


@pytest.mark.parametrize("edit", [["--mask", "mask.png"], ["--outpaint", "0.25", "0", "0.25", "0.5"], ["--invert"]])
def test_an_edited_picture_is_made_again_while_its_files_are_the_same(
    edit: list[str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((20, 20), 90).convert("RGB").save("mine.png")
    Image.linear_gradient("L").resize((16, 16)).save("mask.png")
    flags = ["--text", "a boy", "--candidates", "1", "--ddim_eta", "0", "--strength", "0.8", "--init_image", "mine.png"]
    run("--again", drawn / "000001.png", *flags, *edit, "--save_dir", "x")
    run("--again", "x/000001.png", "--save_dir", "y")
    assert Path("x/000001.png").read_bytes() == Path("y/000001.png").read_bytes()
    Image.new("RGB", (20, 20)).save("mine.png")
    line = error_of("--again", "x/000001.png", "--save_dir", "z")
    assert "init_image: mine.png is not the file that the picture was made from; give --init_image" in line


def test_flags_override_the_record_and_that_is_said(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [
        "--text",
        "a boy",
        "--guidance_weight",
        "3",
        "--method",
        "clip_guidance",
        "--model.sampling.skip_steps",
        "4",
    ]
    run("--again", drawn / "000001.png", *flags, "--save_dir", tmp_path / "y")
    assert (
        "says, but for guidance_weight, model.sampling.method, model.sampling.skip_steps, text\n"
        in capsys.readouterr().out
    )
    (row,) = metadata(tmp_path / "y")
    found = {name: row[name] for name in ("text", "guidance_weight", "method", "steps", "seed")}
    assert found == {"text": "a boy", "guidance_weight": 3, "method": "clip_guidance", "steps": 4, "seed": 4}
    (tmp_path / "texts.txt").write_text("a dog\na cat\n")
    run(
        "--again",
        drawn / "000001.png",
        "--prompts",
        tmp_path / "texts.txt",
        "--n_samples",
        "1",
        "--save_dir",
        tmp_path / "z",
    )
    assert [row["text"] for row in metadata(tmp_path / "z")] == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance_weight": None}, "does not say its guidance_weight; expected a picture of predict"),
        ({"weights_hash": None}, "does not say its weights_hash; expected a picture of predict"),
        ({"guidance_weight": "x"}, "has the guidance_weight 'x', expected a number"),
        ({"contrasts": "/etc/passwd"}, "has the contrasts '/etc/passwd', expected a list of lists or null"),
        ({"clips": []}, "has an empty list of clips, expected their names"),
        ({"seed": -1}, "has the seed -1, expected 0 or more"),
        ({"seed": 2**70}, f"has the seed {2**70}, expected 0 or more"),
        ({"steps": "many"}, "has the steps 'many', expected a whole number or null"),
    ],
)
def test_a_damaged_record_is_named(drawn: Path, tmp_path: Path, change: dict, said: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "000001.png")
    row = next(row for row in metadata(drawn) if row["index"] == 1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | change))
    assert error_of("--again", tmp_path / "000001.png").endswith(f"000001.png' {said}")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".png", "1" * 300, "\x01", "."])
def test_a_name_that_no_picture_has_is_named(name: str) -> None:
    assert error_of("--again", name).startswith("error: again: ")


def error_of(*args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def change(picture: Path, target: Path, **fields: object) -> Path:
    with Image.open(picture) as image:
        record = json.loads(image.text["clipward"]) | fields
        save_png(target, image.convert("RGB"), json.dumps(record))
    return target


def test_weights_that_are_missing_or_other_are_one_line(drawn: Path, tmp_path: Path) -> None:
    gone = change(drawn / "000001.png", tmp_path / "gone.png", weights=str(tmp_path / "gone.safetensors"))
    assert "weights: there is no file" in error_of("--again", gone, "--save_dir", tmp_path / "y")
    other = change(drawn / "000001.png", tmp_path / "other.png", weights_hash="0123456789abcdef")
    line = error_of("--again", other, "--save_dir", tmp_path / "y")
    assert "but the picture says 0123456789abcdef; give the file that made it with --weights" in line
    assert not (tmp_path / "y").exists()
    other = change(drawn / "000001.png", tmp_path / "other.png", clip_hash="0")
    assert "clip: 2·" in error_of("--again", other, "--save_dir", tmp_path / "y")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--again"], "again: got nothing, expected a picture that predict wrote"),
        (["--again", "{folder}/nothing.png"], "is no file; expected a picture that predict wrote, or its metadata"),
        (["--vary", "{folder}/plain.png"], "says nothing of how it was made"),
        (["--again", "{folder}/grid.png"], "does not say its index"),
        (["--again", "{folder}/odd.png"], "has the seed 'x', expected a whole number"),
        (["--again", "{folder}/x.png", "--vary", "{folder}/x.png"], "twice, expected one of them"),
        (["-c", "{folder}/mine.yaml"], "again: got 'x.png' in a config, expected --again as a flag"),
    ],
)
def test_a_picture_that_says_too_little_is_one_line(
    flags: list[str], message: str, drawn: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "grid.png").write_bytes((drawn / "grid.png").read_bytes())
    (tmp_path / "mine.yaml").write_text("again: x.png\nmodel: clipward.lightning_modules.ddpm.DDPMModule\n")
    change(drawn / "000001.png", tmp_path / "odd.png", seed="x")
    assert message in error_of(*(flag.format(folder=tmp_path) for flag in flags), "--save_dir", tmp_path / "y")
