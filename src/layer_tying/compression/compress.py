"""``compress(model, batches, layers=4)``: a trained model becomes a smaller one of its class."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from torch import nn

from layer_tying.compression.healing import Healing
from layer_tying.compression.outcome import OutcomeOf
from layer_tying.compression.outcome import outcome_of as usual_outcome_of
from layer_tying.compression.sensitivity import Probe, choose, number_of_groups
from layer_tying.compression.settings import (
    NOT_HERE,
    USUAL,
    BudgetSettings,
    HealingSettings,
    SearchSettings,
    settled,
)
from layer_tying.core.find import LayerStack
from layer_tying.core.parts import stack_of, which
from layer_tying.core.tied_layers import Options
from layer_tying.core.tying_settings import TyingSettings, settings_of
from layer_tying.core.untied_copy import untied_copy
from layer_tying.core.weight_access import tying_in_use
from layer_tying.errors import InputError
from layer_tying.runs.config import OptimizationConfig
from layer_tying.runs.precision import usual_precision
from layer_tying.tasks.evaluation import in_eval_mode


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: int | None = None,
    parameters: int | None = None,
    bytes: int | None = None,
    steps: int = 2000,
    stack: str | Sequence[str] | None = None,
    untied: Sequence[str] = (),
    by_kind: bool = False,
    outcome_of: OutcomeOf = usual_outcome_of,
    **settings: Any,
) -> nn.Module:
    """A copy of a trained model whose layers share weights, trained to do what the model did.

    Example::

        small = compress(model, batches, layers=4, steps=2_000)
        export_compact(small, "small")

    Args:
        model: any module that holds its layers in one list of equal blocks and returns logits, as
            models of transformers do. It is not changed. Its layers may share weights already: then
            a copy of it is made, whose layers do not.
        batches: what the model is called with: mappings of keyword arguments (where they have
            ``labels``, the ordinary loss is minimised as well), or tensors. They are gone through
            again when they end, which a list and a ``DataLoader`` allow.
        layers, parameters, bytes: the size to reach, as independent layers, parameters of the whole
            model, or bytes of the file that ``export_compact`` writes.
        steps: optimizer steps, on one batch each.
        stack: the dotted name of the list of layers, or several; found where there is only one.
        untied: name patterns of parameters that each layer keeps for itself.
        by_kind: where layers differ, tie within the classes of equal ones instead of refusing.
        outcome_of: what to make of the model and a batch, where they are unlike the usual ones.
        settings: of ``SearchSettings``, ``HealingSettings`` and ``OptimizationConfig``, by name:
            ``sharing``, ``gradual``, ``temperature``, ``lr``, ``precision``, ...

    Returns:
        The small model, a module of the same class whose weights have the same types; while it
        trains they are in float32. Exports, ``TiedLayers`` and training take it.

    Raises:
        InputError: if the layers cannot be found, no tying keeps within the budget, the batches
            end early, or the model's outputs are not finite, before or after healing.
    """
    search, healing, optimization = _groups(settings, steps)
    budget = BudgetSettings(layers, parameters, bytes)
    options = Options(layers=stack, untied=untied, by_kind=by_kind)
    weight = next(model.parameters())
    optimization = settled(optimization, usual_precision(weight.device, weight.dtype))
    endless = _endless(batches, steps)
    teacher = _untied(model, options)
    with in_eval_mode(teacher):
        found = _stack_of(teacher, options)
        number = number_of_groups(budget, healing, found)
        probes = list(islice(endless, search.probes))
        reading = choose(Probe(found, probes, outcome_of), number, search.groups).reading
        student = copy.deepcopy(teacher)
        run = Healing(
            teacher, student, reading, optimization, healing, outcome_of=outcome_of, **options
        )
        run.start_from(probes)
        while run.step < run.num_steps:
            run.train_step(next(endless))
    return run.finished()


def _stack_of(model: nn.Module, options: Options) -> LayerStack:
    return stack_of(model, TyingSettings().but(**options))


def _untied(model: nn.Module, options: Options) -> nn.Module:
    """The model; where its layers share weights or remember a tying, a copy that does not."""
    if settings_of(model) == TyingSettings():
        stack = _stack_of(model, options)
        if tying_in_use(stack).num_independent == len(stack.names):
            return model
    return untied_copy(model, **which(TyingSettings().but(**options)))


def _groups(
    settings: dict[str, Any], steps: int
) -> tuple[SearchSettings, HealingSettings, OptimizationConfig]:
    """Settings by their names, in their groups.

    Raises:
        InputError: if there is no such setting, or a value does not fit.
    """
    if odd := settings.keys() & {*NOT_HERE, "max_steps"}:
        raise InputError(
            f"compress does not take {min(odd)!r}; it makes as many steps as steps says, on one "
            f"batch each and in one process"
        )
    left = {**USUAL, **settings, "max_steps": steps}
    groups: list[Any] = []
    for kind in (SearchSettings, HealingSettings, OptimizationConfig):
        names = {each.name for each in fields(kind)} & left.keys()
        groups.append(kind(**{name: left.pop(name) for name in names}))
    if left:
        raise InputError(f"there is no setting {next(iter(left))!r}")
    return groups[0], groups[1], groups[2]


def _endless(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """The batches again and again."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            raise InputError(
                f"the batches ended after {count}, and {steps} steps need more: give a list or a "
                f"DataLoader, which can be gone through again"
            )
