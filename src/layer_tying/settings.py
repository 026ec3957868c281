"""What all groups of settings share: their types, choices and ranges are checked in one way."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from layer_tying.errors import InputError


def check_types(group: Any) -> None:
    """Check each setting of a dataclass against its annotation.

    Raises:
        InputError: if a value is of another type, or not one of the choices of a ``Literal``.
    """
    hints = get_type_hints(type(group))
    for each in fields(group):
        value, allowed = getattr(group, each.name), alternatives(hints[each.name])
        if any(_is_a(value, kind) for kind in allowed):
            continue
        literals = [kind for kind in allowed if get_origin(kind) is Literal]
        choices = [choice for kind in literals for choice in get_args(kind) if choice]
        if choices:
            raise InputError(f"{each.name} is one of {', '.join(choices)}; got {value!r}")
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise InputError(f"{each.name} is of type {names}, got {value!r}")


def check_at_least(group: Any, least: float, names: Iterable[str]) -> None:
    """Raise an InputError if one of the named settings, None apart, is below ``least``."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} is at least {least}, got {value}")


def check_positive(group: Any, names: Iterable[str]) -> None:
    """Raise an InputError if one of the named settings is not more than 0."""
    for name in names:
        if not getattr(group, name) > 0:
            raise InputError(f"{name} is more than 0, got {getattr(group, name)}")


def check_finite(group: Any, names: Iterable[str]) -> None:
    """Raise an InputError if one of the named settings, None apart, is infinite or not a number."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not math.isfinite(value):
            raise InputError(f"{name} is a finite number, got {value}")


def check_shares(group: Any, names: Iterable[str]) -> None:
    """Raise an InputError if one of the named settings, None apart, is not from 0 to 1."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{name} is between 0 and 1, got {value}")


def alternatives(hint: Any) -> list[Any]:
    """The types that an annotation allows."""
    if get_origin(hint) in (Union, types.UnionType):
        return list(get_args(hint))
    return [hint]


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        (item, *_) = get_args(kind)
        return isinstance(value, tuple) and all(_is_a(each, item) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def hidden(default: Any) -> Any:
    """A field that is settled by the program and is no flag of the command."""
    return field(default=default, metadata={"hidden": True})
