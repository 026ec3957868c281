"""Settles every default of a run once, before ``config.json`` is written.

After that nothing of a run is read from elsewhere: what it takes from another run (``--from``) is
in its own configuration and its own folder.
"""

from __future__ import annotations

from typing import Any

import torch

from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules
from layer_tying.models.families import FAMILIES
from layer_tying.policies import POLICIES
from layer_tying.policies.base import Policy
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.defaults import settle
from layer_tying.runs.from_run import owners_text, settings_from
from layer_tying.runs.precision import usual_precision
from layer_tying.runs.start import policy_of, rules_of
from layer_tying.runs.tasks import task_of
from layer_tying.runs.tying_config import DECIDING
from layer_tying.tasks.base import Task


def resolve(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, Task]:
    """The configuration with every default settled, and its task, whose data settle some of them.

    Args:
        config: what was asked for.
        device: that it will be trained on.

    Raises:
        InputError: if the data, or the run that ``--from`` names, cannot be used, or something was
            asked for that the policy takes no note of.
    """
    config.tying.check_asked(config.settled)
    config = settle(config, **settings_from(config))
    config = settle(config, **usual_settings(config), precision=usual_precision(device))
    task = task_of(config)
    return _settle_lengths(config, task), task


def usual_settings(config: TrainConfig) -> dict[str, Any]:
    """The defaults that the policy declares, and those that depend on the family."""
    is_image = FAMILIES[config.model.family].kind == "image"
    tying = config.tying
    usual: dict[str, Any] = {"dataset": config.data.task or ("digits" if is_image else "pydocs")}
    policy = policy_of(tying, config.seed) if tying.policy in DECIDING else Policy()
    return usual | {
        "reward": "perplexity" if is_image else "log-perplexity",
        "settle": policy.settles,
        "residual_scaling": 0.0 if config.data.task else policy.residual_scaling,
    }


def _settle_lengths(config: TrainConfig, task: Task) -> TrainConfig:
    """The defaults that depend on the data: numbers of steps, and the start."""
    batches = task.batches_per_epoch * config.optimization.epochs
    config = settle(config, max_steps=max(1, batches // config.optimization.accumulate))
    assert config.optimization.max_steps is not None
    config = settle(config, eval_every=max(1, config.optimization.max_steps // 10))
    config = settle(config, save_every=config.evaluation.eval_every)
    return _settle_start(config, rules_of(config.tying, task.model_config))


def _settle_start(config: TrainConfig, rules: Rules) -> TrainConfig:
    """What a policy starts from, where that was left open."""
    tying = config.tying
    if tying.policy in DECIDING and not tying.initial:
        if tying.groups:
            start = pattern(POLICIES[tying.policy].start, len(rules.kinds), tying.groups)
        else:
            start = policy_of(tying, config.seed).start(rules)
        return settle(config, tyings=(owners_text(start),))
    return config
