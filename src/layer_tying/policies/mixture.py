"""No decisions: the layers mix a few shared sets of weights, and learn how by gradient."""

from __future__ import annotations

from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.policies.base import Policy


class Mixture(Policy):
    """Learned mixtures of shared weights (see ``core.mixtures``), from a ``cycle``.

    The tying never changes; what changes, at every step, are the coefficients with which each layer
    mixes the shared sets. What a use adds to the residual stream is scaled by 1/n.
    """

    settles = 1.0
    residual_scaling = 1.0
    mixes = True

    def start(self, rules: Rules) -> Tying:
        """A cycle of a quarter of the layers, or of as many as a budget allows; two at least."""
        num_layers = len(rules.kinds)
        usual = max(2, num_layers // 4)
        is_limited = rules.max_independent < num_layers
        return pattern("cycle", num_layers, rules.max_independent if is_limited else usual)
