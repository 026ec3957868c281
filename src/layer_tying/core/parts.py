"""Parts of the layers that are tied each in its own way: attention, say, and feed-forward networks.

A part is what one tying shares: the layers that its settings name, without the parameters that they
leave untied. A model remembers the settings of every part. Two parts have no module in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from layer_tying.core.find import LayerStack, find_layers
from layer_tying.core.tying_settings import (
    TyingSettings,
    is_remembered,
    remember_settings,
    settings_of,
)
from layer_tying.errors import InputError

WHICH = ("layers", "untied", "by_kind")  # the settings that say which part is meant


def which(settings: TyingSettings) -> dict[str, Any]:
    """The options that name the part of these settings."""
    return {name: getattr(settings, name) for name in WHICH}


def stack_of(model: nn.Module, settings: TyingSettings) -> LayerStack:
    """The layers of a part, and where they keep the parameters that it shares.

    Raises:
        InputError: if they cannot be found.
    """
    return find_layers(model, **which(settings))


def parts_of(model: nn.Module) -> list[TyingSettings]:
    """The settings of each part that was tied, the newest last."""
    if not is_remembered(model):
        return []
    newest = settings_of(model)
    return [*newest.others, replace(newest, others=())]


def settings_of_part(
    model: nn.Module, options: Mapping[str, Any]
) -> tuple[TyingSettings, LayerStack]:
    """The settings of the part that options name, and its layers; without any, the newest one's.

    What options leave out is as it was when that part was last tied, if it was.

    Raises:
        InputError: if the layers cannot be found, or the part overlaps others.
    """
    wanted = settings_of(model).but(**options)
    stack = stack_of(model, wanted)
    if not options.keys() & {*WHICH}:
        return replace(wanted, others=()), stack
    overlapping = [part for part in parts_of(model) if _overlaps(stack, part)]
    if len(overlapping) > 1:
        one, other = (list(part.untied) for part in overlapping[:2])
        raise InputError(
            f"these layers were tied in two parts, with untied={one} and with untied={other}: name "
            f"one of them"
        )
    before = overlapping[0] if overlapping else TyingSettings()
    return before.but(**which(wanted)).but(**options), stack


def other_parts(stack: LayerStack, settings: TyingSettings) -> dict[TyingSettings, LayerStack]:
    """The parts of a model that have nothing in common with this one."""
    parts = parts_of(stack.model)
    if [which(part) for part in parts] == [which(settings)]:
        return {}
    return {part: stack_of(stack.model, part) for part in parts if not _overlaps(stack, part)}


def remember_part(stack: LayerStack, settings: TyingSettings) -> None:
    """Keep the settings of a part with the model, as those of the newest."""
    others = tuple(other_parts(stack, settings))
    remember_settings(stack.model, replace(settings, others=others))


def modules_of(stack: LayerStack) -> set[nn.Module]:
    """The modules that hold what a part shares."""
    return {module for slots in stack.slots for module, _ in slots.values()}


def _overlaps(stack: LayerStack, part: TyingSettings) -> bool:
    """Whether these layers share a parameter that a part of the model shares.

    Raises:
        InputError: if they do not, and yet have a module in common.
    """
    try:
        other = stack_of(stack.model, part)
    except InputError:
        return True  # its layers have changed since they were tied: these are what became of them
    if not (common := modules_of(stack) & modules_of(other)):
        return False
    if _slots(stack) & _slots(other):
        return True
    name = next(name for name, module in stack.model.named_modules() if module in common)
    raise InputError(
        f"{name} has parameters in two parts that are tied apart: leave all of them to one part, "
        f"or untied"
    )


def _slots(stack: LayerStack) -> set[tuple[nn.Module, str]]:
    return {slot for slots in stack.slots for slot in slots.values()}
