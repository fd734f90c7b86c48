import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import to_scores
from PIL import Image
from pyarrow import parquet

from benchmarks import bench, gpu, steps
from benchmarks.editing import EDITS, draw_mask, measure_seam, seams
from benchmarks.editing import compare as compare_edits
from benchmarks.methods import METHODS, compare, select_correct
from benchmarks.photographs import compare as compare_on_photographs
from benchmarks.scaling import FIT, PREDICT, measure
from clipward.datamodules.faces import attributes, caption, draw
from clipward.evaluation.cost import Cost
from clipward.evaluation.judgements import load_judgements
from clipward.evaluation.scores import Scores
from clipward.guidance import methods
from clipward.networks.unet import UNetConfig

ROOT = Path(__file__).parent.parent
TEXTS = (ROOT / "benchmarks/faces_texts.txt").read_text().splitlines()


def test_the_methods_are_those_of_the_package() -> None:
    assert {method for method, _ in METHODS.values()} <= methods.METHODS.keys()


def test_the_texts_use_the_words_of_the_captions() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 12
    words = {word for i in range(3000) for word in caption(0, i).replace(",", "").split()}
    assert {word for text in TEXTS for word in text.replace(",", "").split()} <= words


def test_a_method_is_judged_into_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(METHODS, "contrastive", ("contrastive", [20]))
    monkeypatch.setattr("benchmarks.methods.POOL", 2)
    names = ["contrastive", "unguided", "faces", "rejection"]
    compare(tmp_path, only=names, n_samples=1, val_count=300, skip_steps=6)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| unguided | 0 | 12 | " in table
    assert "| unseen faces |  | 12 | 100.0% ± 0.0% | 100.0% | " in table
    assert "| contrastive | 20 | 12 | " in table
    drawn = load_judgements(tmp_path / "contrastive/pictures.parquet")
    assert [(each.text, each.seed) for each in drawn] == [(text, 1000 + i) for i, text in enumerate(TEXTS)]
    scores = json.loads((tmp_path / "report.json").read_text())
    assert list(scores) == ["unseen faces", "rejection sampling", "unguided", "contrastive"]
    assert to_scores(scores["contrastive"][0]).twin_distance > 0
    assert (tmp_path / "figure.png").stat().st_size > 1000

    folders = [tmp_path / name / "pictures.parquet" for name in ("unguided", "rejection")]
    unguided = [each for path in folders for each in load_judgements(path)]
    assert {each.seed for each in unguided} == set(range(1000, 1024))
    correct = select_correct(unguided, TEXTS, 1)
    assert len({each.seed for each in correct}) == len({each.text for each in correct}) == len(correct) > 1
    assert all(each.is_correct() for each in correct)
    assert f"| rejection sampling |  | {len(correct)} | 100.0%" in table
    men = [each for each in unguided if each.text == "a man"]
    draws = len(men) / sum(each.is_correct() for each in men)
    forwards = {each.text: each.cost.network_forwards for each in correct}
    assert forwards["a man"] == pytest.approx(6 * draws)

    before = (tmp_path / "contrastive/report.json").stat().st_mtime_ns
    compare(tmp_path, only=["contrastive"], n_samples=1, val_count=300)  # what is there is not judged again
    assert (tmp_path / "contrastive/report.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other texts or seeds"):
        compare(tmp_path, n_samples=2)


def test_a_name_that_is_not_known_stops_before_anything_is_judged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"^only: got 'glid', expected names among .*, glide, ") as stopped:
        compare(out, only=["faces", "glid"])
    assert "\n" not in str(stopped.value)
    judges = dict.fromkeys(("path", "weights", "clip", "noisy_clip"), "x") | {"judges": ("x",)}
    with pytest.raises(SystemExit, match=r"^only: got 'contrastiv', expected names among .*, unseen photographs"):
        compare_on_photographs(save_dir=out, only=["contrastiv"], **judges)
    with pytest.raises(SystemExit, match=r"^solvers: got 'ddim', expected names among DDIM, DDPM, "):
        steps.compare(out, solvers=["ddim"])
    with pytest.raises(SystemExit, match=r"^only: got 'ungided', expected names among unguided, "):
        bench.bench(out, only=["ungided"])
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_are_metered(strategy: str) -> None:
    for command, size in (([*PREDICT, "--skip_steps", "2"], 2), (FIT, 4)):
        found = measure(command, size, batches=1, strategy=strategy, processes=2)
        assert found["rate"] > 0
        assert found["peak"] > 2**28


def test_edits_are_judged_into_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compare_edits(tmp_path, n_faces=1, skip_steps=4)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert re.search(r"^\| mask \| 1 \| 20 \| \d+ / \d+ % \| \d+\.\d \| 0\.0 \|$", table, re.MULTILINE)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    seams(tmp_path / "seams", n_faces=1, repeats=(1,), skip_steps=4)
    assert re.search(r"^\| 1 \| \d\.\d\d \|$", capsys.readouterr().out, re.MULTILINE)


