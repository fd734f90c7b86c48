"""jsonargparse, with errors of one line, texts that stay texts, and without YAML that grows without end."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_dumper, set_loader

from clipward.cli.messages import one_line
from clipward.errors import InputError, shorten
from clipward.yaml_files import OTHER_BASE, TOO_LARGE, UnsafeYAML, check_yaml, name_faulty_tags

UNREAD = "\x00"  # before a value that is not to be read as YAML yet; no argument of a command line can hold it
NESTED = re.compile(r"--(?:model|data)\.(?!help$|class_path$|dict_kwargs\.)[^=]+")
NEGATIVE = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|-(?:inf|nan)")

read_yaml = get_loader("yaml")


def load(text: str) -> Any:
    """The value of a text in YAML, which a parser then holds to the type of its setting."""
    if text.startswith(UNREAD):
        raise UnsafeYAML("a value that is read later")
    check_yaml(text)
    with name_faulty_tags():
        return read_yaml(text)


class TextDumper(yaml.SafeDumper):
    """Puts quotes around a text that the parser would read as something else, such as 1e3, which YAML 1.1 would not."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    node = dumper.represent_str(text)
    try:
        same = "\n" in text or read_yaml(text) == text
    except yaml.YAMLError:
        same = True
    except ValueError:  # a number of thousands of digits
        same = False
    node.style = node.style if same else "'"
    return node


TextDumper.add_representer(str, _represent_text)


def dump(settings: Any) -> str:
    """Settings as YAML that :func:`load` reads as the same."""
    return yaml.dump(settings, Dumper=TextDumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_loader("yaml", load, (yaml.YAMLError,))
set_dumper("yaml", dump)


class OneLineParser(ArgumentParser):
    """A parser whose errors are an :class:`InputError` of one line, without its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "clipward", "allow_abbrev": False, **kwargs})
        self._negative_number_matcher = re.compile(f"(?:{NEGATIVE.pattern})$")  # argparse's own knows no exponents

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse; only the parser that knows the type of a setting inside of another reads its value."""
        if args is not None:
            self._check_names(args)
            self._check_numbers(args)
            args = keep_unread(args) if self.exit_on_error else [arg.replace(UNREAD, "", 1) for arg in args]
        settings = super().parse_args(args, *more, **options)
        if self.exit_on_error:  # else a parser inside of another, which knows no whole names
            self._check_base(args or (), settings)
        return settings

    def _check_names(self, args: Sequence[str]) -> None:
        """Raise :class:`InputError` for a flag that there is not, before configs and the classes they name are read."""
        if self._subcommands_action is not None:  # a command's own parser knows its flags
            return
        for arg in args:
            name = arg.partition("=")[0]
            if re.fullmatch(r"--\w+", name) and name not in self._option_string_actions:
                self.error(f"unrecognized arguments: {name}")

    @staticmethod
    def _check_numbers(args: Sequence[str]) -> None:
        """Raise :class:`InputError` for a number that no float holds."""
        for name, value in pair_values(args):
            if TOO_LARGE.fullmatch(value):
                raise InputError(f"{name}: got {shorten(value)}, expected a number below 1e308")

    @staticmethod
    def _check_base(args: Sequence[str], settings: Any) -> None:
        """Raise :class:`InputError` for 1:30 where a number is expected, which YAML reads in base 60."""
        for name, value in pair_values(args):
            if OTHER_BASE.fullmatch(value):
                group, _, rest = name.partition(".")
                found = settings.get(name, settings.get(f"{group}.init_args.{rest}", ""))
                if any(isinstance(each, int | float) for each in (found if isinstance(found, list) else [found])):
                    raise InputError(f"{name}: got {shorten(value)}, expected a plain number")

    def parse_object(self, cfg_obj: Any, *more: Any, **options: Any) -> Any:
        """Parse settings that are in a collection already; the one of a flag may still be unread."""
        for name in list(cfg_obj.keys()):
            if isinstance(cfg_obj[name], str):
                cfg_obj[name] = cfg_obj[name].removeprefix(UNREAD)
        return super().parse_object(cfg_obj, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = message.replace(UNREAD, "").replace(repr(UNREAD)[1:-1], "")
        if not self.exit_on_error:  # a parser inside of another, which goes on to say where
            super().error(message, ex)
        flags = [flag for action in self._actions for flag in action.option_strings]
        raise InputError(one_line(message, flags)) from ex


def pair_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each value of a command line with the name of its flag; a value without one has the name ""."""
    name = ""
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg.removeprefix("--").partition("=")
            if not equals:
                continue
        else:
            value = arg
        yield name, value.removeprefix(UNREAD)


def keep_unread(args: Sequence[str]) -> list[str]:
    """Mark the values of flags such as ``--model.guidance.neutral``, which ``--model`` would read before it."""
    marked: list[str] = []
    follows = False
    for arg in args:
        name, equals, value = arg.partition("=")
        is_nested = NESTED.fullmatch(name) is not None
        if is_nested and equals:
            marked.append(f"{name}={UNREAD}{value.removeprefix(UNREAD)}")
        elif follows and not arg.startswith("--"):
            marked.append(UNREAD + arg.removeprefix(UNREAD))
        else:
            marked.append(arg)
        follows = is_nested and not equals
    return marked
