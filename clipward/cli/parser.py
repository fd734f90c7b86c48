"""jsonargparse, with errors of one line and without YAML that grows without end."""

from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from clipward.cli.messages import one_line
from clipward.cli.yaml_files import checked
from clipward.errors import InputError

set_loader("yaml", checked(get_loader("yaml")), (yaml.YAMLError,))


class OneLineParser(ArgumentParser):
    """A parser whose errors are an :class:`InputError` of one line, without its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "clipward", "allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse; a parser inside of another is given what that has read already, where null has become None."""
        if args is not None and not self.exit_on_error:
            args = [f"{arg.removesuffix('None')}null" if arg.endswith("=None") else arg for arg in args]
        return super().parse_args(args, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside of another, which goes on to say where
            super().error(message, ex)
        flags = [flag for action in self._actions for flag in action.option_strings]
        raise InputError(one_line(message, flags)) from ex
