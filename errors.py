"""The error that a person can mend."""


class InputError(ValueError):
    """Bad input: one line that names the field, what was given and what would do. The CLI prints it bare."""
