"""Who may import whom: cli → {lightning_modules, datamodules, callbacks} → diffusion → torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"cli", "errors", "lightning_modules", "datamodules", "callbacks", "diffusion"}
MAY = {
    "diffusion": {"diffusion", "errors"},
    "datamodules": {"datamodules", "errors"},
    "lightning_modules": {"lightning_modules", "diffusion", "errors"},
    "callbacks": {"callbacks", "diffusion", "errors"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", MAY)
def test_packages_import_only_what_they_may(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots & OURS <= MAY[package], path
        if package == "diffusion":
            assert "lightning" not in roots, path


def test_sampling_and_guidance_never_meet() -> None:
    assert "diffusion.guidance" not in imported(ROOT / "diffusion/sampling.py")
    assert "diffusion.sampling" not in imported(ROOT / "diffusion/guidance.py")


def test_open_clip_has_one_importer_and_test_libraries_none() -> None:
    for path in ROOT.glob("*/*.py"):
        if path.parent.name == "tests":
            continue
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"diffusers", "transformers", "pytest"}, path
        assert "open_clip" not in roots or path == ROOT / "diffusion/clip.py", path
