"""What the docs tell a person to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from clipward.cli import main

ROOT = Path(__file__).parent.parent
DOCS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("checkpoints/*/README.md"),
    *ROOT.glob("configs/*.yaml"),
]


def commands() -> list[str]:
    found = []
    for path in DOCS:
        text = re.sub(r"\\\n\s*#?\s*", " ", path.read_text())
        found += [
            line.split("python cli.py ")[1].strip("`) ") for line in text.splitlines() if "python cli.py " in line
        ]
    return sorted({command for command in found if not command.startswith("{")})


@pytest.mark.parametrize("command", commands())
def test_the_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.split("`")[0], comments=True)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err


def test_what_the_docs_show_is_there() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path, target)
