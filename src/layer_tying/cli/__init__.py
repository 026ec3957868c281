"""The command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        from layer_tying.cli import command
    except ModuleNotFoundError as error:
        wanted = "pip install 'dynamic-layer-tying[train]'"
        print(f"layer-tying: {error.name} is not installed: {wanted}", file=sys.stderr)
        return 2
    return command.main(arguments)
