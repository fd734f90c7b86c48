import json
from pathlib import Path

import pytest

from benchmarks.methods import METHODS, chosen, compare
from benchmarks.scaling import FIT, PREDICT, measured
from clipward.datamodules.faces import caption
from clipward.evaluation.report import load_rows
from clipward.guidance import methods

ROOT = Path(__file__).parent.parent


def test_the_methods_are_those_of_the_package() -> None:
    assert {method for method, _ in METHODS.values()} <= methods.METHODS.keys()


def test_the_texts_are_those_of_the_contract() -> None:
    texts = (ROOT / "benchmarks/faces_texts.txt").read_text().splitlines()
    assert len(texts) == len(set(texts)) == 12
    words = {word for i in range(3000) for word in caption(0, i).replace(",", "").split()}
    assert {word for text in texts for word in text.replace(",", "").split()} <= words


def test_a_method_is_judged_into_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(METHODS, "evidence", ("evidence", [20]))
    monkeypatch.setattr("benchmarks.methods.POOL", 2)
    compare(tmp_path, only=["evidence", "unguided", "faces", "chosen"], n_samples=1, val_count=300)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| unguided | 0 | 12 | " in table
    assert "| unseen faces |  | 12 | 100.0% ± 0.0% | 100.0% | " in table
    assert "| evidence | 20 | 12 | " in table
    texts = (ROOT / "benchmarks/faces_texts.txt").read_text().splitlines()
    drawn = load_rows(tmp_path / "evidence/pictures.parquet")
    assert [(row["text"], row["seed"]) for row in drawn] == [(text, 1000 + i) for i, text in enumerate(texts)]
    (entry,) = json.loads((tmp_path / "report.json").read_text())["evidence"]
    assert entry["drift"] > 0
    rows = [row for folder in ("unguided", "chosen") for row in load_rows(tmp_path / folder / "pictures.parquet")]
    assert {row["seed"] for row in rows} == set(range(1000, 1024))
    obeyed = chosen(rows, texts, 1)
    assert len({each["seed"] for each in obeyed}) == len({each["text"] for each in obeyed}) == len(obeyed) > 1
    assert all(all(next(iter(each["seen"].values())).values()) for each in obeyed)
    assert f"| unguided that obey |  | {len(obeyed)} | 100.0%" in table
    men = [row for row in rows if row["text"] == "a man"]
    share = len(men) / sum(next(iter(row["seen"].values()))["gender"] for row in men)
    forwards = {each["text"]: each["cost"]["network_forwards"] for each in obeyed}
    assert forwards["a man"] == pytest.approx(50 * share)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    before = (tmp_path / "evidence/report.json").stat().st_mtime_ns
    compare(tmp_path, only=["evidence"], n_samples=1, val_count=300)  # what is there is not judged again
    assert (tmp_path / "evidence/report.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other texts or seeds"):
        compare(tmp_path, n_samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_are_metered(strategy: str) -> None:
    for command, size in (([*PREDICT, "--skip_steps", "2"], 2), (FIT, 4)):
        found = measured(command, size, batches=1, strategy=strategy, processes=2)
        assert found["rate"] > 0
        assert found["peak"] > 2**28
