"""A process is killed before each of its file operations: the same command goes on, and leaves nothing behind."""

import errno
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import metadata, tiny_module, tiny_trainer
from PIL import Image

from clipward.callbacks.checkpoints import AtomicCheckpointIO, last_checkpoint, remove_unfinished
from clipward.callbacks.gallery import Gallery
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.cli import main
from clipward.datamodules.prompts import PromptDataModule
from clipward.lightning_modules.ddpm import DDPMModule
from clipward.sampling_config import SamplingConfig

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Counts the operations that change a folder, and from a given one on lets none of them happen.

    What a process does while it handles an error doesn't happen either, as after a SIGKILL.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.count, self.last = 0, 10**9
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple) -> None:
        if self.folder is None or not (event == "open" or event in CHANGES):
            return
        if not isinstance(args[0], str | os.PathLike) or not os.fspath(args[0]).startswith(self.folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if self.count >= self.last:
            raise Killed
        self.count += 1

    def watch(self, folder: Path, last: int = 10**9) -> None:
        self.folder, self.count, self.last = str(folder), 0, last

    def stop(self) -> int:
        self.folder = None
        return self.count


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.stop()  # a hook can't be taken away


pytestmark = pytest.mark.filterwarnings("ignore:Your `IterableDataset`", "ignore:Couldn't infer the batch indices")


@pytest.fixture(scope="module")
def module(tiny_weights: Path) -> DDPMModule:
    return tiny_module(weights=str(tiny_weights), sampling=SamplingConfig(skip_steps=1))


def predict(module: DDPMModule, out: Path, output: str, config: str = "a: 1", **options: Any) -> PredictionWriter:
    """What the command does, without its parser."""
    writer = PredictionWriter(str(out), config, output=output, shard_size=2, **options)
    data = PromptDataModule(n_samples=3, micro_batch=2)
    data.done = writer.check(data.requests)
    try:
        if next(iter(data.predict_dataloader()), None) is None:
            writer.finish()
        else:
            trainer = tiny_trainer(out.parent, callbacks=[writer])
            trainer.predict(module, data, return_predictions=False)
    except Killed:
        writer.signals.restore()
        if writer.lock._handle is not None:
            os.close(writer.lock._handle)  # as the system does for a process that is gone
        raise
    return writer


def contents(out: Path, output: str) -> tuple[list[str], list[bytes]]:
    gallery = Gallery(out, output)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return names, [gallery.open(row).tobytes() for row in gallery.rows()]


def kill(killer: Killer, module: DDPMModule, out: Path, output: str, last: int, **options: Any) -> bool:
    """Run, and kill before the given operation; false where the run ended before it."""
    killer.watch(out, last)
    try:
        predict(module, out, output, **options)
    except Killed:
        return True
    finally:
        killer.stop()
    return False


@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_predict_is_killed_before_each_file_operation(
    output: str, tmp_path: Path, module: DDPMModule, killer: Killer, capsys: pytest.CaptureFixture
) -> None:
    killer.watch(tmp_path / "whole")
    predict(module, tmp_path / "whole", output)
    operations = killer.stop()
    expected = contents(tmp_path / "whole", output)
    assert len(expected[1]) == 3
    assert operations > 20
    for last in range(operations):
        out = tmp_path / str(last)
        assert kill(killer, module, out, output, last), last
        predict(module, out, output)
        assert contents(out, output) == expected, last


@pytest.mark.parametrize("output", ["files", "webdataset"])
def test_a_run_that_goes_on_is_killed_too(output: str, tmp_path: Path, module: DDPMModule, killer: Killer) -> None:
    predict(module, tmp_path / "whole", output)
    expected = contents(tmp_path / "whole", output)
    chance = random.Random(output)
    for attempt in range(3):
        out = tmp_path / str(attempt)
        while kill(killer, module, out, output, chance.randrange(3, 40)):
            pass
        assert contents(out, output) == expected, attempt


def test_a_run_that_overwrites_is_killed_before_each_file_operation(
    tmp_path: Path, module: DDPMModule, killer: Killer
) -> None:
    def before(out: Path) -> None:
        predict(module, out, "webdataset", config="a: 0")
        (out / "holiday.png").write_bytes(b"precious")
        (out / "backup.tar").write_bytes(b"precious")

    before(tmp_path / "whole")
    killer.watch(tmp_path / "whole")
    predict(module, tmp_path / "whole", "files", overwrite=True)
    operations = killer.stop()
    expected = sorted([*(f"{i:06d}.png" for i in range(3)), "backup.tar", "config.predict.yaml", "gallery.html"])
    expected += ["grid.png", "holiday.png", "metadata.jsonl"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == expected
    for last in range(0, operations, 3):
        out = tmp_path / str(last)
        before(out)
        assert kill(killer, module, out, "files", last, overwrite=True)
        predict(module, out, "files", overwrite=True)
        assert sorted(path.name for path in out.iterdir()) == expected, last
        assert (out / "holiday.png").read_bytes() == (out / "backup.tar").read_bytes() == b"precious"


def test_a_checkpoint_is_killed_before_each_file_operation(tmp_path: Path, killer: Killer) -> None:
    def save(folder: Path, step: int) -> None:
        AtomicCheckpointIO().save_checkpoint({"step": step}, str(folder / "last.ckpt"))

    killer.watch(tmp_path / "whole")
    save(tmp_path / "whole", 1)
    save(tmp_path / "whole", 2)
    operations = killer.stop()
    assert operations >= 8
    for last in range(operations):
        folder = tmp_path / str(last)
        killer.watch(folder, last)
        with suppress(Killed):
            for step in (1, 2):
                save(folder, step)
        assert killer.stop() == last
        found = last_checkpoint(tmp_path / str(last))
        assert found is None or torch.load(found, weights_only=True)["step"] in (1, 2)
        assert found is not None or last < operations / 2 + 1
        if last % 2:
            remove_unfinished(tmp_path)
            assert not list(folder.glob(".*"))
        save(folder, 3)
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        assert torch.load(folder / "last.ckpt", weights_only=True)["step"] == 3


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_command(flags: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    main(flags)


class Runs:
    """Starts a command again and again, in processes that are forked from one which has imported all that takes long.

    Args:
        flags: of the command.
        processes: how many work together.
    """

    def __init__(self, flags: list[str], processes: int) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["clipward.cli.lightning_cli", "open_clip", "lightning.pytorch.callbacks"])
        self.flags = flags
        if processes > 1:
            self.flags += ["--trainer.strategy", "ddp", "--trainer.devices", "1", "--trainer.num_nodes", str(processes)]
        self.processes = processes

    def start(self, out: Path) -> list[BaseProcess]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if self.processes > 1 else {}
        runs: list[BaseProcess] = []
        for rank in range(self.processes):
            settings = (address | {"NODE_RANK": str(rank)}) if address else {}
            run = self.context.Process(target=run_command, args=([*self.flags, "--save_dir", str(out)], settings))
            run.start()
            runs.append(run)
        return runs

    def finish(self, out: Path) -> float:
        """Run to the end; return the seconds that it took."""
        began = time.monotonic()
        for run in self.start(out):
            run.join(timeout=300)
            assert run.exitcode == 0
        return time.monotonic() - began

    def kill_at(self, out: Path, moments: list[float]) -> bool:
        """Run, and kill each process at its moment; return whether one was."""
        began = time.monotonic()
        runs = self.start(out)
        for moment, run in sorted(zip(moments, runs, strict=True), key=lambda each: each[0]):
            run.join(timeout=max(0.0, began + moment - time.monotonic()))
            if run.exitcode is None:
                run.kill()
        for run in runs:
            run.join(timeout=60)
        codes = [run.exitcode for run in runs]
        assert -signal.SIGKILL in codes or codes == [0] * len(runs), codes
        return codes != [0] * len(runs)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_a_command_is_killed_at_random_times_until_it_ends(
    output: str, processes: int, config: str, tmp_path: Path
) -> None:
    flags = ["predict", "-c", config, "--text", "a man", "--guidance_weight", "20", "--n_samples", "6"]
    flags += ["--skip_steps", "10", "--micro_batch", "1", "--output", output, "--shard_size", "3"]
    runs = Runs(flags, processes)
    runs.finish(tmp_path / "warm")
    took = runs.finish(tmp_path / "whole")
    chance = random.Random(output)
    for attempt in range(2):
        out, kills = tmp_path / str(attempt), 0
        first = chance.uniform(0.3, 1.1) * took
        while runs.kill_at(out, [first + chance.uniform(0, 0.5) for _ in range(processes)]):
            kills += 1
            first = chance.uniform(0.3, 1.1) * took
        print(f"{output}, {processes} processes: {kills} kills")
        assert contents(out, output)[1] == contents(tmp_path / "whole", output)[1]
        assert not list(out.glob(".*"))
        assert [row["index"] for row in metadata(out)] == list(range(12))
        assert yaml.safe_load((out / "config.predict.yaml").read_text())["save_dir"] == str(out)


def test_a_full_disk_is_one_line_that_names_the_folder(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["predict", "-c", config, "--n_samples", "1", "--skip_steps", "1", "--save_dir", str(tmp_path / "x")]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(SystemExit, match=f"^error: {tmp_path / 'x'}: No space left on device$"):
            main(command)
    main(command)
    assert len(metadata(tmp_path / "x")) == 1
    assert not list((tmp_path / "x").glob(".*"))
