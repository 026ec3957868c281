"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib
import math

import torch
from torch import nn
from torch.optim import Optimizer

from layer_tying.errors import InputError
from layer_tying.runs.config import OptimizationConfig


def learning_rate(config: OptimizationConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to ``final_lr`` times the peak."""
    warmup = max(1, round(config.warmup * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def adamw(model: nn.Module, config: OptimizationConfig) -> Optimizer:
    """AdamW that decays matrices only; its fused step makes no temporary copies.

    Raises:
        InputError: if a state of 8 bits is asked for and bitsandbytes, which has it, is absent.
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
