"""The command line: ``clipward {fit,validate,test,predict,convert,app}``, and ``python cli.py`` in a checkout.

Lightning takes seconds to import, so only a command that runs imports it.
"""

import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from clipward.cli.help import COMMANDS, overview, short_help
from clipward.cli.messages import RANKS, finish, reports
from clipward.errors import InputError, shorten

HELP = {"-h", "--help"}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an error that a person can mend is one line on stderr, and the exit status is not 0."""
    given = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of ASCII shows "?" in place of what it can't
    try:
        check_environment()
        check_encoding(given)
        run(given)
        print(end="", flush=True)
    except InputError as error:
        sys.exit(f"error: {finish(str(error), given)}" if reports() else 1)
    except OSError as error:
        if error.errno != errno.ENOSPC and not (error.errno == errno.EPIPE and has_lost_reader()):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is left of the output has nowhere to go
        if error.errno == errno.EPIPE:  # its reader has ended, as `head` does
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(f"error: {error.filename or 'the output'}: no space is left on the device")


def has_lost_reader() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads."""
    outputs = select.poll()
    for number in (1, 2):
        outputs.register(number, 0)
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def check_environment() -> None:
    """Raise :class:`InputError` where the working folder is gone, or the environment has a rank that is no number."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working folder is gone; change to one that is there") from error
    for name in RANKS:
        given = os.environ.get(name, "0")
        if not given.isdecimal():
            raise InputError(f"{name}: got {shorten(given)} in the environment, expected a whole number, or none")


def check_encoding(args: Sequence[str]) -> None:
    """Raise :class:`InputError` for an argument of bytes that are no UTF-8, which no file of ours could hold."""
    flag = "command"
    for arg in args:
        flag = arg.partition("=")[0] if arg.startswith("-") else flag
        try:
            arg.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{flag.lstrip('-')}: got {shorten(arg)}, which is not UTF-8; rename it") from error


def run(args: list[str]) -> None:
    command, rest = (args[0], args[1:]) if args else ("", [])
    if command == "--version":
        from importlib.metadata import version

        print(f"clipward {version('clipward')}")
    elif command in HELP | {"--help.all"}:
        print(overview())
    elif command not in COMMANDS:
        raise InputError(
            f"command: got {shorten(command) if command else 'none'}, expected one of {', '.join(COMMANDS)}"
        )
    elif HELP & set(rest):
        print(short_help(command))
    elif command in ("convert", "app"):
        from importlib import import_module

        import_module(f"clipward.cli.{command}").run(["--help" if arg == "--help.all" else arg for arg in rest])
    else:
        from clipward.allocator import keep_freed_memory
        from clipward.cli import lightning_cli

        keep_freed_memory()
        lightning_cli.run(command, rest)
