"""What mkdocs does beside its plugins: pages from the folders beside ``docs``, and their links."""

import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "checkpoints/celeba64/README.md",
    "checkpoints/faces64/README.md",
    "notebooks/quickstart.ipynb",
]


@event_priority(100)  # before mkdocstrings looks for the package
def on_config(config: Any) -> None:
    """Put the package together as pip does, so that its docstrings are found without an installed one."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    tree = Path(tempfile.mkdtemp())
    for name, folder in sorted(packages.items()):
        place = tree.joinpath(*name.split("."))
        place.mkdir(exist_ok=True)
        for path in (ROOT / folder).iterdir():
            if f"{name}.{path.name}" not in packages and path.name != "__pycache__":
                (place / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]


def on_files(files: Any, config: Any) -> Any:
    for path in BESIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A page of ``docs`` stands one folder higher on the site than in the repository."""
    if page.file.src_uri in BESIDE:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """References in docstrings, such as those to functions, are shown as code."""
    return re.sub(r":(?:class|func|meth|attr|data|mod):<code>~?", "<code>", html)
