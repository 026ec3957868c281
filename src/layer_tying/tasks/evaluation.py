"""Evaluating a model: batches shared out over processes, losses and predictions put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from layer_tying.core import distributed
from layer_tying.data.batches import IGNORED
from layer_tying.tasks.metrics import Outcome

T = TypeVar("T")
U = TypeVar("U")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, in float32, over labels that are not ignored.

    Args:
        logits: [..., classes], of any floating type.
        labels: [...] class indices; -100 is ignored.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and back as it was."""
    with in_eval_mode(model), torch.no_grad():
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each of its modules back in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def of_my_share(items: Sequence[T], function: Callable[[T], U]) -> list[U]:
    """What a function makes of each of the items that are dealt to this process.

    The function runs the model once, and it is called equally often on all processes: a sharded
    model can only run on all of them at once. Where there is one item less, one more is run for
    nothing.
    """
    mine = [function(item) for item in distributed.dealt(items)]
    if len(mine) * distributed.world_size() < len(items):
        function(items[0])
    return mine


def mean_loss(loss_and_count: Iterable[tuple[Tensor, int]]) -> float:
    """The mean loss per predicted item over all ranks' batches of (mean loss, number of items)."""
    total, count = 0.0, 0.0
    for loss, items in loss_and_count:
        if items:  # the mean of nothing is not a number
            total += float(loss) * items
            count += items
    total, count = distributed.sums(total, count)
    return total / count


def most_likely(logits: Tensor) -> np.ndarray:
    """The index of the largest of the logits [..., classes], int64 [...]."""
    return logits.argmax(-1).cpu().numpy()


def class_outcome(logits: list[Tensor], labels: np.ndarray) -> Outcome:
    """The outcome of a classification.

    Args:
        logits: [n, classes] each, of the batches that ``distributed.dealt`` gave this process.
        labels: [N] of the whole split; of as many as there are logits, the first are used.
    """
    together = torch.cat(distributed.gather_dealt([each.float().cpu() for each in logits]))
    labels = labels[: len(together)]
    loss = float(cross_entropy(together, torch.from_numpy(labels)))
    return Outcome(loss, most_likely(together), labels)


def slices(number: int, size: int, max_slices: int | None = None) -> list[slice]:
    """Rows 0..number in slices of a size, at most so many."""
    return [slice(start, start + size) for start in range(0, number, size)][:max_slices]
