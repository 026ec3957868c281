"""What a run starts from: the tyings its budget allows, its first tying, and its policy."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from layer_tying.core.budget import max_independent
from layer_tying.core.find import find_layers
from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.models.build import lay_out
from layer_tying.policies import make_policy
from layer_tying.policies.base import Policy
from layer_tying.policies.simple import Schedule
from layer_tying.runs.from_run import tyings_of
from layer_tying.runs.tying_config import DECIDING, SETTLING, TyingConfig
from layer_tying.saving.export import DTYPES


def starting_point(
    config: TyingConfig, rules: Rules, num_steps: int, seed: int
) -> tuple[Tying, Policy | None]:
    """The tying a run starts from, and the policy that changes it (None for a static pattern).

    Args:
        config: with every default settled.
        rules: the tyings that are allowed.
        num_steps: of the run.
        seed: of the policy.

    Raises:
        InputError: if a tying breaks the rules, or a pattern does not fit the number of layers.
    """
    num_layers = len(rules.kinds)
    tyings = tyings_of(config)
    later: list[Tying] = []
    if config.policy in DECIDING:
        start = tyings[0] if tyings else _initial(config, num_layers)
    elif config.policy == "recorded":
        start, *later = tyings
    else:
        start = _static_tying(config, num_layers)
        if config.activate_at is not None:
            later = _late(config, start, num_steps)
            start = Tying.independent(num_layers)
    for tying in (start, *later):
        rules.check(tying)
    if config.policy in DECIDING:
        return start, policy_of(config, seed)
    return start, Schedule(later) if later else None


def policy_of(config: TyingConfig, seed: int) -> Policy:
    """The policy of a run; its own declarations hold unless the settings override them.

    Args:
        config: the settings, settled or not.
        seed: of the policy.
    """
    policy = make_policy(config.policy, seed=seed)
    if config.settle is not None and config.policy in SETTLING:
        policy.settles = config.settle
    if config.reward and policy.reward:
        is_late = config.reward == "training-loss"
        policy.reward = "training_loss" if is_late else "evaluation"  # type: ignore[misc]
    return policy


def rules_of(config: TyingConfig, model_config: PretrainedConfig) -> Rules:
    """Which tyings the run's budget allows.

    Raises:
        InputError: if no tying keeps within it, or a pattern of what is untied matches nothing.
    """
    stack = find_layers(lay_out(model_config), untied=config.untied_names)
    most = max_independent(
        stack,
        num_layers=config.budget_layers,
        num_parameters=config.budget_parameters,
        num_bytes=config.budget_bytes,
        dtype=DTYPES[config.export_dtype] if config.export_dtype else None,
        mixes=config.policy == "mixture",
    )
    return Rules(stack.kinds, most)


def _initial(config: TyingConfig, num_layers: int) -> Tying:
    """What a deciding policy starts from: layers that start frozen are tied in name."""
    name = "all" if config.initial == "frozen" else config.initial
    return pattern(name, num_layers, config.groups)


def _static_tying(config: TyingConfig, num_layers: int) -> Tying:
    if config.policy != "fixed":
        return pattern(config.policy, num_layers, config.groups)
    if tyings := tyings_of(config):
        return tyings[0]
    try:
        tying = Tying(tuple(int(owner) for owner in str(config.owners).split(",")))
    except ValueError as error:
        raise InputError(f"--owners {config.owners!r}: {error}") from None
    if tying.num_layers != num_layers:
        raise InputError(f"--owners names {tying.num_layers} layers, --nlayers is {num_layers}")
    return tying


def _late(config: TyingConfig, tying: Tying, num_steps: int) -> list[Tying]:
    """All layers independent, until the first decision after a share of the run."""
    assert config.activate_at is not None
    waiting = math.ceil(config.activate_at * num_steps / config.every)
    if waiting * config.every >= num_steps:
        raise InputError(
            f"activate_at {config.activate_at} comes after the last decision of {num_steps} steps "
            f"with one every {config.every}: take a smaller --every or --activate-at"
        )
    return [Tying.independent(tying.num_layers)] * waiting + [tying]
