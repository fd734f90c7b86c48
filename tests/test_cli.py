"""The command line as a person uses it, on a model that takes no time."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import ROOT, metadata
from layouts import Pesser
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipward.cli import main
from clipward.diffusion.schedule import Scheduler
from clipward.errors import InputError
from clipward.evaluation.judgements import load_judgements
from clipward.guidance.methods import METHODS
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.vocabulary import load_vocabulary
from clipward.weights.load import load_weights


def predict(config: str, out: Path, *more: str) -> None:
    main(["predict", "-c", config, "--save_dir", str(out), *more])


CONTRACT = (
    "--text",
    "an old man with a smile",
    "a young girl with brown hair",
    "--guidance_weight",
    "10",
    "50",
    "--n_samples",
    "2",
    "--seed",
    "1",
)


def test_predict_writes_what_the_contract_says(config: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    predict(config, out, *CONTRACT)
    rows = metadata(out)
    assert [row["file_name"] for row in rows] == [f"{i:06d}.png" for i in range(10)]
    assert [row["seed"] for row in rows] == [1] * 5 + [2] * 5
    assert [(row["text"], row["guidance_weight"]) for row in rows[:5]] == [
        ("", 0),
        ("an old man with a smile", 10),
        ("an old man with a smile", 50),
        ("a young girl with brown hair", 10),
        ("a young girl with brown hair", 50),
    ]
    for row in rows:
        assert {"method", "steps", "sampler", "weights_hash", "clip_hash", "torch", "clipward"} <= row.keys()
        assert (row["clip_similarity"] is None) == (row["text"] == "")
        with Image.open(out / row["file_name"]) as picture:
            assert picture.size == (16, 16)
            assert json.loads(picture.text["clipward"])["seed"] == row["seed"]
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 5 * 96
    assert (out / "config.predict.yaml").is_file()
    assert not list(out.glob(".*"))


def test_the_same_command_gives_the_same_bytes_anywhere(config: str, tmp_path: Path) -> None:
    predict(config, tmp_path / "x", *CONTRACT)
    predict(config, tmp_path / "y", *CONTRACT)
    main(["predict", "-c", str(tmp_path / "x/config.predict.yaml"), "--save_dir", str(tmp_path / "z")])
    for file in [*(tmp_path / "x").glob("*.png"), tmp_path / "x/metadata.jsonl"]:
        for other in ("y", "z"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), (file.name, other)


def test_the_micro_batch_does_not_matter(config: str, tmp_path: Path) -> None:
    for size in ("1", "8"):
        predict(config, tmp_path / size, *CONTRACT, "--micro_batch", size)
    for name in (f"{i:06d}.png" for i in range(10)):
        a, b = (
            torch.frombuffer(bytearray(Image.open(tmp_path / size / name).tobytes()), dtype=torch.uint8)
            for size in ("1", "8")
        )
        assert (a.int() - b.int()).abs().max() <= 2


def test_a_stopped_predict_makes_what_is_missing_and_nothing_else(config: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    predict(config, out, *CONTRACT)
    before = {file.name: file.read_bytes() for file in out.glob("0*.png")}
    (out / "000003.png").unlink()
    old = {file.name: file.stat().st_mtime_ns for file in out.glob("0*.png")}
    predict(config, out, *CONTRACT, "--micro_batch", "3")
    after = {file.name: file.read_bytes() for file in out.glob("0*.png")}
    assert after.keys() == before.keys()
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("0*.png") if file.name in old} == old
    assert len(metadata(out)) == 10


def test_another_command_into_the_same_folder_is_refused(config: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    predict(config, out, *CONTRACT)
    kept = (out / "000001.png").read_bytes()
    with pytest.raises(SystemExit, match=r"guidance_weight: .*50\.0.* there, .*70\.0.* here"):
        predict(config, out, *CONTRACT, "--guidance_weight", "10", "70")
    assert (out / "000001.png").read_bytes() == kept
    predict(config, out, *CONTRACT, "--n_samples", "1", "--overwrite", "true")
    assert len(metadata(out)) == 5
    assert len(list(out.glob("0*.png"))) == 5


def test_a_folder_with_other_files_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(SystemExit, match=r"it has no config\.predict\.yaml"):
        predict(config, tmp_path, "--overwrite", "true")
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("flags", [[], ["--overwrite", "true"]])
def test_a_config_that_no_command_wrote_stays(flags: list[str], config: str, tmp_path: Path) -> None:
    path = tmp_path / "x/config.predict.yaml"
    path.parent.mkdir()
    path.write_text("mine: 1\n")
    with pytest.raises(SystemExit, match=rf"^error: save_dir: {path} was not written by predict; move it or"):
        predict(config, path.parent, *flags)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "mine: 1\n"


def test_datasets_opens_the_folder(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    predict(config, tmp_path / "x", *CONTRACT)
    rows = load_dataset("imagefolder", data_dir=str(tmp_path / "x"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 10
    assert rows[1]["text"] == "an old man with a smile"
    assert rows[1]["image"].size == (16, 16)


def test_short_flags_reach_the_model(config: str, tmp_path: Path) -> None:
    flags = ["--method", "score_guidance", "--skip_steps", "3", "--skip_type", "quad", "--ddim", "--ddim_eta", "0.5"]
    predict(config, tmp_path / "x", "--text", "a man", "--n_samples", "1", *flags)
    row = metadata(tmp_path / "x")[1]
    found = {name: row[name] for name in ("method", "steps", "skip_type", "sampler")}
    assert found == {"method": "score_guidance", "steps": 3, "skip_type": "quad", "sampler": "ddim(eta=0.5)"}


def test_fit_logs_saves_and_resumes_and_predict_takes_what_it_saved(config: str, tmp_path: Path) -> None:
    main(["fit", "-c", config])
    last = next((tmp_path / "runs").rglob("last.ckpt"))
    assert list((tmp_path / "runs").rglob("config.fit.yaml"))
    events = EventAccumulator(str(last.parent.parent)).Reload()
    judged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    guided = f"samples/{METHODS['contrastive'].weight:g}"
    assert len(judged["samples/0/fid"]) == len(judged[f"{guided}/kid"]) == 1
    assert 0 <= judged[f"{guided}/prompt_accuracy"][0] <= 1
    assert judged[f"{guided}/prompt_accuracy_judge"] == judged[f"{guided}/prompt_accuracy"]
    assert judged[f"{guided}/twin_distance"][0] > 0
    assert "samples/0/twin_distance" not in judged
    assert not any(tag.startswith(f"{other}/") for tag in judged for other in judged)  # files and folders to MLflow
    main(["fit", "-c", config, "--ckpt_path", str(last), "--trainer.max_steps", "6"])
    main(["validate", "-c", config, "--ckpt_path", str(last)])
    predict(config, tmp_path / "a", "--ckpt_path", str(last), "--n_samples", "1")
    assert {row["weights"] for row in metadata(tmp_path / "a")} == {str(last)}  # not the default's
    again = ["--again", str(tmp_path / "a/000000.png"), "--save_dir", str(tmp_path / "again")]
    main(["predict", *again])
    assert (tmp_path / "again/000000.png").read_bytes() == (tmp_path / "a/000000.png").read_bytes()
    predict(config, tmp_path / "b", "--weights", str(last), "--n_samples", "1")
    predict(config, tmp_path / "c", "--ckpt_path", "last", "--n_samples", "1")
    assert metadata(tmp_path / "c")[0]["weights_hash"] != metadata(tmp_path / "b")[0]["weights_hash"]
    newest = max((tmp_path / "runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1000])
    for path in ("last", str(newest)):
        with pytest.raises(
            SystemExit, match=f"error: ckpt_path: {newest} is damaged .*--ckpt_path .*ckpt, saved before"
        ):
            main(["fit", "-c", config, "--ckpt_path", path])
    assert (tmp_path / "a/000000.png").exists()
    hashes = {metadata(tmp_path / name)[0]["weights_hash"] for name in "ab"}
    assert len(hashes) == 1


def test_a_finished_folder_notices_that_its_models_have_changed(
    config: str, tiny_weights: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights, clip = tmp_path / "ddpm.safetensors", tmp_path / "clip"
    shutil.copy(tiny_weights, weights)
    shutil.copytree(tiny_clip, clip)
    flags = [*("--weights", str(weights), "--clip", str(clip), "--text", "a man")]
    for _ in range(2):
        predict(config, tmp_path / "x", *flags, "--n_samples", "1")
    assert "2 are there already" in " ".join(capsys.readouterr().out.split())
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    for path, field in ((clip / "open_clip_model.safetensors", "clip"), (weights, "weights")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + struct.pack("<f", 0.5))
        with pytest.raises(SystemExit, match=f"holds pictures of other weights .{field}_hash: .*use another folder"):
            predict(config, tmp_path / "x", *flags, "--n_samples", "1")
        path.write_bytes(whole)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    weights.write_bytes(whole[:-4] + struct.pack("<f", 0.5))
    predict(config, tmp_path / "x", *flags, "--n_samples", "1", "--overwrite", "true")
    first, *_ = before["metadata.jsonl"].splitlines()
    assert metadata(tmp_path / "x")[0]["weights_hash"] != json.loads(first)["weights_hash"]


def test_a_finished_folder_notices_that_its_texts_have_changed(config: str, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "x"

    def draw(content: str, *more: str) -> list[tuple[int, str]]:
        texts.write_text(content)
        predict(config, out, "--prompts", str(texts), "--n_samples", "2", "--skip_steps", "2", *more)
        return [(row["seed"], row["text"]) for row in metadata(out)]

    assert draw("an old man\n") == [(0, ""), (0, "an old man"), (1, ""), (1, "an old man")]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for content, difference in (
        ("an old man\na young girl\n", "index 2, text: '' there, 'a young girl' here"),
        ("a man\n", "index 1, text: 'an old man' there, 'a man' here"),
    ):
        line = (
            rf"^error: save_dir: {out} holds pictures of other requests \({difference}\); use another folder or --over"
        )
        with pytest.raises(SystemExit, match=line) as stopped:
            draw(content)
        assert "\n" not in str(stopped.value.code)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    drawn = draw("an old man\na young girl\n", "--overwrite", "true")
    assert drawn == [(seed, text) for seed in (0, 1) for text in ("", "an old man", "a young girl")]
    assert draw("an old man\na young girl\n") == drawn
    with pytest.raises(SystemExit, match=r"requests \(index 2, text: 'a young girl' there, '' here\)"):
        draw("an old man\n")


def test_lines_at_the_end_of_a_file_of_requests_are_drawn_too(config: str, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "x"
    lines = [{"text": "", "seed": 3, "guidance_weight": 0}, {"text": "a man", "seed": 4, "guidance_weight": 20}]

    def draw(lines: list[dict]) -> list[bytes]:
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        predict(config, out, "--prompts", str(rows), "--skip_steps", "2")
        return [(out / row["file_name"]).read_bytes() for row in metadata(out)]

    first = draw(lines[:1])
    both = draw(lines)
    assert len(both) == 2
    assert both[0] == first[0]
    for wrong, difference in (
        (lines[:1], "index 1: 'a man' there, none here"),
        ([lines[0], lines[1] | {"seed": 5}], "index 1, seed: 4 there, 5 here"),
        ([lines[0], lines[1] | {"guidance_weight": 30}], "index 1, guidance_weight: 20.0 there, 30.0 here"),
    ):
        with pytest.raises(SystemExit, match=rf"holds pictures of other requests \({difference}\)"):
            draw(wrong)


def test_a_folder_that_another_kind_of_device_began_is_refused(config: str, tmp_path: Path) -> None:
    out = tmp_path / "x"
    predict(config, out, "--n_samples", "2", "--skip_steps", "2")
    (out / "000001.png").unlink()
    lines = (out / "metadata.jsonl").read_text()
    (out / "metadata.jsonl").write_text(lines.replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(SystemExit, match=r"of another device \(device: 'cuda' there, 'cpu' here\); use another folder"):
        predict(config, out, "--n_samples", "2", "--skip_steps", "2")
    assert not (out / "000001.png").exists()
    predict(config, out, "--n_samples", "2", "--skip_steps", "2", "--overwrite", "true")
    assert (out / "metadata.jsonl").read_text() == lines


def test_a_finished_folder_notices_that_its_contrasts_have_changed(config: str, tmp_path: Path) -> None:
    contrasts, out = tmp_path / "contrasts.yaml", tmp_path / "x"
    flags = ["--model.guidance.contrasts", str(contrasts), "--text", "an old man", "--n_samples", "1"]
    contrasts.write_text("[[man, woman], [old, young]]")
    predict(config, out, *flags)
    predict(config, out, *flags)
    before = (out / "000001.png").read_bytes()
    contrasts.write_text("[[man, woman], [old, middle-aged]]")
    difference = r"contrasts \(contrasts: \['old', 'young'\] there, \['old', 'middle-aged'\] here\)"
    with pytest.raises(SystemExit, match=f"holds pictures of other {difference}; use another folder or --overwrite"):
        predict(config, out, *flags)
    predict(config, out, *flags, "--overwrite", "true")
    assert (out / "000001.png").read_bytes() != before
    assert metadata(out)[1]["contrasts"][1] == ["old", "middle-aged"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--weights", "nowhere.safetensors"), "weights: there is no file .*nowhere.safetensors"),
        (("--ckpt_path", "nowhere.ckpt"), "ckpt_path: there is no file nowhere.ckpt"),
        (("--ckpt_path", "last"), "ckpt_path: there is no checkpoint below"),
        (("--trainer.strategy", "fsdp"), "trainer.strategy: got fsdp, .* use -c fsdp"),
        (("-c", "fsdp", "--trainer.precision", "16-mixed"), "trainer.precision: got 16-mixed"),
        (("--trainer.accelerator", "abacus"), "trainer: .*abacus"),
        (("--trainer.devices", "some"), "trainer: .*devices"),
        (("--shard_size", "0"), "shard_size: .*0"),
        (("--clip", "nowhere", "--text", "a man"), "clip: .*nowhere"),
        (("--text", "man " * 40), "text: .*too long"),
        (("--n_samples", "0"), "n_samples: got 0"),
        (("--skip_steps", "101"), "skip_steps: got 101"),
        (("--ddim", "--ddim_eta", "2"), "ddim_eta: got 2.0"),
        (("--var_type", "learned_range"), "var_type: got learned_range"),
        (("--prompts", "nowhere.txt"), "prompts: there is no file .*nowhere.txt"),
        (("--model.default_weights", "null"), "weights: got none"),
        (("--model.guidance.contrasts", "[[old]]", "--text", "an old man"), "contrasts: got .*old"),
        (("--model.optim.ema_decay", "2"), "optim.ema_decay: got 2.0, expected 0 to below 1"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_half_written(
    config: str, tmp_path: Path, flags: tuple, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}") as stopped:
        predict(config, tmp_path / "x", *flags)
    assert "\n" not in str(stopped.value.code)
    assert not list(tmp_path.glob("x/*.png"))


def test_a_bug_keeps_its_traceback(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("clipward.sampler.Sampler.sample_in_chunks", broken)
    with pytest.raises(ValueError, match="a bug"):
        predict(config, tmp_path / "x", "--n_samples", "1")


@pytest.mark.parametrize("command", ["predict", "test"])
def test_the_default_config_draws_with_what_ships(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--text", "a man", "--n_samples", "1", "--skip_steps", "1", "--data.val_count", "8", "--data.size", "64"]
    main([command, *flags, "--save_dir", "out"])
    assert Path("out", "000001.png" if command == "predict" else "report.json").exists()


def test_a_weight_that_breaks_the_guidance_says_what_to_do(config: str, tmp_path: Path) -> None:
    rows = [{"text": "a man", "guidance_weight": weight, "seed": 0} for weight in (20, 1e38)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prompts", str(tmp_path / "rows.jsonl"), "--method", "clip_guidance", "--micro_batch", "1"]
    command = ["predict", "-c", config, *flags, "--skip_steps", "3", "--save_dir", str(tmp_path / "out")]
    stay = "use a smaller weight, or another text or method; pictures that are finished stay"
    with pytest.raises(SystemExit, match=rf"^error: guidance: .* in request .'index': 1, [^\n]*; {stay}$"):
        main(command)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("1e+38", "20"))
    main(command)
    assert [row["guidance_weight"] for row in metadata(tmp_path / "out")] == [20, 20]


def test_test_judges_prompt_accuracy(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_classifier(tmp_path / "judge.safetensors", Classifier(load_vocabulary("faces")[0], 8))
    flags = ["--judge", str(tmp_path / "judge.safetensors"), "--save_dir", str(tmp_path / "out"), "--n_samples", "3"]
    flags += ["--micro_batch", "3", "--method", "clip_guidance"]
    texts = ["--text", "an old man with a smile", "a girl", "--guidance_weight", "0", "50"]
    main(["test", "-c", config, *flags, *texts])
    report = json.loads((tmp_path / "out/report.json").read_text())
    plain, guided = report["table"]
    assert (plain["guidance_weight"], guided["guidance_weight"], plain["pictures"]) == (0, 50, 3)
    assert guided["pictures"] == 6
    assert (plain["cost"]["network_forwards"], plain["cost"]["network_backwards"]) == (4, 0)
    assert guided["cost"]["network_backwards"] > 0
    assert guided["twin_distance"] > 0
    assert {"fid", "kid"} < plain.keys()
    assert plain["cost"]["peak_bytes"] > 2**20
    assert Image.open(tmp_path / "out/curve.png").size == (1500, 750)
    assert list((tmp_path / "out").glob("events.out.tfevents*"))
    assert [(row["text"], row["guidance_weight"]) for row in report["texts"]] == [
        ("an old man with a smile", 0),
        ("an old man with a smile", 50),
        ("a girl", 0),
        ("a girl", 50),
    ]
    assert set(report["texts"][0]["attributes"]) == {"gender", "age", "smile"}
    assert "| an old man with a smile | 50 | 3 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"report\.json exists"):
        main(["test", "-c", config, *flags, *texts])
    with pytest.raises(SystemExit, match="the judge finds nothing to look for in 'a dog'"):
        main(["test", "-c", config, *flags, "--text", "a dog", "--overwrite", "true"])


@pytest.fixture
def judged(config: str, tmp_path: Path) -> list[str]:
    """A command that judges two pictures."""
    save_classifier(tmp_path / "judge.safetensors", Classifier(load_vocabulary("faces")[0], 8))
    command = [
        "test",
        "-c",
        config,
        "--judge",
        str(tmp_path / "judge.safetensors"),
        "--save_dir",
        str(tmp_path / "out"),
    ]
    return [*command, "--text", "a man", "--n_samples", "1", "--skip_steps", "2", "--method", "clip_guidance"]


def write_data(folder: Path, name: str, **arguments: Any) -> list[str]:
    """Flags that give ``test`` another data module."""
    data = {"class_path": f"clipward.datamodules.{name}", "init_args": arguments}
    (folder / "data.yaml").write_text(json.dumps(data))
    return ["--data", str(folder / "data.yaml")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("faces.FacesDataModule", {"val_count": 0}, "data.val_count: got 0, expected 1 or more"),
        ("celebahq.CelebAHQDataModule", {"path": "nowhere.parquet"}, "data.path: "),
        (
            "celebahq.CelebAHQDataModule",
            {"path": "x", "labels": {"age": {"young": "a", "old": "b"}, "gender": {"woman": "c", "man": "d"}}},
            "data.labels: got age, gender, expected gender, age, hair, smile, glasses, as in judge$",
        ),
        ("streams.StreamDataModule", {"path": "nowhere.parquet"}, "data.path: there is no file 'nowhere.parquet'"),
    ],
)
def test_test_looks_at_its_data_before_it_draws(
    judged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict, message: str
) -> None:
    draw = Mock()
    monkeypatch.setattr("clipward.sampler.Sampler.sample_in_chunks", draw)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([*judged, *write_data(tmp_path, name, **arguments)])
    assert not draw.called
    assert not (tmp_path / "out").exists()


def test_test_keeps_what_the_judges_say_where_the_comparison_fails(
    judged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(judged)
    failing = Mock(side_effect=InputError("data: got a damaged picture"))
    with monkeypatch.context() as broken:
        broken.setattr("clipward.evaluation.reference.Reference.from_batches", failing)
        with pytest.raises(SystemExit, match=r"^error: data: got a damaged picture"):
            main([*judged, "--n_samples", "2", "--overwrite", "true"])
    assert len(load_judgements(tmp_path / "out/pictures.parquet")) == 4
    assert not (tmp_path / "out/report.json").exists()  # which was of other pictures
    main(judged)  # goes into the same folder
    assert (tmp_path / "out/report.json").exists()


def test_a_picture_costs_what_was_asked_for(judged: list[str], tmp_path: Path) -> None:
    main([*judged, "--n_samples", "2", "--guidance_weight", "9", "100"])
    table = json.loads((tmp_path / "out/report.json").read_text())["table"]
    costs = {each["guidance_weight"]: each["cost"] for each in table}
    passes = {weight: [cost["network_forwards"], cost["network_backwards"]] for weight, cost in costs.items()}
    assert passes == {0: [2, 0], 9: [2, 2], 100: [2, 2]}  # though two pictures fill no batch
    assert [cost["clip_passes"] for cost in costs.values()] == [0, 3, 3]  # one of them for the similarity


def test_test_compares_with_nothing_where_a_stream_has_no_path(judged: list[str], tmp_path: Path) -> None:
    main([*judged, *write_data(tmp_path, "streams.StreamDataModule")])
    assert json.loads((tmp_path / "out/report.json").read_text())["table"][0]["fid"] is None


def test_convert_writes_what_weights_takes_and_diffusers_opens(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture
) -> None:
    source, folder, file = tmp_path / "model.ckpt", tmp_path / "diffusers", tmp_path / "x.safetensors"
    torch.save({"ema": {"shadow": Pesser(ch_mult=(1, 2), attn_resolutions=(16,)).make()}}, source)
    main(["convert", str(source), str(folder), "--to", "diffusers", "--image_size", "16"])
    main(["convert", str(folder), str(file)])
    assert "1.0 M parameters for 16×16 pictures" in capsys.readouterr().out
    direct, back = load_weights(source), load_weights(file)
    leading = Scheduler(skip_type="leading")  # as the folder says; `uniform` has no name there
    assert back.architecture == replace(direct.architecture, image_size=16, scheduler=leading)
    assert all(torch.equal(value, direct.state[name]) for name, value in back.state.items())
    flags = ["predict", "-c", config, "--n_samples", "1", "--skip_steps", "2"]
    for name, weights in (("a", folder), ("b", file)):
        main([*flags, "--weights", str(weights), "--save_dir", str(tmp_path / name)])
    a, b = (Image.open(tmp_path / name / "000000.png").tobytes() for name in ("a", "b"))
    assert a == b
    with pytest.raises(SystemExit, match=r"error: target: .*diffusers exists; use another name"):
        main(["convert", str(file), str(folder), "--to", "diffusers"])
    with pytest.raises(SystemExit, match="error: weights: there is no file"):
        main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "y")])
    with pytest.raises(SystemExit, match="error: schedule: got 'log', expected one of linear"):
        main(["convert", str(file), str(tmp_path / "y"), "--schedule", "log"])
    for known in (file, folder):
        for flag, other in (("schedule", "cosine"), ("parametrisation", "v"), ("image_size", "32")):
            with pytest.raises(SystemExit, match=f"{flag}: got {other}, but .* says [a-z0-9]+; leave it out"):
                main(["convert", str(known), str(tmp_path / "y"), f"--{flag}", other])
        with pytest.raises(SystemExit, match=r"head_channels: got 8, but .* says None; leave it out"):
            main(["convert", str(known), str(tmp_path / "y"), "--head_channels", "8"])
    assert not (tmp_path / "y").exists()
    main(["convert", str(file), str(tmp_path / "y"), "--schedule", "linear", "--image_size", "16"])


def test_a_missing_guidance_model_is_named_before_anything_is_written(config: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: noisy_clip: got none"):
        predict(config, tmp_path / "x", "--text", "a man", "--method", "glide", "--model.guidance.noisy_clip", "null")
    assert not (tmp_path / "x").exists()
    predict(config, tmp_path / "x", "--n_samples", "1", "--method", "glide", "--model.guidance.noisy_clip", "null")


def test_several_clips_are_named_on_the_command_line(tmp_path: Path, config: str, tiny_clip: Path) -> None:
    clips = [str(tiny_clip)] * 2
    flags = ["--text", "a man", "--n_samples", "1", "--unguided", "false", "--save_dir", str(tmp_path / "out")]
    main(["predict", "-c", config, "--clip", *clips, "--clip_weights", "2", "1", *flags])
    row = json.loads((tmp_path / "out/metadata.jsonl").read_text())
    assert row["clip"] == f"2·{clips[0]} + 1·{clips[1]}"


def test_precision_auto_takes_what_the_processor_computes_in(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    draw = ["predict", "-c", config, "--n_samples", "1", "--skip_steps", "1", "--precision"]
    cases = (
        ({"avx2"}, "32-true", "doesn't compute"),
        ({"avx512_bf16", "avx2"}, "bf16-mixed", "(avx512_bf16) computes"),
    )
    for flags, expected, reason in cases:
        monkeypatch.setattr("clipward.cli.precision.cpu_flags", lambda flags=flags: flags)
        main([*draw, "auto", "--save_dir", str(tmp_path / expected)])
        said = capsys.readouterr().out
        assert f"precision: {expected}, since this CPU" in said
        assert reason in said
        assert metadata(tmp_path / expected)[0]["precision"] == expected
    main([*draw, "bf16-true", "--save_dir", str(tmp_path / "named")])
    assert "precision: " not in capsys.readouterr().out
    assert metadata(tmp_path / "named")[0]["precision"] == "bf16-true"
    for value, others in (("auto", ["--trainer.precision", "32-true"]), ("half", [])):
        with pytest.raises(SystemExit, match=f"^error: precision: got '?{value}"):
            main([*draw, value, *others, "--save_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_wrong_judge_of_samples_is_named_before_anything_is_written(config: str, tmp_path: Path) -> None:
    settings = yaml.safe_load(Path(config).read_text())
    (samples,) = [each for each in settings["trainer"]["callbacks"] if each["class_path"].endswith("GuidedSamples")]
    samples["init_args"] = {"text": ["a man"], "judge": ["nothing.safetensors"]}
    settings["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    Path(config).write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match=r"^error: judge: there is no file 'nothing\.safetensors'$"):
        main(["fit", "-c", config])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("command", "said"), [("{} > /dev/full", "no space is left"), ("{} | head -c 1", "")])
def test_an_output_that_ends_early_is_no_traceback(command: str, said: str) -> None:
    call = command.format(f"{sys.executable} {ROOT / 'cli.py'} predict --help")
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", call], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr
    assert "Exception" not in ran.stderr
    assert said in ran.stderr


@pytest.mark.parametrize("args", [["--weights", "\udcff"], ["--weights=a\udcff"]])
def test_a_name_that_is_no_utf8_is_named(args: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^error: weights: got '[^']*udcff', which is not UTF-8; rename it$"):
        main(["predict", *args])


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("given", ["x", "", "-1"])
def test_a_rank_that_is_no_number_is_named(name: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, given)
    with pytest.raises(SystemExit, match=f"^error: {name}: got '{given}' in the environment, expected a whole number"):
        main(["predict"])


def test_a_working_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match=r"^error: the working folder is gone; change to one that is there$"):
        main(["predict", "--help"])


def test_only_a_lost_reader_of_the_output_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "of a socket")

    monkeypatch.setattr("clipward.cli.run", fail)
    with pytest.raises(BrokenPipeError):
        main(["predict"])


def test_a_terminal_of_ascii_is_written_to() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([sys.executable, ROOT / "cli.py", "predict", "--help"], capture_output=True, env=environment)
    assert ran.returncode == 0
    assert b"--text" in ran.stdout
