"""The error that a person can mend."""

"""The error that a person can mend."""


class InputError(ValueError):
    """Bad input: one line that names the field, what was given and what would do. The CLI prints it bare."""


def first_line(error: Exception) -> str:
    """What another library's error says first, for a line of our own."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
