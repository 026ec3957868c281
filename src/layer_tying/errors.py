"""The one kind of error that a caller can mend: wrong input."""


class InputError(ValueError):
    """Input that cannot be used: says what was wrong, with the value, and what to do about it.

    The command prints it in one line and exits with code 2; it never ends in a traceback.
    """
