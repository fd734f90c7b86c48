"""Who may import whom, as CONTRIBUTING.md says: each layer may import the ones below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # from the top; what stands in one line never imports its neighbours
    {"clipward.cli"},
    {"clipward.lightning_modules", "clipward.callbacks", "clipward.model"},
    {"clipward.sampler"},
    {"clipward.sampling_config"},
    {"clipward.guidance", "clipward.evaluation", "clipward.weights"},
    {"clipward.networks"},
    {"clipward.diffusion", "clipward.files", "clipward.texts", "clipward.editing"},
    {"clipward.yaml_files", "clipward.pictures", "clipward.values"},
    {"clipward.errors", "clipward.allocator"},
]
DATAMODULES_MAY = {"clipward.datamodules", *set().union(*LAYERS[-3:])} - {"clipward.diffusion", "clipward.allocator"}
FILES = [
    *ROOT.glob("clipward/**/*.py"),
    ROOT / "cli.py",
    *(file for room in ("callbacks", "datamodules", "lightning_modules") for file in (ROOT / room).glob("*.py")),
]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] == "clipward" or name == "cli" else f"clipward.{name}"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(name: str) -> str:
    """``clipward.guidance.core`` stands in ``clipward.guidance``."""
    return ".".join(name.split(".")[:2])


def rooms() -> set[str]:
    return {room_of(module_of(path)) for path in FILES if module_of(path) not in ("cli", "clipward")}


def test_every_room_has_a_layer() -> None:
    assert rooms() - {"clipward.datamodules"} == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    own = room_of(module_of(path))
    ours = {room_of(name) for name in imported(path) if name.startswith("clipward.")} & rooms()
    if own == "clipward.datamodules":
        assert ours <= DATAMODULES_MAY
    elif own in set().union(*LAYERS) - {"clipward.cli"}:
        depth = next(i for i, layer in enumerate(LAYERS) if own in layer)
        assert ours <= set().union({own}, *LAYERS[depth + 1 :])


@pytest.mark.parametrize("path", ROOT.glob("clipward/**/*.py"), ids=module_of)
def test_only_the_command_line_of_the_core_knows_lightning(path: Path) -> None:
    if room_of(module_of(path)) != "clipward.cli":
        assert not {name.split(".")[0] for name in imported(path)} & {"lightning", "pytorch_lightning"}


def test_sampling_and_guidance_never_meet() -> None:
    assert "clipward.guidance.core" not in imported(ROOT / "clipward/diffusion/sampling.py")
    assert "clipward.diffusion.sampling" not in imported(ROOT / "clipward/guidance/core.py")


def test_open_clip_has_one_importer_and_test_libraries_none() -> None:
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"diffusers", "transformers", "pytest"}, path
        assert "open_clip" not in roots or module_of(path) == "clipward.networks.clip", path


def test_importing_the_package_is_light() -> None:
    """``import clipward`` needs neither Lightning nor datasets nor open_clip."""
    code = "import sys, clipward; print({'lightning', 'datasets', 'open_clip', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
