"""Static sharing patterns by their names in the literature. Standard library only."""

from __future__ import annotations

from layer_tying.core.tying import Tying
from layer_tying.errors import InputError

PATTERNS = (
    "none",
    "all",
    "sequence",
    "cycle",
    "cycle-reverse",
    "repeat",
    "sandwich",
    "middle-loop",
)


def pattern(name: str, num_layers: int, num_groups: int | None = None) -> Tying:
    """A static sharing pattern by its name in the literature.

    Args:
        name: ``none`` (conventional training), ``all`` (ALBERT), ``sequence``, ``cycle``,
            ``cycle-reverse`` (Takase and Kiyono 2021), ``repeat`` (each layer twice in a row,
            MobileLLM), ``sandwich`` (the first and the last on their own, the others one group, as
            in Subformer, or as many as M leaves; without a last one where M is 2) or
            ``middle-loop`` (first and last layers of their own, the middle a repeated cycle).
        num_layers: L.
        num_groups: M, the number of independent layers, where the pattern needs it (of
            ``sandwich`` 3 by default).

    Raises:
        InputError: if the name is unknown or the number of groups does not fit.
    """
    layers = range(num_layers)
    if name == "none":
        return Tying.independent(num_layers)
    if name == "all":
        return Tying.all_tied(num_layers)
    if name == "repeat":
        return Tying.from_labels(i // 2 for i in layers)
    if name == "sandwich" and num_groups is None:
        num_groups = min(3, num_layers)
    if name not in PATTERNS:
        raise InputError(f"unknown pattern {name!r}; the known ones are {', '.join(PATTERNS)}")
    if num_groups is None or not 1 <= num_groups <= num_layers:
        raise InputError(
            f"the pattern {name!r} needs a number of groups from 1 to {num_layers}, "
            f"got {num_groups}"
        )
    if name == "sequence":
        return Tying.from_labels(i * num_groups // num_layers for i in layers)
    if name == "cycle":
        return Tying.from_labels(i % num_groups for i in layers)
    if name == "cycle-reverse":
        return Tying.from_labels(_cycle_reverse(num_layers, num_groups))
    if name == "sandwich":
        return Tying.from_labels(_sandwich(num_layers, num_groups))
    return Tying.from_labels(_middle_loop(num_layers, num_groups))


def _sandwich(num_layers: int, num_groups: int) -> list[int]:
    """The first and the last layer on their own, the others in a sequence of groups."""
    if num_groups <= 2:  # [all], or the first on its own
        return [min(i, num_groups - 1) for i in range(num_layers)]
    middle = [1 + i * (num_groups - 2) // (num_layers - 2) for i in range(num_layers - 2)]
    return [0, *middle, num_groups - 1]


def _cycle_reverse(num_layers: int, num_groups: int) -> list[int]:
    """Cycles, the last of which runs backwards: 0 1 2 0 1 2 2 1 0."""
    last_cycle = num_groups * ((num_layers - 1) // num_groups)
    labels = [i % num_groups for i in range(num_layers)]
    if last_cycle:
        labels[last_cycle:] = [num_groups - 1 - label for label in labels[last_cycle:]]
    return labels


def _middle_loop(num_layers: int, num_groups: int) -> list[int]:
    """A prelude and a coda of independent layers around a cycle of the others."""
    ends = max(1, num_groups // 4) if num_groups > 2 else 0
    core = num_groups - 2 * ends
    middle = [ends + i % core for i in range(num_layers - 2 * ends)]
    return [*range(ends), *middle, *range(num_groups - ends, num_groups)]
