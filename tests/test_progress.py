"""What a person sees of predict, and the pictures on their way."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import metadata
from PIL import Image
from tqdm import tqdm

from clipward.callbacks import progress
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.callbacks.progress import Frames, WalkPlace, format_rows, format_time
from clipward.cli import main
from clipward.diffusion.sampling import State
from clipward.diffusion.schedule import Step
from clipward.sampler import Sampler

REQUEST = ["--text", "an old man", "a girl", "--n_samples", "3", "--micro_batch", "4", "--skip_steps", "12"]
SHOWN = ["--trainer.enable_progress_bar", "true"]


def predict(config: str, out: Path, *args: str) -> None:
    main(["predict", "-c", config, *REQUEST, "--save_dir", str(out), *args])


def test_the_screens_say_what_runs_and_where_all_lies(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--negative_text", "a hat", "--weight_schedule", "0:1 1:2", "--save_progress", "--ddim"]
    predict(config, tmp_path / "x", *flags)
    said = capsys.readouterr()
    assert "contrastive, by the noise-aware CLIP, the weight times 0:1 1:2" in said.out
    for name in ("weights", "method", "guided by", "away from", "scored by", "steps", "device", "pictures"):
        assert re.search(rf"^{name} ", said.out, re.MULTILINE), name
    assert "12 of ddim(eta=0), spaced by uniform" in said.out
    assert re.search(r"cpu with \d+ threads?, 32-true, 1 process", said.out)
    for name in ("grid.png", "gallery.html", "metadata.jsonl", "progress"):
        assert str(tmp_path / "x" / name) in said.out
    assert "%" not in said.err  # the config shows no progress
    predict(config, tmp_path / "x", *flags)
    again = capsys.readouterr()
    assert again.out.rpartition("\n\n")[2] == said.out.rpartition("\n\n")[2]
    assert "pictures   0, " in again.out  # nothing was left to do
    assert "9 are there already" in " ".join(again.out.split())
    assert not again.err
    predict(config, tmp_path / "y", "--guidance_weight", "0")
    assert "none, unguided" in capsys.readouterr().out


def test_without_a_terminal_there_are_a_few_lines(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    predict(config, tmp_path / "x", *SHOWN)
    lines = [line for line in capsys.readouterr().err.splitlines() if "pictures" in line]
    assert 5 <= len(lines) <= 10
    form = r" *\d+%  \d of 9 pictures, step \d+ of 12, \d+:\d\d left, \d+:\d\d gone(, similarity -?\d\.\d{3})?"
    assert all(re.fullmatch(form, line) or "step" not in line for line in lines)
    last = [row["clip_similarity"] for row in metadata(tmp_path / "x")[8:]]
    assert re.fullmatch(rf"100%  9 of 9 pictures, \d:\d\d gone, similarity {last[0]:.3f}", lines[-1])


def test_a_stream_has_lines_without_an_end(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shown = progress.PredictionProgress("x")
    shown.total, shown._started, shown._printed, shown._steps, shown.sampler = None, 0.0, 0, 5, None
    for count in range(1, 100):
        shown._drawn = count
        shown._show(count, 5, ended=True)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{2**i} pictures" for i in range(7)
    ]


def test_a_terminal_has_two_bars(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    finish, bars = PredictionWriter.finish, []

    def count(self: PredictionWriter) -> None:
        bars.append(len(tqdm._instances))
        finish(self)

    monkeypatch.setattr(PredictionWriter, "finish", count)
    predict(config, tmp_path / "x", *SHOWN)
    assert bars == [0]  # none is left in the way of the last screen
    said = capsys.readouterr().err
    assert "9/9 pictures 100%" in said
    assert re.search(r"step 12/12, similarity -?\d\.\d{3} 100%", said)
    assert " left" in said
    assert max(map(len, re.split(r"[\r\n]|\x1b\[A", said))) <= 80


def test_watching_changes_no_picture_and_looks_at_every_tenth_step(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(config, tmp_path / "x")
    looks = []
    similarity = Sampler.clip_similarity

    def count(self: Sampler, image: object, text: list, edit: object = None) -> list:
        looks.append(len(text))
        return similarity(self, image, text, edit)

    monkeypatch.setattr(Sampler, "clip_similarity", count)
    predict(config, tmp_path / "y", *SHOWN, "--save_progress")
    assert looks == [4, 4, 4, 4, 1, 1]  # step 10, and the metadata
    for row in metadata(tmp_path / "x"):
        with Image.open(tmp_path / "x" / row["file_name"]) as a, Image.open(tmp_path / "y" / row["file_name"]) as b:
            assert a.tobytes() == b.tobytes()


def test_filmstrips_and_animations_are_written_once_and_say_how(config: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    predict(config, out, "--save_progress")
    rows = metadata(out)
    assert [row["filmstrip"] for row in rows] == [f"progress/{i:06d}.png" for i in range(9)]
    for row in rows:
        with Image.open(out / row["filmstrip"]) as strip, Image.open(out / row["file_name"]) as picture:
            assert strip.size == (8 * 18 - 2, 16)
            assert strip.crop((7 * 18, 0, 7 * 18 + 16, 16)).tobytes() == picture.tobytes()
            assert strip.crop((0, 0, 16, 16)).tobytes() != picture.tobytes()
            made = {name: value for name, value in row.items() if name not in ("filmstrip", "animation")}
            assert json.loads(strip.text["clipward"]) == json.loads(picture.text["clipward"]) == made
        with Image.open(out / row["animation"]) as animation:
            assert (animation.n_frames, animation.size) == (8, (16, 16))
            assert json.loads(animation.info["xmp"]) == made
    pictures = {path: path.read_bytes() for path in out.glob("0*.png")}
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("0*.*")}
    (out / "progress/000003.webp").unlink()
    (out / "progress/000005.png").write_bytes(b"\x89PNG cut off")
    predict(config, out, "--save_progress")
    again = {path: path.stat().st_mtime_ns for path in out.rglob("0*.*")}
    changed = {path.name for path in kept if again[path] != kept[path]}
    assert changed == {"000003.png", "000003.webp", "000005.png", "000005.webp"}
    assert metadata(out) == rows
    predict(config, out, "--overwrite", "true")  # without --save_progress
    assert not (out / "progress").exists()
    assert {path: path.read_bytes() for path in out.glob("0*.png")} == pictures


@pytest.mark.parametrize("name", ["progress", "progress/000002.png", "progress/000002.webp"])
def test_a_strangers_file_is_refused(config: str, tmp_path: Path, name: str) -> None:
    out = tmp_path / "x"
    predict(config, out, "--save_progress", "--n_samples", "1")
    for path in out.rglob("000002.*"):
        path.unlink()
    rows = [line for line in (out / "metadata.jsonl").read_text().splitlines() if '"index": 2' not in line]
    (out / "metadata.jsonl").write_text("".join(f"{line}\n" for line in rows))
    if name == "progress":
        (out / "progress").rename(out / "kept")
    (out / name).write_bytes(b"precious")
    with pytest.raises(SystemExit, match=rf"^error: save_dir: .*{name} is there and was not written by predict"):
        predict(config, out, "--save_progress", "--n_samples", "1")
    assert (out / name).read_bytes() == b"precious"


def test_other_files_of_the_folder_stay(config: str, tmp_path: Path) -> None:
    (tmp_path / "x/progress").mkdir(parents=True)
    predict(config, tmp_path / "y", "--save_progress", "--n_samples", "1")
    (tmp_path / "y/progress/mine.webp").write_bytes(b"precious")
    predict(config, tmp_path / "y", "--n_samples", "1", "--overwrite", "true")
    assert [path.name for path in (tmp_path / "y/progress").iterdir()] == ["mine.webp"]


def test_datasets_opens_the_folder(config: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    predict(config, tmp_path / "x", "--save_progress", "--n_samples", "1")
    rows = load_dataset("imagefolder", data_dir=str(tmp_path / "x"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == ["", "an old man", "a girl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "2"], "save_progress: got --candidates 2 beside it, expected 1"),
        (["--output", "parquet"], "save_progress: got --output parquet beside it, expected files"),
    ],
)
def test_what_cannot_be_saved_is_refused(config: str, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        predict(config, tmp_path / "x", "--save_progress", *flags)
    assert not (tmp_path / "x").exists()


def test_a_walk_that_is_taken_again_begins_again() -> None:
    import torch

    def state(number: int, count: int, last: bool = False, value: float = 0.0) -> State:
        step = Step(3 - number, -1 if last else 2 - number, 0.5, 1.0 if last else 0.6, number)
        image = torch.full((count, 3, 2, 2), value)
        return State(image, image, step)

    place, frames = WalkPlace(), Frames(4, 3)
    walk = [state(1, 4), state(1, 2), state(2, 2), state(3, 2, True), state(1, 2), state(2, 2), state(3, 2, True)]
    places = []
    for each in walk:
        places.append((place(each).start, place(each).stop))
        frames.watch(each)
    assert places == [(0, 4), (0, 2), (0, 2), (0, 2), (2, 4), (2, 4), (2, 4)]
    assert [len(each) for each in frames.of] == [2, 2, 2, 2]


def test_rows_fit_a_terminal() -> None:
    rows = [("weights", "word " * 40), ("pictures", "/" + "x" * 90)]
    lines = format_rows(rows).splitlines()
    assert max(len(line) for line in lines[:-1]) <= 80
    assert lines[-1].endswith("x" * 90)  # a path is never broken
    assert all(line.startswith(" " * 11) for line in lines[1:-1])
    assert (format_time(62.4), format_time(3723)) == ("1:02", "1:02:03")
