"""One equation: a weight that is a combination of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix(coefficients: Tensor, *sets: Tensor) -> Tensor:
    """The sum over m of ``coefficients[m] * sets[m]``.

    Args:
        coefficients: [M].
        sets: M tensors of one shape.
    """
    mixed = _Mix.apply(coefficients, *sets)
    return mixed  # type: ignore[return-value]


class _Mix(torch.autograd.Function):
    """As the expression would, but without a temporary tensor for each set."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        coefficients, *sets = arguments
        ctx.save_for_backward(*arguments)
        mixed = sets[0] * coefficients[0]
        for m in range(1, len(sets)):
            mixed.addcmul_(sets[m], coefficients[m])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the decorator makes its argument nameless
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        coefficients, *sets = ctx.saved_tensors
        (gradient,) = grad_outputs
        flat = gradient.reshape(-1)
        to_coefficients = torch.stack([torch.dot(flat, each.reshape(-1)) for each in sets])
        to_sets = [
            gradient * coefficients[m] if wanted else None
            for m, wanted in enumerate(ctx.needs_input_grad[1:])
        ]
        return to_coefficients, *to_sets
