"""Named moments of a run, so that tests can stop it at an instant of their choice.

The program calls ``at("save")`` and the like; nothing happens unless somebody subscribed.
"""

from __future__ import annotations

from collections.abc import Callable

_subscriber: Callable[[str], object] | None = None


def at(name: str) -> None:
    """Say that a moment has come."""
    if _subscriber is not None:
        _subscriber(name)


def subscribe(function: Callable[[str], object] | None) -> None:
    """Have a function called with the name of each moment; None ends that."""
    global _subscriber  # noqa: PLW0603
    _subscriber = function
