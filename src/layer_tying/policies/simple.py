"""Policies that learn nothing: random choice, and tyings that were settled beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.policies.base import Action, Policy, within_budget


class RandomPolicy(Policy):
    """Every layer draws one of the layers it may use, uniformly, at every decision.

    It ties heavily by itself: the expected number of independent layers is the harmonic number
    H(L), 3.10 for L = 12 and 4.46 for L = 48. A learned agent must be compared with it.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def act(self, state: Tying) -> Action:
        """Draw an action."""
        rules = self.rules
        action = [int(self._rng.choice(rules.choices(i))) for i in range(state.num_layers)]
        return within_budget(action, self._rng.random((state.num_layers,) * 2), rules)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random number generator."""
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same draws."""
        self._rng.bit_generator.state = state["rng"]


class Schedule(Policy):
    """Tyings that were settled beforehand, one for each decision; the last one is kept.

    Args:
        tyings: one for each decision, at least one.
        start: the tying to start from; the paper's if None.
    """

    def __init__(self, tyings: Sequence[Tying], start: Tying | None = None) -> None:
        if not tyings:
            raise InputError("a schedule needs at least one tying, got none")
        self.tyings = tuple(tyings)
        self._start = start
        self._num_decisions = 0

    def start(self, rules: Rules) -> Tying:
        """The tying it was made with."""
        return self._start or rules.tightest

    def reset(self, start: Tying, rules: Rules) -> None:
        """Begin a run.

        Raises:
            InputError: if one of its tyings is not allowed.
        """
        for tying in self.tyings:
            rules.check(tying)
        self.rules = rules
        self._num_decisions = 0

    def act(self, state: Tying) -> Action:
        """The owners of the tying whose turn it is; as an action they lead to that tying."""
        index = min(self._num_decisions, len(self.tyings) - 1)
        self._num_decisions += 1
        return self.tyings[index].owners

    def state_dict(self) -> dict[str, Any]:
        """How many decisions have been made."""
        return {"num_decisions": self._num_decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the tying whose turn it is."""
        self._num_decisions = state["num_decisions"]
