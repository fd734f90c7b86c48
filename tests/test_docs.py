"""What the docs tell a person to type is understood."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from clipward.callbacks.gallery import save_png
from clipward.cli import main
from clipward.cli.app import parse
from clipward.cli.help import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("checkpoints/*/README.md"),
    *ROOT.glob("configs/**/*.yaml"),
]
LAUNCHER = r"(?:\w+=\S+ +|srun +|torchrun [^`]*? )*"
COMMAND = re.compile(
    rf"(?:^[ #$]*|`){LAUNCHER}(?:python +cli\.py|cli\.py|clipward) +((?:{'|'.join(COMMANDS)}) [^`\n]+)", re.MULTILINE
)


RECORD = {"index": 3, "text": "a man", "seed": 1, "guidance_weight": 20.0, "method": "contrastive", "steps": 50}
RECORD |= {
    "sampler": "ddpm",
    "weights": "clipward:faces64",
    "weights_hash": "0",
    "precision": "32-true",
    "device": "cpu",
}


def commands() -> dict[str, str]:
    """Each command in code, from its name on, with the file that has it; one with … in it is no whole command."""
    found: dict[str, str] = {}
    for path in DOCS:
        text = re.sub(r"\\\n\s*#?\s*", " ", path.read_text())
        for command in COMMAND.findall(text):
            if "…" not in command and "..." not in command:
                found[command.strip()] = str(path.relative_to(ROOT))
    return found


def test_there_are_commands() -> None:
    assert {"README.md", "configs/faces.yaml"} <= set(commands().values())


@pytest.mark.parametrize(("command", "file"), commands().items())
def test_the_command_is_understood(
    command: str, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    arguments = shlex.split(command, comments=True)
    monkeypatch.chdir(ROOT)
    for flag in {"--again", "--vary"} & set(arguments):  # there must be a picture
        monkeypatch.chdir(tmp_path)
        picture = tmp_path / arguments[arguments.index(flag) + 1]
        picture.parent.mkdir(parents=True)
        save_png(picture, Image.new("RGB", (64, 64)), json.dumps(RECORD))
    if {"-h", "--help"} & set(arguments):
        main(arguments)
    elif arguments[0] == "app":
        print(parse(arguments[1:]))
    else:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--print_config"])
        assert stopped.value.code == 0, (file, stopped.value.code)
    assert capsys.readouterr().out


def test_what_the_docs_show_is_there() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path, target)


def test_the_site_has_every_page_and_refers_to_modules_that_are_there() -> None:
    """``make docs`` needs mkdocs, which the tests don't have."""
    settings = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": ([\w/]+\.md)$", settings[settings.index("\nnav:") :], re.MULTILINE)
    beside = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "checkpoints/faces64/README.md"}
    assert set(pages) == beside | {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert len(set(pages)) == len(pages)
    hooks = (ROOT / "docs/hooks.py").read_text()
    assert all(f'"{page}"' in hooks and (ROOT / page).is_file() for page in beside)
    references = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    for module in re.findall(r"^::: clipward\.([\w.]+)$", references, re.MULTILINE):
        path = module.replace(".", "/")
        assert any((folder / f"{path}.py").is_file() for folder in (ROOT, ROOT / "clipward")), module
