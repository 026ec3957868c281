"""Who decides which layers share weights. No torch but in ``dqn``.

To add a policy, write one class in one file here and enter it in ``POLICIES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from layer_tying.errors import InputError
from layer_tying.policies.base import Policy


@dataclass(frozen=True)
class PolicyRecord:
    """A policy by its name.

    Attributes:
        place: ``module:class``, imported when it is asked for (some need torch).
        start: the pattern that it starts from, for those who choose its number of groups.
        decides: whether it changes the tying while a model trains.
        learns: whether it learns from rewards.
    """

    place: str
    start: str = "all"
    decides: bool = True
    learns: bool = True


POLICIES = {
    "dqn": PolicyRecord("dqn:DQN"),
    "mixture": PolicyRecord("mixture:Mixture", "cycle", decides=False, learns=False),
    "random": PolicyRecord("simple:RandomPolicy", learns=False),
}


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by its name.

    Args:
        name: one of ``POLICIES``.
        options: of its class, such as ``seed``.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; the known ones are {', '.join(POLICIES)}")
    module, _, policy = POLICIES[name].place.partition(":")
    return getattr(import_module(f"layer_tying.policies.{module}"), policy)(**options)
