"""What it costs a trained model that its layers read each other's weights, as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layer_tying.compression import grouping
from layer_tying.compression.grouping import Reading
from layer_tying.compression.kept_outputs import KeptOutputs
from layer_tying.compression.outcome import Outcome, OutcomeOf, divergence
from layer_tying.compression.settings import BudgetSettings, HealingSettings
from layer_tying.core.budget import max_independent
from layer_tying.core.find import LayerStack
from layer_tying.core.mixtures import check_mixable
from layer_tying.core.weight_access import store, stored
from layer_tying.errors import InputError
from layer_tying.tasks.evaluation import evaluating

WIDTH = 4  # mergers that are measured at each step of growing groups


@dataclass(frozen=True)
class Choice:
    """The groups of a model's layers, and what was measured to find them.

    Attributes:
        reading: for each layer, the layer whose weights it reads.
        divergence: of the model's output from the untouched one, in nats.
        table: [L][L] the divergence when layer i alone reads layer j's weights.
        loss_rise: [L][L] the rise of the loss, in nats; empty where batches have no labels.
        candidates: what each search proposed, with its measured divergence.
    """

    reading: Reading
    divergence: float
    table: tuple[tuple[float, ...], ...]
    loss_rise: tuple[tuple[float, ...], ...]
    candidates: dict[str, tuple[Reading, float]]


@contextmanager
def reading_from(stack: LayerStack, reading: Reading) -> Iterator[None]:
    """Let layers read other layers' weights for a while; nothing is copied."""
    own = [{name: stored(slot) for name, slot in slots.items()} for slots in stack.slots]
    try:
        for slots, source in zip(stack.slots, reading, strict=True):
            for name, slot in slots.items():
                store(slot, own[source][name])
        yield
    finally:
        for slots, parameters in zip(stack.slots, own, strict=True):
            for name, slot in slots.items():
                store(slot, parameters[name])


class Probe:
    """A trained model, some batches, and what the untouched model says of them.

    Args:
        stack: the model's layers, all independent.
        batches: what is measured on.
        outcome_of: what the model makes of a batch.

    Raises:
        InputError: if the untouched model's output or loss is not finite.
    """

    def __init__(self, stack: LayerStack, batches: Sequence[Any], outcome_of: OutcomeOf) -> None:
        self.stack = stack
        self._runs = [partial(outcome_of, stack.model, batch) for batch in batches]
        self._measured: dict[Reading, tuple[float, float | None]] = {}
        with evaluating(stack.model):
            self._untouched = [KeptOutputs(stack.blocks, run) for run in self._runs]
        self._loss = _mean([kept.outcome.loss for kept in self._untouched])
        if not all(bool(kept.outcome.logits.isfinite().all()) for kept in self._untouched):
            raise InputError("the model's outputs are not finite numbers: it cannot be compressed")
        if self._loss is not None and not math.isfinite(self._loss):
            raise InputError(f"the model's loss is {self._loss} on the first batches")

    def divergence(self, reading: Reading) -> float:
        """Of the output from the untouched model's, in nats.

        It is infinite for layers that are unlike, and where outputs are not finite numbers, as when
        float16 overflows.
        """
        return self._measure(reading)[0]

    def table(self) -> tuple[list[list[float]], list[list[float]]]:
        """[L][L] divergence and rise of the loss when layer i alone reads layer j's weights."""
        layers = range(len(self.stack.kinds))
        both = [[self._measure(_one(layers, i, j)) for j in layers] for i in layers]
        rises = [[rise for _, rise in row if rise is not None] for row in both]
        return [[value for value, _ in row] for row in both], rises if rises[0] else []

    @property
    def count(self) -> int:
        """How many readings have been measured."""
        return len(self._measured)

    def _measure(self, reading: Reading) -> tuple[float, float | None]:
        kinds = self.stack.kinds
        if any(kinds[layer] != kinds[source] for layer, source in enumerate(reading)):
            return float("inf"), None if self._loss is None else float("inf")
        if reading not in self._measured:
            found = self._outcomes(reading)
            values = [
                float(divergence(each.logits, kept.outcome.logits))
                for each, kept in zip(found, self._untouched, strict=True)
            ]
            loss = _mean([outcome.loss for outcome in found])
            rise = None if loss is None or self._loss is None else _or_infinite(loss - self._loss)
            self._measured[reading] = _or_infinite(sum(values) / len(values)), rise
        return self._measured[reading]

    def _outcomes(self, reading: Reading) -> list[Outcome]:
        """What the model makes of the batches; layers before the first changed one do not run."""
        unchanged = [layer == source for layer, source in enumerate(reading)]
        first = unchanged.index(False) if False in unchanged else len(unchanged)
        found = []
        with evaluating(self.stack.model), reading_from(self.stack, reading):
            for run, kept in zip(self._runs, self._untouched, strict=True):
                with kept.standing_in(first):
                    found.append(run())
        return found


