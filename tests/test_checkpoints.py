import os
from pathlib import Path

import pytest
import torch

from clipward.callbacks.checkpoints import AtomicCheckpointIO, check, last_checkpoint
from clipward.errors import InputError


def saved(folder: Path, *names: str) -> list[Path]:
    """Checkpoints, each newer than the one before it."""
    paths = [folder / name for name in names]
    for age, path in enumerate(paths):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.randn(1000)}, str(path))
        os.utime(path, (1_000_000 + age, 1_000_000 + age))
    return paths


def test_a_checkpoint_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = saved(tmp_path, "a.ckpt")
    before = path.read_bytes()

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(9)}, str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_is_the_last(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    first, second = saved(tmp_path, "version_0/b.ckpt", "version_1/a.ckpt")
    assert last_checkpoint(tmp_path) == second
    os.utime(first, (2_000_000, 2_000_000))
    assert last_checkpoint(tmp_path) == first


@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path: Path, harm: str) -> None:
    oldest, older, newest = saved(tmp_path, "1.ckpt", "2.ckpt", "3.ckpt")
    for path in (older, newest):
        content, age = bytearray(path.read_bytes()), path.stat().st_mtime
        content[2000] ^= 1
        path.write_bytes({"cut": content[:2000], "changed": content, "empty": b""}[harm])
        os.utime(path, (age, age))
    with pytest.raises(InputError, match=f"{newest} is damaged .*; use --ckpt_path {oldest}, saved before it"):
        last_checkpoint(tmp_path)
    with pytest.raises(InputError, match=f"{older} is damaged"):
        check(older, tmp_path)
    check(oldest, tmp_path)
    oldest.write_bytes(b"")
    with pytest.raises(InputError, match="there is none before it"):
        check(oldest, tmp_path)
