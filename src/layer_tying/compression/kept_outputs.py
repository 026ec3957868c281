"""What the layers of an untouched model return, kept so that they need not run again.

A measurement in which layer i is the first that reads other weights leaves the layers before it as
they were: they may return what they returned before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from layer_tying.compression.outcome import Outcome

Run = Callable[[], Outcome]  # the model on a batch


class KeptOutputs:
    """The outputs of a model's layers for one batch.

    Args:
        blocks: the layers.
        run: runs the untouched model, in eval mode and without gradients.

    Attributes:
        outcome: what the untouched model makes of the batch.
        can_stand_in: whether the outputs of the first layers are all that the rest needs. This is
            tried for each number of first layers. It is False where layers run in another order or
            hand each other more, such as a cache that they share.
    """

    def __init__(self, blocks: Sequence[nn.Module], run: Run) -> None:
        self._blocks = blocks
        self._outputs: list[Any] = []
        order: list[int] = []

        def watch(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                order.append(index)
                self._outputs.append(output)

            return hook

        hooks = [block.register_forward_hook(watch(i)) for i, block in enumerate(blocks)]
        try:
            self.outcome = run()
        finally:
            for hook in hooks:
                hook.remove()
        self.can_stand_in = order == [*range(len(blocks))]
        self.can_stand_in = self.can_stand_in and self._suffice(run)
        if not self.can_stand_in:
            self._outputs.clear()

    @contextmanager
    def standing_in(self, number: int) -> Iterator[None]:
        """Let so many first layers return what they returned before, instead of running."""
        with ExitStack() as stack:
            if self.can_stand_in:
                for block, output in zip(self._blocks[:number], self._outputs, strict=False):
                    stack.enter_context(_returning(block, output))
            yield

    def _suffice(self, run: Run) -> bool:
        for number in range(1, len(self._blocks) + 1):
            try:
                with self.standing_in(number):
                    again = run()
            except Exception:  # each model fails in its own way where it misses something
                return False
            if not _equal(again, self.outcome):
                return False
        return True


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return this instead of running."""
    own = vars(block).get("forward")  # such as that of accelerate, which moves weights
    block.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del block.forward
        if own:
            block.forward = own


def _equal(one: Outcome, other: Outcome) -> bool:
    """To the last bit: the same operations have run on the same numbers."""
    if one.loss is None or other.loss is None:
        return one.loss is other.loss and torch.equal(one.logits, other.logits)
    return torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
