"""Errors in one line each: ``field: got WHAT, expected WHAT``."""

import ast
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import dedent

from clipward.errors import LIMIT, shorten

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
NEEDED = {  # what to give where something required is missing
    "model": "-c with the config of a model, such as faces",
    "judge": "--judge with a classifier's safetensors or a CLIP's folder, such as clipward:faces64/judge.safetensors",
}
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "Iterable": "a list",
}
ALL = "--help.all lists all"

KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*')
CLASS = re.compile(r"^( *)- Problem with given class_path '([^']*)':\n((?:\1 {3,}.*(?:\n|$))+)", re.MULTILINE)
FLAG = re.compile(r"unrecognized arguments: (\S+)")
SETTING = re.compile(r"(?:(Subcommand|Group) '([^']+)' does not accept option|Option) '([^']+)'")
REQUIRED = re.compile(r"the following arguments are required: (?:\w+\.)?([\w.]+)")
NO_VALUE = re.compile(r"argument (?:-\w, ?|-\w/)?(?:--)?([\w.]+): expected (.*)")
EXPECTED = re.compile(r"Expected a (<class '[^']+'>|typing\.Literal\[.*?\]|dot import path)")
GOT = re.compile(r"Got value: (.*)|Unable to load config (.*)")
NESTED = re.compile(r"NestedArg\(key='[^']*', val=(.*)\)", re.DOTALL)


def one_line(message: str, flags: Sequence[str] = ()) -> str:
    """What jsonargparse says of settings inside of settings, in many lines, as ``field: got WHAT, expected WHAT``.

    Args:
        message: its own.
        flags: those that there are; one of them may have been meant.
    """
    keys: list[str] = []
    text, owner = message, ""
    while found := KEY.match(text) or CLASS.search(text):
        if found.re is KEY:
            keys, text, owner = [*keys, found[1]], text[found.end() :], ""
        else:
            text, owner = dedent(found[3]), found[2]
    if found := FLAG.match(text):
        name = found[1].partition("=")[0]
        if keys:
            return f"{'.'.join([*keys, name.lstrip('-')])}: {_short(owner)} has no such setting; {ALL}"
        if not name.startswith("-"):
            return f"{name!r}: got a value without a flag; put quotes around values with spaces"
        near = _nearest(name, flags)
        return f"{name}: there is no such flag; {f'use {near}' if near else ALL}"
    if found := SETTING.match(text):
        keys += [found[2], found[3]] if found[1] == "Group" else [found[3]]
        return f"{'.'.join(keys)}: {_short(owner) or found[2]} has no such setting; {ALL}"
    if found := REQUIRED.match(text):
        return f"{found[1]}: got none, expected {NEEDED.get(found[1], 'a value')}"
    if found := NO_VALUE.match(text):
        return f"{found[1]}: got nothing, expected {found[2].replace('argument', 'value')}"
    if not keys:
        return collapse(text)
    if owner:
        return f"{'.'.join(keys)}: got {owner}, expected a class that takes these settings ({collapse(text)[:100]})"
    return f"{'.'.join(keys)}: got {_given(text)}, expected {_expected(text) or 'settings, or a file of them'}"


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _nearest(name: str, flags: Sequence[str]) -> str | None:
    """The flag that may have been meant: of the same group, with a name that looks like it."""
    group, _, last = name.rpartition(".")
    members = {flag.rpartition(".")[2]: flag for flag in flags if flag.rpartition(".")[0] == group}
    return next((members[near] for near in get_close_matches(last, members, 1)), None)


def _given(text: str) -> str:
    _, union, value = text.rpartition("Given value: ")
    if not union:
        found = GOT.search(text)
        value = (found[1] or found[2] or "") if found else collapse(text)
    value = value.strip()
    nested = NESTED.fullmatch(value)
    value = nested[1] if nested else value
    try:
        return shorten(ast.literal_eval(value) if value[:1] in ("[", "{", "(", "'", '"') else value)
    except (SyntaxError, ValueError):
        return shorten(value)


def _expected(text: str) -> str:
    """The types that were tried, in plain words; but for None, which is never what a person should give."""
    choices: list[str] = []
    words: list[str] = []
    for name in EXPECTED.findall(text):
        if name.startswith("typing.Literal"):
            choices += [str(each) for each in ast.literal_eval(name.removeprefix("typing.Literal"))]
        elif name == "dot import path":
            words.append("a class path such as package.module.Class")
        elif (short := _short(name.removeprefix("<class '").removesuffix("'>"))) != "NoneType":
            words.append(TYPES.get(short, f"a {short}"))
    if choices:
        words.append(f"one of {', '.join(dict.fromkeys(choices))}" if len(choices) > 1 else choices[0])
    return " or ".join(dict.fromkeys(words))


def collapse(text: str) -> str:
    """In one line of characters that can be printed."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))


def finish(message: str, given: Sequence[str] = ()) -> str:
    """An error in one line, in which what was given is cut, but for the paths of files that exist.

    Args:
        message: of any length.
        given: the arguments of the command line, which it may repeat.
    """
    line = collapse(message)
    repeated = {form for arg in given for form in (collapse(arg), repr(arg)[1:-1])}
    repeated |= {word.strip("'\"()[]{},:;") for word in line.split()}
    for value in sorted(repeated, key=len, reverse=True):
        if len(value) > LIMIT and not _exists(value):
            line = line.replace(value, f"{value[: LIMIT - 1]}…")
    return line


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def reports() -> bool:
    """Whether this process prints an error: of those that work together, the first one that has any.

    Before they have met, all have the same error, and the process of rank 0 prints it. Later, an error may be of one
    process alone.
    """
    if (torch := sys.modules.get("torch")) and torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            return torch.distributed.distributed_c10d._get_default_store().add("clipward/error", 1) == 1
        except RuntimeError:  # the process that holds the store is gone, after its own error
            return False
    return first_process()


def first_process() -> bool:
    return not any(os.environ.get(rank, "0").lstrip("0").isdecimal() for rank in RANKS)
