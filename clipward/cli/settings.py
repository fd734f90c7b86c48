"""What a person asks for, before Lightning is there: which configs, and whether they and the flags are understood."""

import locale
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clipward.cli.flags import FLAGS
from clipward.cli.renamed import Setting, find_renamed, flatten
from clipward.errors import InputError, shorten
from clipward.yaml_files import load_yaml, read_mapping

DEFAULT_CONFIG = "faces"
DEFAULT_FLAGS: dict[str, list[str]] = {  # of a command without a config
    "predict": [],
    "test": ["--judge", "clipward:faces64/judge.safetensors", "clipward:faces64/judge_clip"],
}


def prepare(command: str, args: Sequence[str], with_default: bool = True) -> list[str]:
    """The arguments with the paths of configs in place of their names, and ``with_default`` config where there is none.

    Raises:
        InputError: for a config that is not there or can't be read, and for names of earlier versions.
    """
    args = split_config_flags(args)
    names = [arg.partition("=")[0] for arg in args]
    if with_default and "--config" not in args and not any(name.endswith(".help") for name in names):
        if command not in DEFAULT_FLAGS:
            raise InputError(f"config: got none, expected -c with a YAML file or one of {', '.join(shipped())}")
        judges = [] if "--judge" in names else DEFAULT_FLAGS[command]
        args = ["--config", str(shipped()[DEFAULT_CONFIG]), *judges, *args]
    settings: list[tuple[str, list[Setting]]] = []
    for place in [i + 1 for i, arg in enumerate(args) if arg == "--config"]:
        name = args[place] if place < len(args) else ""
        if "://" in name:
            continue
        path = find_config(name)
        args[place] = str(path)
        content = read_mapping(path)
        check_locale(path, content)
        check_shapes(command, path, content)
        settings.append((name, [*flatten(content), *parts(content, path.parent)]))
    settings.append(("", given_flags(args)))
    module = module_of(setting for _, each in settings for setting in each)
    for source, each in settings:
        if renamed := find_renamed(each, module):
            raise InputError(renamed_message(source, renamed))
    return args


def renamed_message(source: str, renamed: dict[str, str]) -> str:
    if len(renamed) == 1:
        ((old, new),) = renamed.items()
        return f"{old}: renamed{f' (in {source})' if source else ''}; use {new}"
    return f"{source or 'flags'}: renamed; use {', '.join(f'{new} for {old}' for old, new in renamed.items())}"


def split_config_flags(args: Sequence[str]) -> list[str]:
    """``-c X``, ``-cX``, ``-c=X``, ``--config=X`` -> ``--config X``."""
    found: list[str] = []
    for arg in args:
        if arg.startswith("--config="):
            found += ["--config", arg.removeprefix("--config=")]
        elif arg == "-c":
            found.append("--config")
        elif arg.startswith("-c"):
            found += ["--config", arg[2:].removeprefix("=")]
        else:
            found.append(arg)
    return found


def shipped() -> dict[str, Path]:
    """The configs that ship, by name."""
    from clipward.files import CONFIGS  # brings torch along

    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A file, or the config that ships by this name."""
    try:
        if Path(name).is_file():
            return Path(name)
    except (OSError, ValueError):  # too long for a path
        pass
    known = shipped()
    if name not in known:
        raise InputError(f"config: got {shorten(name)}, expected a YAML file or one of {', '.join(known)}")
    return known[name]


def check_locale(path: Path, content: dict[str, Any]) -> None:
    """Raise :class:`InputError` where the parser, which decodes files as the locale says, would read something else."""
    if locale.getpreferredencoding(False).lower() in ("utf-8", "utf8"):
        return
    try:
        same = load_yaml(path.read_text()) == content
    except ValueError:  # of the decoder
        same = False
    if not same:
        raise InputError(
            f"config: {shorten(path)} can't be read in the encoding of this locale; set PYTHONUTF8=1 in the environment"
        )


def check_shapes(command: str, path: Path, content: dict[str, Any]) -> None:
    """Raise :class:`InputError` for what the parser would only stumble over."""
    for part in ("trainer", "model", "data"):
        value = content.get(part, {})
        _check(part, value, path, dict | str | None, "settings, or a file of them")
        if isinstance(value, dict) and part != "trainer":
            _check(f"{part}.class_path", value.get("class_path", ""), path, str, "a class path")
            _check(f"{part}.init_args", value.get("init_args"), path, dict | None, "settings")
    for name, flag in FLAGS[command].items():
        value = content.get(name)
        if flag.several:
            _check(name, value, path, list | None, f"a list, such as [{shorten(value)}]")
        elif not flag.value:
            _check(name, value, path, bool | None, "true or false")


def _check(name: str, value: Any, path: Path, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name}: got {shorten(value)} in {path}, expected {expected}")


def parts(content: dict[str, Any], folder: Path) -> list[Setting]:
    """The settings of files that stand in place of a part of a config, such as ``model: model.yaml``."""
    found: list[Setting] = []
    for part in ("trainer", "model", "data"):
        name = content.get(part)
        if isinstance(name, str) and name.endswith((".yaml", ".yml")) and (folder / name).is_file():
            found += flatten(read_mapping(folder / name), f"{part}.")
    return found


def given_flags(args: Sequence[str]) -> list[Setting]:
    """The flags of a command line, each with the value that follows it."""
    found: list[Setting] = []
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            setting = {name: value if equals else following}
            found += [*flatten(setting), *parts(setting, Path())]
    return found


def module_of(settings: Iterable[Setting]) -> str:
    """The class of the model, as the last setting says."""
    paths = [value for name, value in settings if name in ("model", "model.class_path") and isinstance(value, str)]
    return paths[-1].rpartition(".")[2] if paths else "DDPMModule"
