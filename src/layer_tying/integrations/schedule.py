"""Learning rates for parameters that join an optimizer whose scheduler exists already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layer_tying.core.mixtures import FACTOR_KEY, INITIAL_RATE
from layer_tying.errors import InputError


@contextmanager
def joining(optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """Within it, groups may join the optimizer; afterwards they follow the first one's schedule.

    Within it, rates are the highest of the schedule, so that new ones can be made of them.
    A scheduler refuses an optimizer that has more groups than it was made with. One of ``LambdaLR``
    (all of transformers' but ``reduce_lr_on_plateau`` and ``greedy`` are) is told of the new ones.

    Raises:
        InputError: if it is another scheduler, before anything is done.
    """
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"the coefficients of mixtures have a learning rate of their own, for which "
            f"{type(scheduler).__name__} has no place: choose another lr_scheduler_type, such as "
            f"'cosine', or another policy"
        )
    known = list(optimizer.param_groups)
    initial = [group.pop(INITIAL_RATE) for group in known]
    now = [group["lr"] for group in known]
    try:
        for group, highest in zip(known, initial, strict=True):
            group["lr"] = highest
        yield
    finally:
        for group, highest, rate in zip(known, initial, now, strict=True):
            group.update({INITIAL_RATE: highest, "lr": rate})
    first = scheduler.lr_lambdas[0]

    def like_the_first(step: int) -> float:  # no state of a function is saved or loaded
        return first(step)

    for number, group in enumerate(optimizer.param_groups):
        if number >= len(known):
            group[INITIAL_RATE] = group["lr"]
            group["lr"] = group[INITIAL_RATE] * first(scheduler.last_epoch)
            scheduler.base_lrs[number:] = [group[INITIAL_RATE]]  # a resumed one has it already
        if FACTOR_KEY in group:
            scheduler.lr_lambdas[number : number + 1] = [like_the_first]
