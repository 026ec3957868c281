"""Policies that have begun a run, as ``DynamicTying`` begins it."""

from typing import TypeVar

from layer_tying.core.tying import Rules, Tying
from layer_tying.policies.base import Policy
from layer_tying.policies.dqn import DQN

P = TypeVar("P", bound=Policy)


def ready(policy: P, where: int | Rules, start: Tying | None = None) -> P:
    """Reset a policy for a number of layers, or for rules; it starts from what it chooses."""
    rules = Rules.free(where) if isinstance(where, int) else where
    policy.reset(policy.start(rules) if start is None else start, rules)
    return policy


def dqn(where: int | Rules, **options: float) -> DQN:
    return ready(DQN(**options), where)  # type: ignore[arg-type]