def test_a_seam_is_a_step_at_the_border_alone() -> None:
    rows, columns = np.indices((64, 64))
    smooth = (2 * (rows + columns)).clip(0, 255)
    inside = (rows >= 12) & (rows < 44) & (columns >= 12) & (columns < 52)
    box = (12, 12, 52, 44)
    for levels, expected in ((smooth, 1.0), (smooth + 20 * inside, 10.0)):
        picture = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
        assert measure_seam(picture, box) == pytest.approx(expected, abs=0.15)
    assert all(0 < (np.asarray(draw_mask(text)) > 0).mean() < 0.8 for text in EDITS)


def test_photographs_are_judged_into_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn faces stand for the photographs, and their models for those of photographs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("benchmarks.photographs.METHODS", {"contrastive": ("contrastive", [20], True)})
    rows = []
    for index in range(90):
        shown, picture = attributes(3, index), io.BytesIO()
        if index != 75:  # a row that can't be read is left out
            draw(3, index).save(picture, "PNG")
        labels = {"male": shown["gender"] == "man", "young": shown["age"] == "young"}
        labels |= {"smiling": shown["smile"] == "smiling", "eyeglasses": shown["glasses"] == "with"}
        hair = {f"{name}_hair": shown["hair"] == name for name in ("black", "brown", "blond")}
        rows.append({"image": picture.getvalue(), **labels, **hair, "gray_hair": shown["hair"] == "grey"})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "faces.parquet")
    (tmp_path / "texts.txt").write_text("a man\na woman with a smile\n")
    shipped = "clipward:faces64"
    compare_on_photographs(
        str(tmp_path / "faces.parquet"),
        save_dir=tmp_path / "out",
        texts=tmp_path / "texts.txt",
        n_samples=2,
        weights=shipped,
        clip=f"{shipped}/clip",
        noisy_clip=f"{shipped}/noisy_clip",
        judges=(f"{shipped}/judge.safetensors", f"{shipped}/judge_clip"),
        reference=(0, 70),
        unseen=(70, 20),
        skip_steps=2,
    )
    scores = json.loads((tmp_path / "out/report.json").read_text())
    real = to_scores(scores["unseen photographs"][0])
    assert (real.pictures, real.prompt_accuracy, real.guidance_weight) == (4, 1.0, None)
    assert to_scores(scores["contrastive"][0]).pictures == 4


def test_ratios_are_medians_over_the_rounds() -> None:
    def runs(*seconds: float, size: float = 2.0**20) -> list[dict[str, float]]:
        return [{"seconds": each, "bytes": size, "beside the network": 0.01} for each in seconds]

    found = {"unguided": runs(1.0, 2.0, 4.0), "through the U-Net": runs(2.0, 5.0, 8.0, size=2.0**22)}
    lines = bench.format_tables(found).splitlines()
    assert "| unguided | 2.000 | 1 |" in lines
    assert "| through the U-Net ÷ unguided | 2.00 | 2.00 to 2.50 | ≤ 2.15 |" in lines
    assert lines[-1] == "| share of an unguided walk beside the network | 1.0% | | ≤ 2 % |"
    assert {name for pair in bench.RATIOS for name in pair} == bench.LOOPS.keys()


@pytest.mark.slow
def test_all_loops_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bench.bench(tmp_path, rounds=1, steps=1, quick=True)
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert all(run[0]["seconds"] > 0 for run in json.loads((tmp_path / "report.json").read_text()).values())


def test_the_settings_of_a_gpu_are_tried_on_a_cpu(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.SMALL", UNetConfig(channels=(8, 8), num_res_blocks=1, norm_groups=4))
    gpu.bench(batch=1, repeats=1, compile=False)
    assert capsys.readouterr().out.count("| float32 | ") == 3


def test_solvers_are_compared_in_a_table_and_a_figure() -> None:
    cost = Cost(20, 0, 81, 0.75, 2**30)
    scores = Scores(20.0, 48, 0.5, 0.1, 0.05, 0.9, {}, {"a": 0.5, "b": 0.25}, None, None, cost, 40.0)
    found = {("DDPM", 20): replace(scores, attribute_matched_fid=0.2)}
    assert steps.format_table(found).splitlines()[-1] == "| DDPM | 20 | 50.0% ± 5.0% | 25.0% | 0.200 | 81 | 0.75 |"
    without = {("DDPM", 20): scores}  # where too few real pictures match
    assert steps.format_table(without).splitlines()[-1] == "| DDPM | 20 | 50.0% ± 5.0% | 25.0% |  | 81 | 0.75 |"
    assert len(steps.plot(without).axes) == 2
    assert json.loads(steps.to_json(found))[0]["steps"] == 20
    assert len(steps.plot(found).axes) == 2
