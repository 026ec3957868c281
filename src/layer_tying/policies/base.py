"""What a policy is: it is asked every k steps for an action, and told the reward that followed.

A policy is one class in one file of this package, with an entry in ``POLICIES``. It declares
what it starts from, which reward it learns from and when it settles, so that its caller does not
need to know which policy it is. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from layer_tying.core.tying import Rules, Tying

Action = tuple[int, ...]

LARGEST_REWARD = 1e15
"""Beyond it the squared error overflows single precision: such a reward is not finite enough."""


@dataclass(frozen=True)
class Decision:
    """One decision of a policy, as it is logged.

    Attributes:
        step: how many optimizer steps had been done.
        action: for each layer, the layer it was told to use.
        state: the tying's owners after the decision.
        reward: what followed, where it was measured at once; None where it is known only later,
            where the policy does not learn, or could not from this one (infinite, not a number, or
            so large that its square is not finite).
        previous_reward: the reward of the decision before, where it is known only now.
        event: what went wrong, if anything did.
        statistics: what the policy says of the decision (epsilon, Q-values).
    """

    step: int
    action: Action
    state: tuple[int, ...]
    reward: float | None
    previous_reward: float | None
    event: str | None
    statistics: Mapping[str, Any]


class Policy:
    """Decides the tying while a model trains. Subclasses override what they need; ``act`` at least.

    Attributes:
        reward: what it learns from: ``"evaluation"`` (of the model right after a decision; each
            costs a forward pass), ``"training_loss"`` (minus the mean loss of the steps since the
            last decision), or None.
        settles: the share of a run, at its end, in which nothing is decided any more; may be set.
        residual_scaling: the power p of 1/n residual scaling in the forward pass (see
            ``TiedLayers``), where it chooses the start.
        mixes: whether the layers learn mixtures of the shared weights (see ``core.mixtures``).
        rules: which tyings are allowed; known once it was ``reset``.
    """

    reward: ClassVar[Literal["evaluation", "training_loss"] | None] = None
    settles: float = 0.0
    residual_scaling: ClassVar[float] = 0.0
    mixes: ClassVar[bool] = False
    rules: Rules

    def __init__(self, *, seed: int = 0) -> None:
        """``seed`` is that of its random choices, if it makes any."""
        self.seed = seed

    def start(self, rules: Rules) -> Tying:
        """The tying to start from, where the caller does not name one; the paper's by default."""
        return rules.tightest

    def reset(self, start: Tying, rules: Rules) -> None:
        """Begin a run.

        Args:
            start: the tying that it starts from.
            rules: which tyings are allowed.

        Raises:
            InputError: if it cannot decide from this start.
        """
        self.rules = rules

    def act(self, state: Tying) -> Action:
        """Choose, within the rules, the layer whose weights each layer uses next."""
        raise NotImplementedError

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """Learn from what followed; the reward is None where there was none to learn from."""

    def statistics(self) -> dict[str, Any]:
        """JSON-able facts about the last decision, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly: tensors and JSON-able values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; call it after ``reset``."""


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
