"""The edits of requests: what the flags give, and what a row has of its own in their place."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from clipward.datamodules.sources import Folder
from clipward.editing import EDIT_FIELDS, PICTURES, Edit
from clipward.errors import InputError, shorten


class Edits:
    """The edits that each request is drawn with, as it is drawn with each weight.

    Args:
        options: arguments of an :class:`Edit`, None or False where they are not given. The init image may be a folder,
            each of whose pictures is edited.
        folder: what the paths in rows are relative to.

    An :class:`InputError` says where a picture can't be read, or the options of a request don't go together.
    """

    def __init__(self, options: Mapping[str, Any], folder: Path = Path()) -> None:
        self.options, self.folder = options, folder
        self._checked: set[Any] = set()

    @cached_property
    def default(self) -> list[Edit | None]:
        """The edits of the flags alone."""
        return self._make(self.options)

    def beside(self, file: str) -> "Edits":
        """The same for the rows of a file, whose paths are relative to its own."""
        return Edits(self.options, Path(file).parent)

    def of_row(self, row: Mapping[str, Any]) -> list[Edit | None]:
        """The edits of a row: its own, completed by those of the flags."""
        own = {name: row[name] for name in EDIT_FIELDS if row.get(name) is not None}
        if not own:
            return self.default  # which is checked already
        for name in PICTURES:
            if own.get(name) == "":
                raise InputError(f"{name}: got an empty name, expected a picture's file; leave it out for none")
            if isinstance(own.get(name), str):
                own[name] = os.path.join(self.folder, own[name])  # which leaves an absolute path as it is
        return self._make({**self.options, **own})

    def _make(self, options: Mapping[str, Any]) -> list[Edit | None]:
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        if not given:
            return [None]
        init_image = given.get("init_image")
        images = [init_image]
        if isinstance(init_image, str) and os.path.isdir(init_image):
            folder = Folder(Path(init_image), "image", field="init_image")
            images = [os.path.join(init_image, name) for name in folder.names]
        edits = [Edit(**{**given, "init_image": image}) for image in images]
        for edit in edits:
            self._check(edit)
        return list(edits)

    def _check(self, edit: Edit) -> None:
        """Read each picture once, so that one which can't be is found before anything is drawn."""
        for name in PICTURES:
            source = getattr(edit, name)
            if source is not None and (name, source) not in self._checked:
                if not isinstance(source, str):
                    raise InputError(f"{name}: got {shorten(source)}, expected a picture's file")
                edit.check(name)
                self._checked.add((name, source))
