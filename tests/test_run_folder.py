"""What a logger wrote of a training that never began goes again, and nothing else does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from clipward.cli import main
from clipward.cli.run_folder import BEGUN, removing_unbegun


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_after(write: Callable[[], None], logger: Logger) -> None:
    def fail() -> None:
        with removing_unbegun([logger]):
            write()
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_run_that_never_began_leaves_no_folder(kind: type, tmp_path: Path) -> None:
    logger = kind(tmp_path / "logs", name="x")

    def write() -> None:
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"b": 1.0})
        logger.save()
        assert listed(tmp_path)

    fail_after(write, logger)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", [BEGUN, "mine.txt"])
def test_a_run_that_began_or_holds_something_else_stays(name: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="x")

    def write() -> None:
        logger.log_metrics({"b": 1.0})
        (tmp_path / "x/version_0" / name).write_text("")

    fail_after(write, logger)
    assert f"x/version_0/{name}" in listed(tmp_path)


def test_a_folder_that_was_there_stays_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "x/version_0"
    run.mkdir(parents=True)
    (run / "hparams.yaml").write_text("")
    logger = TensorBoardLogger(tmp_path, name="x", version=0)
    fail_after(lambda: None, logger)
    assert listed(tmp_path) == ["x", "x/version_0", "x/version_0/hparams.yaml"]


def test_a_fit_that_fails_on_its_input_leaves_no_folder(config: str, tmp_path: Path) -> None:
    before = listed(tmp_path)
    with pytest.raises(SystemExit, match=r"error: data\.size: got 32, expected 16, the model's"):
        main(["fit", "-c", config, "--data.size", "32"])
    assert listed(tmp_path) == before
