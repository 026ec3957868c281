"""The two kinds of error that this library raises itself."""


class InputError(ValueError):
    """Input that cannot be used: says what was wrong, with the value, and what to do about it.

    The command prints it in one line and exits with code 2; it never ends in a traceback.
    """


class InvariantError(RuntimeError):
    """State and storage disagree: the layers, or an optimizer, are not what their tying says."""
