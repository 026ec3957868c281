"""A bandit that learns from the training losses which layers begin a group.

Every layer is independent, or uses the weights of the layer before it. The reward of a tying is
modelled as ``trend(t) + sum of w[i]`` over its independent layers i > 0, where the trend is a
random walk with a level and a slope. A Kalman filter keeps the Gaussian posterior of all of these
from one reward to the next, so that the general fall of the loss is credited to no layer. Decisions
are drawn by Thompson sampling (Thompson 1933; for linear rewards Agrawal and Goyal 2013) and change
one group's border at most; the last one takes what is best by the posterior's mean. NumPy only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.policies.base import LARGEST_REWARD, Action, Policy

# Standard deviations in nats, for rewards that are the mean loss of some ten batches.
NOISE = 0.03  # of a reward
LEVEL, SLOPE = 0.03, 0.02  # of what the trend's level and its slope change by between two decisions
UNKNOWN = 1e4, 1.0  # of the level and the slope at the start, when losses fall fast
WORTH = 0.1  # of a layer's worth, before anything is known
JITTER = 1e-12  # a variance: keeps rounding from making a covariance indefinite
WATCHED = 0.25  # share of the decisions that change nothing: the loss falls too steeply yet
FIRST, LAST = 0.5, 0.1
"""What layer 1 and the last layer are expected to be worth as the first of their groups: the first
and the last layer of a transformer do work of their own (see docs/log.md)."""


class Bandit(Policy):
    """Thompson sampling of the layers that are independent; the others use the layer before them.

    Args:
        price: what an independent layer has to be worth, in nats; None: borders move, the number
            of groups stays. What is measured is what a border is worth at once: the two groups that
            it makes are equal at first, so a price sees nothing of what they will learn to do.
        seed: of the sampling.
    """

    reward = "training_loss"
    inherit = "majority"
    settles = 0.5
    divides_initial_weights = True

    def __init__(self, *, price: float | None = None, seed: int = 0) -> None:
        self.price = price
        self._rng = np.random.default_rng(seed)

    def start(self, rules: Rules) -> Tying:
        """Groups of neighbouring layers: a quarter of the layers, or all that a budget allows.

        Groups are parted by kind, so that fewer of them may fit.
        """
        num_layers = len(rules.kinds)
        usual = min(max(3, num_layers // 4), num_layers)
        is_limited = rules.max_independent < num_layers
        for number in range(rules.max_independent if is_limited else usual, 1, -1):
            groups = pattern("sandwich", num_layers, number)
            within_kinds = Tying.from_labels(zip(rules.kinds, groups.owners, strict=True))
            if within_kinds.num_independent <= rules.max_independent:
                return within_kinds
        return rules.tightest

    def reset(self, start: Tying, rules: Rules, num_decisions: int | None = None) -> None:
        """Begin a run.

        The first quarter of the decisions change nothing, and the last is made without exploring.

        Raises:
            InputError: if the number of decisions is not known, if there is nothing to decide from
                this start, or if it would be lost at once.
        """
        if num_decisions is None:
            raise InputError(
                "the bandit explores first and then settles, so it has to know how long the run "
                "is: DynamicTying(..., total_steps=...)"
            )
        num_layers = len(rules.kinds)
        self.rules = rules
        self.num_decisions = num_decisions
        self._check_start(start)
        self._made = 0  # decisions
        # The filter's state: w[0..L-1] (w[0] unused: layer 0 is always independent), level, slope.
        self._mean = np.zeros(num_layers + 2)
        self._mean[1] += FIRST
        self._mean[num_layers - 1] += LAST
        self._covariance = np.diag([0.0, *[WORTH**2] * (num_layers - 1), *np.square(UNKNOWN)])

    def _check_start(self, start: Tying) -> None:
        rules = self.rules
        instead = f"start from pattern('sandwich', {start.num_layers}, 3), say"
        for layer, owner in enumerate(start.owners):
            before = rules.choices(layer)[-2:][0]  # the layer before it of its kind, or itself
            if owner not in (layer, start.owners[before]):
                raise InputError(
                    f"the bandit shares between neighbouring layers: it cannot go on from {start}; "
                    f"{instead}"
                )
        can_grow = start.num_independent < min(rules.max_independent, start.num_layers)
        if self.price is None and start == rules.tightest and can_grow:
            raise InputError(
                f"the bandit moves the borders of groups, and there is none in {start}: "
                f"{instead}, or give it a price"
            )

    def act(self, state: Tying) -> Action:
        """Move a border (with a price also begin a group, or end one) where that promises most."""
        rules = self.rules
        before = {i: rules.choices(i)[-2] for i in range(state.num_layers) if rules.choices(i)[1:]}
        begins = set(state.independent_layers)
        self._made += 1
        if WATCHED * self.num_decisions < self._made < self.num_decisions:
            begins = self._moved(begins, set(before), rules.max_independent, self._draw())
        elif self._made == self.num_decisions:
            for _ in range(2 * state.num_layers):  # each change gains: far fewer are made
                begins = self._moved(begins, set(before), rules.max_independent, self.worth())
        return tuple(i if i in begins else before[i] for i in range(state.num_layers))

    def _draw(self) -> np.ndarray:
        """[L] worths, drawn from their posterior.

        By Cholesky's factor, which is unique: eigenvectors differ between processors, and with them
        what a seed leads to.
        """
        covariance = self._covariance[1:-2, 1:-2] + JITTER * np.eye(len(self._mean) - 3)
        drawn = self._rng.multivariate_normal(self._mean[1:-2], covariance, method="cholesky")
        return np.concatenate([[0.0], drawn])

    def _moved(
        self, begins: set[int], free: set[int], max_independent: int, worth: np.ndarray
    ) -> set[int]:
        """The best single change to the layers that begin a group.

        A border moves by one layer: layers that change hands lose what they have learned.
        """
        gains: list[tuple[float, set[int], set[int]]] = [(0.0, set(), set())]
        for border in sorted(begins & free):
            lower = max(i for i in begins if i < border)
            upper = min((i for i in begins if i > border), default=len(worth))
            gains += [
                (worth[to] - worth[border], {border}, {to})
                for to in (border - 1, border + 1)
                if lower < to < upper and to in free
            ]
            if self.price is not None:
                gains.append((self.price - worth[border], {border}, set()))
        if self.price is not None and len(begins) < max_independent:
            gains += [(worth[to] - self.price, set(), {to}) for to in sorted(free - begins)]
        _, ends, starts = max(gains, key=lambda gain: gain[0])
        return begins - ends | starts

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """A step of the filter: the trend moves on, and the reward is shared out."""
        num_layers = next_state.num_layers
        moves = np.eye(num_layers + 2)
        moves[num_layers, num_layers + 1] = 1.0
        wanders = np.diag([*[0.0] * num_layers, LEVEL**2, SLOPE**2])
        self._mean = moves @ self._mean
        self._covariance = moves @ self._covariance @ moves.T + wanders
        if reward is None or not abs(reward) < LARGEST_REWARD:
            return
        seen = np.zeros(num_layers + 2)
        seen[[*next_state.independent_layers[1:], num_layers]] = 1.0
        surprise = reward - seen @ self._mean
        spread = self._covariance @ seen
        gain = spread / (seen @ spread + NOISE**2)
        self._mean = self._mean + gain * surprise
        self._covariance = self._covariance - np.outer(gain, spread)
        self._covariance = (self._covariance + self._covariance.T) / 2

    def worth(self) -> np.ndarray:
        """[L] what each layer is expected to be worth as the first of a group, in nats."""
        return self._mean[:-2].copy()

    def statistics(self) -> dict[str, Any]:
        """``q``, the rows of Q: a layer's worth where it uses its own weights, 0 elsewhere."""
        rows = [[0.0] * i + [round(float(w), 6)] for i, w in enumerate(self.worth())]
        return {"q": rows}

    def state_dict(self) -> dict[str, Any]:
        """The posterior, the number of decisions and the random numbers."""
        return {
            "mean": self._mean.tolist(),
            "covariance": self._covariance.tolist(),
            "made": self._made,
            "rng": copy.deepcopy(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._mean = np.array(state["mean"])
        self._covariance = np.array(state["covariance"])
        self._made = state["made"]
        self._rng.bit_generator.state = copy.deepcopy(state["rng"])
