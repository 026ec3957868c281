"""What a run starts from: its precision, its first tying and policy, its optimizer."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core.budget import max_independent
from layer_tying.core.find import find_layers
from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.models.build import lay_out
from layer_tying.policies.bandit import Bandit
from layer_tying.policies.base import Policy
from layer_tying.policies.dqn import DQN
from layer_tying.policies.simple import RandomPolicy, Schedule
from layer_tying.runs.config import DECIDING, TrainConfig
from layer_tying.runs.source import best_checkpoint, final_tying, recorded_tyings, settings_behind
from layer_tying.saving.export import DTYPES


def resolve_precision(config: TrainConfig, device: torch.device) -> str:
    """The run's precision; for ``auto``, ``bf16`` where it is measured to be clearly faster.

    What is measured is the model's feed-forward network on one batch, forward and backward.
    """
    if config.precision != "auto":
        return config.precision
    network = nn.Sequential(
        nn.Linear(config.emsize, 4 * config.emsize, device=device),
        nn.Linear(4 * config.emsize, config.emsize, device=device),
    )
    batch = torch.randn(config.batch_size * config.bptt, config.emsize, device=device)
    seconds = [math.inf, math.inf]  # in fp32, in bf16
    for _ in range(5):
        for is_bf16 in (False, True):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                loss = network(batch).sum()
            loss.backward()
            float(loss)  # waits for an accelerator
            seconds[is_bf16] = min(seconds[is_bf16], time.perf_counter() - start)
    return "bf16" if seconds[True] < 0.8 * seconds[False] else "fp32"


def starting_point(
    config: TrainConfig, num_steps: int, allowed: Rules
) -> tuple[Tying, Policy | None]:
    """The tying a run starts from, and the policy that changes it (None for a static pattern)."""
    if config.policy in DECIDING:
        start = best_checkpoint(config).tying if config.task else _initial(config, allowed)
        if config.policy == "random":
            return start, _settling(RandomPolicy(config.seed), config)
        if config.policy == "bandit":
            return start, _settling(Bandit(price=config.layer_price, seed=config.seed), config)
        return start, _settling(DQN(seed=config.seed), config)
    if config.policy == "recorded":
        start, *later = recorded_tyings(config)
        return start, Schedule(later)
    tying = _static_tying(config)
    if config.activate_at is None:
        return tying, None
    return Tying.independent(config.nlayers), _late(config, tying, num_steps)


def sharing(config: TrainConfig) -> tuple[bool, Literal["first", "majority"]]:
    """Whether shared layers start damped, and which weights a group goes on with.

    A run that uses another's tyings does both as that one did.
    """
    behind = settings_behind(config)
    shared_init = next(each.shared_init for each in behind if each.shared_init)
    return shared_init == "damped", "majority" if behind[-1].policy == "bandit" else "first"


def settles_at(config: TrainConfig, num_steps: int) -> int:
    """The number of steps after which nothing is decided any more."""
    return math.ceil((1 - (config.settle or 0.0)) * num_steps)


def _settling(policy: Policy, config: TrainConfig) -> Policy:
    policy.settles = config.settle or 0.0
    return policy


def rules(config: TrainConfig, model_config: PretrainedConfig) -> Rules:
    """Which tyings the run's budget allows.

    Raises:
        InputError: if no tying keeps within it.
    """
    stack = find_layers(lay_out(model_config))
    most = max_independent(
        stack,
        num_layers=config.budget_layers,
        num_parameters=config.budget_parameters,
        num_bytes=config.budget_bytes,
        dtype=DTYPES[config.export_dtype] if config.export_dtype else None,
    )
    return Rules(stack.kinds, most)


def check_budget(allowed: Rules, start: Tying, policy: Policy | None) -> None:
    """Raise an InputError if the run starts, or is bound to come, over its budget."""
    for tying in (start, *(policy.tyings if isinstance(policy, Schedule) else ())):
        allowed.check(tying)


def _initial(config: TrainConfig, allowed: Rules) -> Tying:
    """What a deciding policy starts from: layers that start frozen are tied in name."""
    name = "all" if config.initial == "frozen" else config.initial
    num_groups = config.groups
    if name == "sandwich" and num_groups is None:  # all that a budget allows, else a quarter
        usual = min(max(3, config.nlayers // 4), config.nlayers)
        num_groups = min(allowed.max_independent, config.nlayers) if config.has_budget else usual
    return pattern(name, config.nlayers, num_groups)


def _static_tying(config: TrainConfig) -> Tying:
    if config.policy != "fixed":
        return pattern(config.policy, config.nlayers, config.groups)
    if config.source:
        return best_checkpoint(config).tying if config.task else final_tying(config)
    try:
        tying = Tying(tuple(int(owner) for owner in str(config.owners).split(",")))
    except ValueError as error:
        raise InputError(f"--owners {config.owners!r}: {error}") from None
    if tying.num_layers != config.nlayers:
        raise InputError(f"--owners names {tying.num_layers} layers, --nlayers is {config.nlayers}")
    return tying


def _late(config: TrainConfig, tying: Tying, num_steps: int) -> Schedule:
    """All layers independent, until the first decision after a share of the run."""
    assert config.activate_at is not None
    waiting = math.ceil(config.activate_at * num_steps / config.every)
    if waiting * config.every >= num_steps:
        raise InputError(
            f"activate_at {config.activate_at} comes after the last decision of {num_steps} steps "
            f"with one every {config.every}: take a smaller --every or --activate-at"
        )
    return Schedule([Tying.independent(config.nlayers)] * waiting + [tying])


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which the model runs: bfloat16 where the run's precision says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


SHORT_SEQUENCE = 256
"""Tokens up to which PyTorch's fused attention in bf16 is slower on CPUs than matrix products: 9
against 1.8 ms forward and backward at 128 tokens, 7.9 against 3.3 at 256, equal at 512."""


def choose_attention(model: PreTrainedModel, config: TrainConfig) -> None:
    """Let the model attend by the kernel that is faster for the run's device and lengths."""
    is_short = config.bptt <= SHORT_SEQUENCE
    if model.device.type == "cpu" and config.precision == "bf16" and is_short:
        model.set_attn_implementation("eager")


def tracker(config: TrainConfig) -> str | None:
    """The tracker to log to as well, if there is one.

    Raises:
        InputError: if it is not installed.
    """
    if config.log_with and importlib.util.find_spec(config.log_with) is None:
        raise InputError(
            f"log-with {config.log_with}: the package {config.log_with} is not installed"
        )
    return config.log_with


@contextmanager
def tracking(accelerator: Accelerator, config: TrainConfig) -> Iterator[None]:
    """Log to the run's tracker, if it has one; without, there is nothing to do."""
    if not config.log_with:
        yield
        return
    settings = {key: value for key, value in asdict(config).items() if value is not None}
    accelerator.init_trackers("layer-tying", config=settings)
    try:
        yield
    finally:
        accelerator.end_training()


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to ``final_lr`` times the peak."""
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def adamw(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW that decays matrices only; its fused step makes no temporary copies.

    Raises:
        InputError: if moments of 8 bits are asked for and bitsandbytes, which has them, is absent.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise InputError(
            f"optimizer {config.optimizer} needs bitsandbytes, pip install bitsandbytes: {error}"
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=(0.9, 0.95))
