"""What a policy is: it is asked every k steps for an action, and told the reward that followed.

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from layer_tying.core.tying import Rules, Tying

Action = tuple[int, ...]

LARGEST_REWARD = 1e15
"""Beyond it the squared error overflows single precision: such a reward is not finite enough."""


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
