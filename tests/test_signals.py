"""A command that is asked to end does so soon, says how to go on, and leaves no process behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, metadata

from clipward.callbacks.gallery import Gallery
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.callbacks.signals import MAIN, Stopped, StopSignals, is_launched
from clipward.cli import main
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.vocabulary import load_vocabulary

LONG = ["--text", "a man", "--guidance_weight", "20", "--n_samples", "5", "--skip_steps", "30", "--micro_batch", "1"]
SHORT = ["--text", "a man", "--n_samples", "2", "--skip_steps", "2", "--micro_batch", "1"]
FSDP = ["-c", "fsdp", "--trainer.devices", "2"]
DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


def start(*command: str) -> subprocess.Popen:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST"))}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *command],
        cwd=ROOT,
        env=alone | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(seen: Callable[[], object], process: subprocess.Popen) -> None:
    while not seen():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def count(out: Path, output: str = "files") -> int:
    return len(Gallery(out, output).indices()) if out.is_dir() else 0


def alive(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_predict_ends_at_a_signal_and_goes_on(number: signal.Signals, config: str, tmp_path: Path) -> None:
    flags = ["predict", "-c", config, *LONG, "--save_dir", str(tmp_path / "x")]
    process = start(*flags)
    until(lambda: count(tmp_path / "x") >= 2, process)
    asked = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert time.monotonic() - asked < 15
    assert process.returncode == 128 + number, said
    assert said.strip().endswith(f"stopped by {number.name}; the same command goes on where it stopped")
    assert "Traceback" not in said
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("0*.png")}
    assert 2 <= len(before) < 10
    assert not list((tmp_path / "x").glob(".clipward.lock"))
    main(flags)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(metadata(tmp_path / "x")) == 10
    assert not list((tmp_path / "x").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_main_one(number: signal.Signals, config: str, tmp_path: Path) -> None:
    flags = ["predict", "-c", config, *LONG, *DDP, "--save_dir", str(tmp_path / "x")]
    process = start(*flags)
    until(lambda: count(tmp_path / "x") >= 4, process)
    assert len(alive(process.pid)) == 2
    process.send_signal(number)
    asked = time.monotonic()
    while alive(process.pid):
        assert time.monotonic() - asked < 20, alive(process.pid)
        time.sleep(0.1)
    said = process.communicate()[0]
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, said
        assert said.count("the same command goes on") == 1
        assert "Traceback" not in said
    short = start(*flags)
    assert short.wait(timeout=300) == 0, short.communicate()[0]
    assert len(metadata(tmp_path / "x")) == 10
    assert not list((tmp_path / "x").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_a_sharded_predict_ends_at_a_signal_to_its_main_process(
    output: str, number: signal.Signals, config: str, tmp_path: Path
) -> None:
    flags = ["predict", "-c", config, *LONG, "--output", output, "--shard_size", "2", "--save_dir", str(tmp_path / "x")]
    process = start(*flags, *FSDP)
    until(lambda: count(tmp_path / "x", output) >= 4, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]  # when the last process has ended
    assert process.returncode == 128 + number, said
    assert said.strip().endswith(f"stopped by {number.name}; the same command goes on where it stopped")
    assert "Traceback" not in said
    assert "frame #" not in said
    before = count(tmp_path / "x", output)
    main(flags)
    assert 4 <= before < count(tmp_path / "x", output) == 10
    assert len(metadata(tmp_path / "x")) == 10
    assert not list((tmp_path / "x").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [[], FSDP], ids=["one", "fsdp"])
def test_test_ends_at_a_signal_and_writes_nothing(
    processes: list[str], number: signal.Signals, config: str, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "judge.safetensors", Classifier(load_vocabulary("faces")[0], 8))
    flags = ["test", "-c", config, *LONG, "--judge", str(tmp_path / "judge.safetensors")]
    process = start(*flags, *processes, "--n_samples", "200", "--save_dir", str(tmp_path / "x"))
    heard: list[str] = []
    for line in process.stdout or []:
        heard.append(line)
        if line.startswith("method: "):  # it begins to draw
            break
    process.send_signal(number)
    said = "".join(heard) + process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, said
    ending = "the same command starts again from the beginning, since it writes nothing before all pictures are drawn"
    assert said.strip().endswith(f"stopped by {number.name}; {ending}")
    assert "Traceback" not in said
    assert "frame #" not in said
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_runs_into_one_folder_at_once(config: str, tmp_path: Path) -> None:
    flags = ["predict", "-c", config, *LONG, "--save_dir", str(tmp_path / "x")]
    runs = [start(*flags) for _ in range(2)]
    said = [run.communicate(timeout=240)[0].strip() for run in runs]
    assert sorted(run.returncode for run in runs) in ([0, 0], [0, 1]), said
    for run, text in zip(runs, said, strict=True):
        assert "Traceback" not in text
        if run.returncode:
            reason = "another run (is writing|has written) to"
            assert re.fullmatch(rf"error: save_dir: {reason} {tmp_path / 'x'}; .*", text.splitlines()[-1])
    assert [row["index"] for row in metadata(tmp_path / "x")] == list(range(10))
    assert len(list((tmp_path / "x").glob("0*.png"))) == 10
    assert not list((tmp_path / "x").glob(".*"))


def test_a_signal_raises_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    signals = StopSignals()
    signals.install()
    signals.install()
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.status == 143
    with pytest.raises(Stopped):
        signals.check()
    signals.restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_that_python_swallows_ends_the_command_all_the_same(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalised:
        def __del__(self) -> None:  # an exception here is printed, and goes no further
            os.kill(os.getpid(), signal.SIGTERM)

    check = PredictionWriter.check

    def check_after_a_signal(*args: Any) -> set[int]:
        monkeypatch.setattr(PredictionWriter, "check", check)  # a second signal ends the process at once
        Finalised()
        return check(*args)

    monkeypatch.setattr(PredictionWriter, "check", check_after_a_signal)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's own fails the test
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "-c", config, *SHORT, "--save_dir", str(tmp_path / "x")])
    assert ended.value.code == 143
    assert "stopped by SIGTERM; the same command goes on where it stopped" in capsys.readouterr().err
    assert count(tmp_path / "x") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals = StopSignals()
        signals.install()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signals.restore()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "1", MAIN: "1"}, True),
        ({"LOCAL_RANK": "0", MAIN: "1"}, False),
        ({"LOCAL_RANK": "1", MAIN: "1", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_only_what_the_main_process_launched_ends_with_it(
    environment: dict[str, str], launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", MAIN, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_launched() == launched


# what a command writes, and where it connects to


def files(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_written_elsewhere_and_no_connection_is_tried(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    watched = [home, work, *(ROOT / name for name in ("clipward", "configs", "checkpoints", "datamodules"))]
    before = {path: time for path, time in files(*watched).items() if path.suffix != ".pyc"}
    flags = ["-c", config, "--text", "a man", "--n_samples", "2", "--skip_steps", "2"]
    for output in ("files", "parquet"):
        main(["predict", *flags, "--save_dir", str(tmp_path / output), "--output", output])
    main(["fit", "-c", config])
    after = {path: time for path, time in files(*watched).items() if path.suffix != ".pyc"}
    caches = home / ".cache"
    assert {path: time for path, time in after.items() if not path.is_relative_to(caches)} == before
