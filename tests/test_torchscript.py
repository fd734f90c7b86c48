"""Tensors of a TorchScript archive are read without running its code."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from clipward.errors import InputError
from clipward.files import check_archive
from clipward.networks.torchscript import is_torchscript, read_torchscript


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.note = torch.ones(2)  # neither a parameter nor a buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)) + self.note.sum()


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner().half()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.sizes = [1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.first(x) + self.second(x.half()).float() + float(self.sizes[0])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.jit.script(Outer()).save(str(path))
    return path


def test_it_reads_what_torch_would(archive: Path) -> None:
    theirs = torch.jit.load(archive).state_dict()
    ours = read_torchscript(archive, "clip")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype


def test_only_archives_with_code_are_torchscript(archive: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert is_torchscript(archive)
    assert not is_torchscript(tmp_path / "plain.pt")
    assert not is_torchscript(tmp_path / "text.pt")


class Writer(torch.nn.Module):
    """A module whose state writes a file when torch loads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight, self.path = torch.nn.Parameter(torch.ones(2)), path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])


def test_code_in_an_archive_never_runs(tmp_path: Path) -> None:
    written, path = tmp_path / "written", tmp_path / "evil.pt"
    torch.jit.script(Writer(str(written))).save(str(path))
    with pytest.raises(InputError, match=r"clip: .* damaged, or holds more than tensors"):
        read_torchscript(path, "clip")
    assert not written.exists()
    torch.jit.load(path)
    assert written.exists()  # so the archive does what it is meant to


def rewrite(source: Path, target: Path, change: dict[str, bytes]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change.get(entry.filename.partition("/")[2], old.read(entry)))


class Runs:
    def __reduce__(self) -> tuple:
        return print, ("ran",)


def test_objects_that_are_no_modules_are_refused(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rewrite(archive, tmp_path / "evil.pt", {"data.pkl": pickle.dumps(Runs())})
    with pytest.raises(InputError, match="is refused"):
        read_torchscript(tmp_path / "evil.pt", "clip")
    assert "ran" not in capsys.readouterr().out


def test_a_cut_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, tmp_path / "short.pt", {"data/0": b"12"})
    with pytest.raises(InputError, match="another size than it says"):
        read_torchscript(tmp_path / "short.pt", "clip")


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", pickle.dumps({}))
        file.writestr("bomb/data/0", bytes(50 * 2**20))
    with pytest.raises(InputError, match=r"weights: .* would unpack to 50 MiB; expected a file by torch.save"):
        check_archive(bomb, "weights")
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1000)}, buffer)
    (tmp_path / "good.pt").write_bytes(buffer.getvalue())
    check_archive(tmp_path / "good.pt", "weights")
