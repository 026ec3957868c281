"""Parts of the layers that are tied each in its own way: attention, say, and feed-forward networks.

A part is what one tying shares: the layers that its settings name, without the parameters that they
leave untied. A model remembers the settings of every part. Two parts have no module in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from layer_tying.core.find import LayerStack, find_layers
from layer_tying.core.residual_scale import residual_modules
from layer_tying.core.tying_settings import (
    TyingSettings,
    is_remembered,
    remember_settings,
    settings_of,
)
from layer_tying.core.weight_access import mixed_or_scaled, tying_in_use
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


def check_remembered(model: nn.Module) -> None:
    """Refuse a model that knows nothing of a tying by which its modules are mixed or scaled."""
    if not is_remembered(model) and (changed := mixed_or_scaled(model)):
        tied = [name for name, module in model.named_modules() if is_remembered(module)]
        raise InputError(
            f"{next(iter(changed))} is mixed or scaled by a tying of "
            f"{tied[0] if tied else 'a module around this one'}: use the module that was tied"
        )


def settings_of_part(
    model: nn.Module, options: Mapping[str, Any]
) -> tuple[TyingSettings, LayerStack]:
    """The settings of the part that options name, and its layers; without any, the newest one's.

    What options leave out is as it was when that part was last tied, if it was.

    Raises:
        InputError: if the layers cannot be found, or some of what was tied with them and is mixed
            or scaled would be left out.
    """
    if not options.keys() & {*WHICH}:
        settings = replace(settings_of(model).but(**options), others=())
        return settings, stack_of(model, settings)
    named = _named(model, {name: options[name] for name in WHICH if name in options})
    stack = stack_of(model, TyingSettings().but(**named))
    found = {part: _found(model, part) for part in parts_of(model)}
    # Layers that are not found have changed since they were tied: these are what became of them.
    same = {part: other for part, other in found.items() if not other or _overlap(stack, other)}
    _refuse_to_leave_out(stack, same)
    before = [*same][-1] if same else TyingSettings()
    return before.but(**named).but(**options), stack


def _named(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name a part, where some are given: the others are those of such layers."""
    parts = parts_of(model)
    if layers := given.get("layers"):
        lists = {layers} if isinstance(layers, str) else {*layers}
        parts = [part for part in parts if _lists_of(model, part) == lists]
    return {**which(parts[-1] if parts else TyingSettings()), **given}


def _lists_of(model: nn.Module, part: TyingSettings) -> set[str]:
    """The names of the lists of layers that a part is of."""
    found = _found(model, part)
    return {name.rpartition(".")[0] for name in found.names} if found else set()


def _refuse_to_leave_out(
    stack: LayerStack, before: Mapping[TyingSettings, LayerStack | None]
) -> None:
    """What is not named any more would go on being mixed or scaled, and no settings say so."""
    left_out = set().union(*map(modules_of, filter(None, before.values()))) - modules_of(stack)
    for name, module in mixed_or_scaled(stack.model).items():
        if module in left_out:
            raise InputError(
                f"{name} is mixed or scaled by the tying in force, and untied=... would leave it "
                f"out: name the parameters that were tied together"
            )
    for other in filter(None, before.values()):
        _refuse_to_leave_shared(stack, other)
    if len(before) > 1 and any(part.mixes for part in before):
        raise InputError("parts of the layers mix their weights: they cannot become one part again")


def _refuse_to_leave_shared(stack: LayerStack, before: LayerStack) -> None:
    """What is shared and not named any more would stay shared, although it is said to be untied."""
    kept, owners = _slots(stack), tying_in_use(before).owners
    for layer, slots in enumerate(before.slots):
        lost = next((name for name, slot in slots.items() if slot not in kept), None)
        if lost and owners[layer] != layer:
            raise InputError(
                f"{before.names[layer]}.{lost} is shared by the tying in force, and untied=... "
                f"would leave it so: untie these layers first"
            )


def other_parts(stack: LayerStack, settings: TyingSettings) -> dict[TyingSettings, LayerStack]:
    """The parts of a model that have nothing in common with this one."""
    parts = parts_of(stack.model)
    if [which(part) for part in parts] == [which(settings)]:
        return {}
    found = {part: _found(stack.model, part) for part in parts}
    return {part: other for part, other in found.items() if other and not _overlap(stack, other)}


def remember_part(stack: LayerStack, settings: TyingSettings) -> None:
    """Keep the settings of a part with the model, as those of the newest."""
    others = tuple(other_parts(stack, settings))
    remember_settings(stack.model, replace(settings, others=others))


def modules_of(stack: LayerStack) -> set[nn.Module]:
    """The modules that hold what a part shares."""
    return {module for slots in stack.slots for module, _ in slots.values()}


def modules_of_no_other(stack: LayerStack, settings: TyingSettings) -> Iterator[nn.Module]:
    """The modules of a part's layers but those whose weights another part shares."""
    others = other_parts(stack, settings).values()
    for module in chain.from_iterable(block.modules() for block in stack.blocks):
        if not any(holds(part, module) for part in others):
            yield module


def holds(stack: LayerStack, module: nn.Module) -> bool:
    """Whether a part shares weights of this module, or of one within it."""
    return not modules_of(stack).isdisjoint(module.modules())


def own_residual_modules(stack: LayerStack, settings: TyingSettings) -> list[list[nn.Module]]:
    """For each layer the residual outputs that are a part's to scale: those that no other holds."""
    others = other_parts(stack, settings).values()
    return [
        [module for module in mine if not any(holds(part, module) for part in others)]
        for mine in residual_modules(stack, settings.residual_outputs)
    ]


def check_residual_outputs(stack: LayerStack, settings: TyingSettings) -> None:
    """Check that there are residual outputs, each of them of one part, if there are several.

    Raises:
        InputError: if a layer has none, or one of them is not of exactly one part.
    """
    others = other_parts(stack, settings)
    stacks = {**others, settings: stack}
    for part in (each for each in stacks if each.residual_scaling):
        for module in chain(*residual_modules(stacks[part], part.residual_outputs)):
            if others and sum(holds(each, module) for each in stacks.values()) != 1:
                name = next(name for name, each in stack.model.named_modules() if each is module)
                raise InputError(
                    f"{name} is one of the residual outputs, and not of exactly one of the parts "
                    f"of the layers that are tied apart: name others in residual_outputs"
                )


def _found(model: nn.Module, part: TyingSettings) -> LayerStack | None:
    """The layers of a part, even if some are no longer like the others; None if there are none."""
    for by_kind in (part.by_kind, True):
        with contextlib.suppress(InputError):
            return find_layers(model, part.layers, part.untied, by_kind)
    return None


def _overlap(stack: LayerStack, other: LayerStack) -> bool:
    """Whether two parts of a model share any parameter.

    Raises:
        InputError: if they do not, and yet have a module in common.
    """
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
