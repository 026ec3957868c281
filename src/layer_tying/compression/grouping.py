"""Which layer's weights each layer reads: groupings that a table of costs proposes.

A *reading* says for each layer of a trained model which layer's weights it reads: (1, 1, 1, 4, 4)
are two groups of neighbours, with the weights of layers 1 and 4. ``costs[i][j]`` is what it costs
the model that layer i alone reads layer j's weights. The costs of a reading are taken to add up,
which is what makes these searches fast; what they propose is then measured.

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

Reading = tuple[int, ...]
Costs = Sequence[Sequence[float]]


def cost(costs: Costs, reading: Reading) -> float:
    """The sum of what each layer's reading costs alone."""
    return sum(costs[layer][source] for layer, source in enumerate(reading))


def neighbours(costs: Costs, number: int) -> Reading:
    """Groups of neighbouring layers, each with the weights of one of its own: dynamic programming.

    Args:
        costs: [L][L].
        number: of groups, from 1 to L.

    Returns:
        The reading of the least cost.
    """
    num_layers = len(costs)

    @cache
    def group(first: int, end: int) -> tuple[float, int]:
        """The best source of layers first..end-1, and its cost."""
        members = range(first, end)
        return min((sum(costs[i][j] for i in members), j) for j in members)

    @cache
    def best(end: int, groups: int) -> tuple[float, Reading]:
        """The best reading of the first ``end`` layers in so many groups."""
        if groups == 0:
            return (0.0, ()) if end == 0 else (float("inf"), ())
        found: list[tuple[float, Reading]] = []
        for first in range(groups - 1, end):
            before, reading = best(first, groups - 1)
            here, source = group(first, end)
            found.append((before + here, reading + (source,) * (end - first)))
        return min(found)

    return best(num_layers, number)[1]


def cycle(costs: Costs, number: int) -> Reading:
    """Layers i, i + M, i + 2 M, ... are a group, with the weights of the best of them."""
    sources = []
    for first in range(number):
        members = range(first, len(costs), number)
        sources.append(min(members, key=lambda j: sum(costs[i][j] for i in members)))
    return tuple(sources[layer % number] for layer in range(len(costs)))


def free(costs: Costs, number: int) -> Reading:
    """Any partition: M layers are kept, and each layer reads the cheapest of them (M-medoids).

    Starts from all layers, gives up the one that costs the least until M are left, then exchanges
    kept layers for others as long as that lowers the cost.
    """
    kept = set(range(len(costs)))
    while len(kept) > number:
        kept = min((kept - {each} for each in sorted(kept)), key=lambda k: _total(costs, k))
    while True:
        exchanged = min(
            (
                kept - {out} | {into}
                for out in sorted(kept)
                for into in range(len(costs))
                if into not in kept
            ),
            key=lambda k: _total(costs, k),
            default=kept,
        )
        if _total(costs, exchanged) >= _total(costs, kept):
            return _nearest(costs, kept)
        kept = exchanged


def grown(costs: Costs, number: int, measure: Callable[[Reading], float], width: int) -> Reading:
    """Groups merged two at a time, each time the pair whose merger is *measured* to cost the least.

    Args:
        costs: [L][L]; they say which mergers are measured.
        number: of groups that are left.
        measure: the cost of a reading as it is.
        width: how many mergers are measured at each step, the most promising ones.
    """
    reading = tuple(range(len(costs)))
    while len(set(reading)) > number:
        mergers = sorted(_mergers(reading), key=lambda each: cost(costs, each))
        reading = min(mergers[:width], key=measure)
    return reading


def refined(reading: Reading, measure: Callable[[Reading], float]) -> Reading:
    """One pass over the layers: each moves to the group where that is measured to cost less.

    Layers whose weights are in use stay where they are, so that the number of groups does.
    """
    best, least = reading, measure(reading)
    kept = set(reading)
    for layer in range(len(reading)):
        for other in sorted(kept - {reading[layer]}) if layer not in kept else ():
            moved = (*best[:layer], other, *best[layer + 1 :])
            if (value := measure(moved)) < least:
                best, least = moved, value
    return best


def _mergers(reading: Reading) -> list[Reading]:
    """What becomes of a reading when two of its groups use the weights of one of them."""
    sources = sorted(set(reading))
    return [
        tuple(keep if source == drop else source for source in reading)
        for keep in sources
        for drop in sources
        if keep != drop
    ]


def _total(costs: Costs, kept: set[int]) -> float:
    return cost(costs, _nearest(costs, kept))


def _nearest(costs: Costs, kept: set[int]) -> Reading:
    """Each layer reads the cheapest of the kept ones; those read themselves."""
    return tuple(
        layer if layer in kept else min(sorted(kept), key=lambda j: row[j])
        for layer, row in enumerate(costs)
    )
