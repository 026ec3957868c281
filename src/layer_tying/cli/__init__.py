"""The command."""

from layer_tying.cli.command import main

__all__ = ["main"]
