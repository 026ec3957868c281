"""What an agent learns from while a ``Trainer`` trains: a training batch, or an evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerState, TrainingArguments

from layer_tying.errors import InputError
from layer_tying.tasks.evaluation import evaluating


def refuse_reward(args: TrainingArguments, reward: str, loader: DataLoader[Any]) -> None:
    """Raise an InputError if a reward cannot be had with these arguments and these data."""
    if reward == "eval_loss" and args.eval_strategy == "no":
        raise InputError("reward='eval_loss' needs evaluations: set args.eval_strategy")
    if reward == "batch" and isinstance(loader.dataset, IterableDataset):
        raise InputError(
            "reward='batch' draws training examples at random, which an IterableDataset cannot do: "
            "take reward='eval_loss'"
        )


def evaluation_reward(metrics: Mapping[str, float]) -> float:
    """Minus the loss of an evaluation, the first one in its metrics.

    Raises:
        InputError: if there is none.
    """
    losses = [value for name, value in metrics.items() if name.endswith("_loss")]
    if not losses:
        found = ", ".join(metrics)
        raise InputError(f"reward='eval_loss', but the evaluation gave only {found}")
    return -losses[0]


def batch_reward(
    args: TrainingArguments, state: TrainerState, model: nn.Module, loader: DataLoader[Any]
) -> float:
    """Minus the loss of a random training batch; leaves the training's random numbers alone.

    Processes draw one batch and take a share each.

    Raises:
        InputError: if the model's output has no loss.
    """
    examples: Any = loader.dataset
    rng = np.random.default_rng([args.seed, state.global_step])
    drawn = rng.integers(len(examples), size=args.train_batch_size * args.world_size)
    indices = drawn[args.process_index :: args.world_size]
    with _random_numbers_of_its_own(int(rng.integers(2**32))):
        batch = loader.collate_fn([examples[int(i)] for i in indices])
    with evaluating(model):
        loss = model(**send_to_device(batch, args.device)).get("loss")
    if loss is None:
        raise InputError(
            "reward='batch' needs the loss of a training batch, and the model's output has none "
            "(the Trainer computes it elsewhere): take reward='eval_loss'"
        )
    return -float(loss)


@contextmanager
def _random_numbers_of_its_own(seed: int) -> Iterator[None]:
    """For data sets and collators that mask or augment; what comes after sees no difference."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
