"""What pip installs: one package that stands alone, with its configs and weights."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from shutil import copytree
from zipfile import ZipFile

import pytest
import yaml

import clipward

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = PROJECT["tool"]["setuptools"]["package-dir"]  # clipward.callbacks: callbacks
BESIDE = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
MINE = "raise AssertionError('a stranger was imported')\n"


def shipped() -> dict[str, Path]:
    """Every file of ours, by its name in the wheel, which leaves out the weights that are not for commercial use."""
    folders = {name.replace(".", "/"): ROOT / folder for name, folder in ROOMS.items()}
    return {
        f"{name}/{file.relative_to(folder).as_posix()}": file
        for name, folder in folders.items()
        for file in folder.rglob("*")
        if file.is_file()
        and not file.is_relative_to(ROOT / "checkpoints/celeba64")
        and not any(part == "__pycache__" or part.startswith(".") for part in file.relative_to(folder).parts)
    }


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that was built from it, made beside a copy of the sources."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ROOMS.values():
        copytree(ROOT / folder, source / folder)
    for folder in ("tests", "docs"):
        (source / folder).mkdir()
        (source / folder / "test_nothing.py").touch()
    for name in BESIDE:
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "build", "--no-isolation", "--outdir", dist, source)
    return dist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site-packages")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, next(built.glob("*.whl")))
    return target


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path) -> dict:
    """Where and with what a person runs it who has modules of their own, named like the repository's folders."""
    (tmp_path / "callbacks").mkdir()
    for name in ("errors.py", "diffusion.py", "callbacks/__init__.py"):
        (tmp_path / name).write_text(MINE)
    return {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}}


def test_the_version_is_told_once() -> None:
    assert clipward.__version__ == importlib.metadata.version("clipward") == PROJECT["project"]["version"]


def test_the_newest_change_is_of_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["project"]["version"]


def test_the_hooks_run_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={hooks['repos'][0]['rev'].removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_lock_has_the_pinned_versions_with_hashes_and_all_dependencies() -> None:
    def normalise(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    locked = (ROOT / "requirements.lock").read_text()
    assert "://" not in locked
    blocks = re.findall(r"^([\w.-]+)==(\S+) ((?:\\\n +--hash=sha256:[0-9a-f]{64} ?)+)$", locked, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^\S", locked, re.MULTILINE))
    assert {name: version for name, version, _ in blocks} == {normalise(name): pin for name, pin in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    assert {normalise(re.split(r"[^\w.-]", each)[0]) for each in needed} <= {name for name, _, _ in blocks}


def test_the_wheel_holds_one_package_with_all_that_it_needs(built: Path) -> None:
    with ZipFile(next(built.glob("*.whl"))) as wheel:
        sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    info = next(name.split("/")[0] for name in sizes if ".dist-info/" in name)
    assert {name.split("/")[0] for name in sizes} == {"clipward", info}
    assert {name: size for name, size in sizes.items() if name.startswith("clipward/")} == {
        name: file.stat().st_size for name, file in shipped().items()
    }
    assert {"clipward/py.typed", "clipward/configs/faces.yaml", "clipward/checkpoints/faces64/ddpm.safetensors"} <= set(
        sizes
    )
    assert f"{info}/licenses/LICENSE" in sizes


def test_the_sdist_holds_the_sources_and_nothing_else(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = [Path(member.name).parts for member in sdist.getmembers()]
    assert len({parts[0] for parts in names}) == 1
    made = {"PKG-INFO", "setup.cfg", "clipward.egg-info"}
    assert {parts[1] for parts in names if len(parts) > 1} == made | set(BESIDE) | set(ROOMS.values())


def test_the_installed_package_is_the_one_that_runs(installed: Path, elsewhere: dict) -> None:
    code = "import clipward, clipward.callbacks as c; print(clipward.__file__, c.__file__, sep='\\n')"
    found = [Path(line) for line in run("-c", code, **elsewhere).splitlines()]
    assert found == [installed / "clipward/__init__.py", installed / "clipward/callbacks/__init__.py"]


def test_the_installed_command_draws_with_what_it_ships(elsewhere: dict) -> None:
    request = ["--text", "an old man with a smile", "--n_samples", "2", "--skip_steps", "2", "--save_dir", "out"]
    run("-m", "clipward.cli", "predict", *request, **elsewhere)
    out = elsewhere["cwd"] / "out"
    assert len(list(out.glob("0*.png"))) == 4  # each seed without guidance, then with
    assert (out / "grid.png").exists()


def test_the_installed_command_finds_its_configs_by_name(elsewhere: dict) -> None:
    printed = run("-m", "clipward.cli", "predict", "-c", "celebahq", "--print_config", **elsewhere)
    assert yaml.safe_load(printed)["model"]["init_args"]["network"]["image_size"] == 256
