import os
import zipfile
from pathlib import Path

import pytest
import torch

from clipward.callbacks.checkpoints import NEEDED, AtomicCheckpointIO, check, check_content, last_checkpoint
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


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_a_file_is_a_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.ckpt"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(InputError, match=r"ckpt_path: got .*, which is .*; expected a file that fit saved"):
        check(path, tmp_path)
    assert last_checkpoint(tmp_path) is None


SOUND = {"state_dict": {}, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0"}


class Unpickled:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "it has no state_dict, epoch"),
        (torch.zeros(2), "but 'Tensor'"),
        ([1, 2], "but 'list'"),
        (dict.fromkeys(NEEDED, 1), "state_dict is 1, expected a mapping"),
        (Unpickled(), "Weights only load failed"),
        (SOUND | {"loops": {}}, "loops.fit_loop is no mapping"),
        (SOUND | {"loops": {"fit_loop": 3}}, "loops.fit_loop is no mapping"),
        (SOUND | {"callbacks": 3}, "callbacks is 3, expected a mapping"),
        (SOUND | {"optimizer_states": 3}, "optimizer_states is 3, expected a list of mappings"),
        (SOUND | {"lr_schedulers": [3]}, r"lr_schedulers is \[3\], expected a list of mappings"),
        (SOUND | {"global_step": -1}, "global_step is -1, expected a whole number from 0 on"),
        (SOUND | {"epoch": "x"}, "epoch is 'x', expected a whole number from 0 on"),
        (SOUND | {"pytorch-lightning_version": 3}, "pytorch-lightning_version is 3, expected one such as 2.6.0"),
        (SOUND | {"pytorch-lightning_version": "zzz"}, "pytorch-lightning_version is 'zzz', expected one"),
        (SOUND | {"pytorch-lightning_version": "0.0.1"}, "pytorch-lightning_version is '0.0.1', expected one"),
    ],
)
def test_a_foreign_file_is_no_checkpoint(
    tmp_path: Path, content: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=f"ckpt_path: .* is no checkpoint of fit.*{message}") as refused:
        check_content(tmp_path / "x.ckpt")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_checkpoint_that_would_unpack_to_much_more_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**24))
    with pytest.raises(InputError, match=r"ckpt_path: .* is damaged .*would unpack to 16 MiB"):
        check(path, tmp_path)


def test_a_full_disk_is_the_disks_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc]")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({}, str(tmp_path / "x.ckpt"))
    assert not list(tmp_path.iterdir())
