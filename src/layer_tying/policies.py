"""Who decides the tying: static patterns, the protocol of policies that decide, and random choice.

A static pattern is just a ``Tying`` to start with. A policy is asked every k steps for an action
(see ``tying.py``) and told the reward that followed. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from layer_tying.errors import InputError
from layer_tying.tying import Rules, Tying

Action = tuple[int, ...]

LARGEST_REWARD = 1e15
"""Beyond it the squared error overflows single precision: such a reward is not finite enough."""

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


class Policy(Protocol):
    """What decides the tying while a model trains."""

    learns: bool
    """Whether it wants rewards. They cost an evaluation each, so none is made otherwise."""

    def act(self, state: Tying, rules: Rules) -> Action:
        """Choose, for each layer, the layer whose weights it shall use, within the rules."""
        ...

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """Learn from what followed; the reward is None where there was none to learn from."""
        ...

    def statistics(self) -> dict[str, Any]:
        """JSON-able facts about the last decision, for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly: tensors and JSON-able values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        ...


class RandomPolicy:
    """Every layer draws one of the layers it may use, uniformly, at every decision.

    It ties heavily by itself: the expected number of independent layers is the harmonic number
    H(L), 3.10 for L = 12 and 4.46 for L = 48. A learned agent must be compared with it.
    """

    learns = False

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def act(self, state: Tying, rules: Rules) -> Action:
        """Draw an action."""
        action = [int(self._rng.choice(rules.choices(i))) for i in range(state.num_layers)]
        return within_budget(action, self._rng.random((state.num_layers,) * 2), rules)

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """Nothing is learned."""

    def statistics(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state of the random number generator."""
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same draws."""
        self._rng.bit_generator.state = state["rng"]


class Schedule:
    """Tyings that were settled beforehand, one for each decision; the last one is kept.

    Args:
        tyings: at least one.
    """

    learns = False

    def __init__(self, tyings: Sequence[Tying]) -> None:
        if not tyings:
            raise InputError("a schedule needs at least one tying, got none")
        self.tyings = tuple(tyings)
        self._num_decisions = 0

    def act(self, state: Tying, rules: Rules) -> Action:
        """The owners of the tying whose turn it is; as an action they lead to that tying."""
        index = min(self._num_decisions, len(self.tyings) - 1)
        self._num_decisions += 1
        return self.tyings[index].owners

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """Nothing is learned."""

    def statistics(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How many decisions have been made."""
        return {"num_decisions": self._num_decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the tying whose turn it is."""
        self._num_decisions = state["num_decisions"]


def within_budget(action: Sequence[int], value: np.ndarray, rules: Rules) -> Action:
    """Tie the layers whose independence is worth least, until the budget of the rules is kept.

    Args:
        action: [L] the layer each layer would use. Those that name themselves are independent.
        value: [L, L] the worth of layer i using layer j.
        rules: the layers that can be shared, and the most that may be independent.
    """
    kept = list(action)
    worth = {}
    for layer in range(len(kept)):
        earlier = rules.choices(layer)[:-1]
        if kept[layer] == layer and earlier:
            best = max(earlier, key=lambda j: value[layer, j])
            worth[layer] = (value[layer, layer] - value[layer, best], best)
    excess = sum(choice == layer for layer, choice in enumerate(kept)) - rules.max_independent
    for layer in sorted(worth, key=lambda i: worth[i][0])[: max(excess, 0)]:
        kept[layer] = worth[layer][1]
    return tuple(kept)
