"""What the docs tell a person to type is understood."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

import clipward
from clipward.callbacks.gallery import save_png
from clipward.cli import main
from clipward.cli.app import load_studio, parse
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
    cards = {f"checkpoints/{name}/README.md" for name in ("celeba64", "faces64")}
    beside = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", *cards}
    assert set(pages) == beside | {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert len(set(pages)) == len(pages)
    hooks = (ROOT / "docs/hooks.py").read_text()
    assert all(f'"{page}"' in hooks and (ROOT / page).is_file() for page in beside)
    references = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    for module in re.findall(r"^::: clipward\.([\w.]+)$", references, re.MULTILINE):
        path = module.replace(".", "/")
        assert any((folder / f"{path}.py").is_file() for folder in (ROOT, ROOT / "clipward")), module


# what the README tells is run

ELSEWHERE = (
    "app ",
    "-c ddp ",
)  # run in test_app.py, since it serves a page, and test_strategies.py, on several devices


def shrink(name: str, weights: Path, clip: Path) -> str:
    """A config that ships, for tiny networks, pictures and runs."""
    content = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    model, trainer = content["model"]["init_args"], content["trainer"]
    model |= {key: str(weights) for key in ("weights", "default_weights") if key in model}
    if "guidance" in model:
        model["guidance"]["clip"] = str(clip)
    content["data"]["init_args"] |= {"size": 16, "batch_size": 2, "num_workers": 0}
    trainer |= {"max_steps": 2, "accumulate_grad_batches": 1, "accelerator": "cpu", "enable_progress_bar": False}
    trainer |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    for callback in trainer["callbacks"]:
        given = callback["init_args"]
        given |= {key: 2 for key in ("every_n_train_steps", "every_n_steps", "n_samples") if key in given}
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_another(
    config: str, tiny_weights: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random networks that are tiny, in place of those that ship or are downloaded, and few steps and pictures."""
    monkeypatch.chdir(tmp_path)
    Path("PICTURES").mkdir()
    for i in range(6):
        Image.effect_noise((20, 20), 90).convert("RGB").save(f"PICTURES/{i}.png")
    ran = []
    for command in (f"{command} " for command, file in commands().items() if file == "README.md"):
        if any(words in command for words in ELSEWHERE):
            continue
        name, *arguments = shlex.split(command, comments=True)
        if "-c" in arguments:
            place = arguments.index("-c") + 1
            arguments[place] = shrink(arguments[place], tiny_weights, tiny_clip)
        else:
            arguments += ["-c", config]
        main([name, *arguments, "--model.sampling.skip_steps=2", *(["--n_samples=1"] if name != "fit" else [])])
        if "--save_dir" in arguments:
            folder = Path(arguments[arguments.index("--save_dir") + 1])
            assert any(folder.iterdir())
            ran.append(folder.name)
    assert ran == ["faces", "red", "celebahq", "mine", "glide"]
    assert len(list(Path("runs").glob("*/*/checkpoints/last.ckpt"))) == 2


@pytest.mark.parametrize("path", ["README.md", "docs/editing.md"])
def test_the_python_runs(path: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> clipward.Model:
        assert name == "faces64"
        return load_studio(config, device="cpu").model

    monkeypatch.setattr(clipward, "load", load)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    exec(block, {})
    pictures = re.findall(r'"(\w+\.png)"', block) or ["out/eyes.png", "out/mouth.png"]
    assert all(Image.open(picture).size[0] >= 16 for picture in pictures)
