"""Policies that learn nothing: random choice, and tyings that were settled beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.policies.base import Action, within_budget


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
