"""Static sharing patterns by their names in the literature. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral

from layer_tying.core.tying import Tying
from layer_tying.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """A sharing pattern.

    Attributes:
        labels: from L layers and M groups to a label for each layer; equal labels share weights.
        takes_groups: whether M can be chosen; else the labels do not depend on it.
        default_groups: M where none is given; None where it has to be.
    """

    labels: Callable[[int, int], Iterable[int]]
    takes_groups: bool = True
    default_groups: Callable[[int], int] | None = None


def _sandwich(num_layers: int, num_groups: int) -> list[int]:
    """The first and the last layer on their own, the others in a sequence of groups."""
    if num_groups <= 2:  # one group for all, or the first on its own
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


PATTERNS = {
    # Conventional training: every layer has weights of its own.
    "none": Pattern(lambda layers, _: range(layers), takes_groups=False),
    # One layer for all (ALBERT, Lan et al. 2020).
    "all": Pattern(lambda layers, _: [0] * layers, takes_groups=False),
    # Takase and Kiyono 2021.
    "sequence": Pattern(lambda layers, groups: (i * groups // layers for i in range(layers))),
    "cycle": Pattern(lambda layers, groups: (i % groups for i in range(layers))),
    "cycle-reverse": Pattern(_cycle_reverse),
    # Each layer twice in a row (MobileLLM, Liu et al. 2024).
    "repeat": Pattern(lambda layers, _: (i // 2 for i in range(layers)), takes_groups=False),
    # Subformer (Reid et al. 2021): first and last independent, the others one group, or M - 2.
    "sandwich": Pattern(_sandwich, default_groups=lambda layers: min(3, layers)),
    # First and last layers independent, the middle a repeated cycle.
    "middle-loop": Pattern(_middle_loop),
}


def pattern(name: str, num_layers: int, num_groups: int | None = None) -> Tying:
    """A static sharing pattern by its name in the literature.

    Args:
        name: ``none`` (conventional training), ``all`` (ALBERT), ``sequence``, ``cycle``,
            ``cycle-reverse`` (Takase and Kiyono 2021), ``repeat`` (each layer twice in a row,
            MobileLLM), ``sandwich`` (the first and the last independent, the others one group, as
            in Subformer, or as many as M leaves; without a last one where M is 2) or
            ``middle-loop`` (first and last layers independent, the middle a repeated cycle).
        num_layers: L.
        num_groups: M, the number of independent layers; ``none``, ``all`` and ``repeat`` do not
            depend on it, and ``sandwich`` has 3 by default.

    Raises:
        InputError: if the name is unknown or the number of groups does not fit.
    """
    if name not in PATTERNS:
        raise InputError(f"unknown pattern {name!r}; the known ones are {', '.join(PATTERNS)}")
    chosen = PATTERNS[name]
    if not chosen.takes_groups:
        return Tying.from_labels(chosen.labels(num_layers, num_layers))
    if num_groups is None and chosen.default_groups:
        num_groups = chosen.default_groups(num_layers)
    if not isinstance(num_groups, Integral) or not 1 <= num_groups <= num_layers:
        raise InputError(
            f"the pattern {name!r} needs a number of groups from 1 to {num_layers}, "
            f"got {num_groups!r}"
        )
    return Tying.from_labels(chosen.labels(num_layers, num_groups))