Search = Callable[[grouping.Costs, int, Probe], Reading]
SEARCHES: dict[str, Search] = {
    "neighbours": lambda costs, number, probe: grouping.neighbours(costs, number),
    "cycle": lambda costs, number, probe: grouping.cycle(costs, number),
    "free": lambda costs, number, probe: grouping.free(costs, number),
    "grown": lambda costs, number, probe: grouping.grown(costs, number, probe.divergence, WIDTH),
}
"""The searches, by name: from the table, the number of groups and the probe to a reading."""


def number_of_groups(
    budget: BudgetSettings,
    healing: HealingSettings,
    stack: LayerStack,
    dtype: torch.dtype | None = None,
) -> int:
    """The most groups with which a model keeps within its budget.

    Args:
        budget: the sizes that are allowed.
        healing: says whether layers will read mixtures.
        stack: the model's layers.
        dtype: of the weights in the file; the model's by default.

    Raises:
        InputError: if no tying is within the budget, or none is needed, or layers cannot mix so
            few.
    """
    number = max_independent(
        stack,
        num_layers=budget.layers,
        num_parameters=budget.parameters,
        num_bytes=budget.bytes,
        dtype=dtype,
        mixes=healing.sharing == "mixture",
    )
    if number == len(stack.names):
        raise InputError(f"the budget has room for all {number} layers: nothing would be shared")
    if healing.sharing == "mixture":
        check_mixable(stack, number)
    return number


def choose(probe: Probe, number: int, groups: str = "any") -> Choice:
    """The grouping whose output diverges the least from the untouched model's.

    Args:
        probe: the model and the batches to measure on.
        number: of groups.
        groups: the search that is made; of ``"any"`` each search proposes one, all are measured,
            and the best is refined layer by layer.

    Raises:
        InputError: if layers differ, and no such groups keep them apart.
    """
    table, rises = probe.table()
    searches = SEARCHES if groups == "any" else {groups: SEARCHES[groups]}
    proposed = {name: search(table, number, probe) for name, search in searches.items()}
    candidates = {name: (each, probe.divergence(each)) for name, each in proposed.items()}
    reading, least = min(candidates.values(), key=lambda each: each[1])
    if math.isinf(least):
        raise InputError(
            f"no {groups} groups of {number} keep layers apart that differ, with outputs that are "
            f"finite: take groups 'any', more layers, or a model in bfloat16 or float32"
        )
    if groups == "any":
        reading = grouping.refined(reading, probe.divergence)
        candidates["refined"] = reading, probe.divergence(reading)
    return Choice(
        reading,
        probe.divergence(reading),
        tuple(map(tuple, table)),
        tuple(map(tuple, rises)),
        candidates,
    )


def _one(layers: Sequence[int], layer: int, source: int) -> Reading:
    return tuple(source if each == layer else each for each in layers)


def _or_infinite(value: float) -> float:
    """The value; infinity for NaN, which is not smaller than anything and would end no search."""
    return value if math.isfinite(value) else math.inf


def _mean(losses: Sequence[Tensor | None]) -> float | None:
    known = [float(loss) for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None
