"""One equation: a weight that is a combination of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mix(coefficients: Tensor, *sets: Tensor) -> Tensor:
    """The sum over m of ``coefficients[m] * sets[m]``.

    Args:
        coefficients: [M].
        sets: M tensors of one shape.
    """
    if torch._C._are_functorch_transforms_active():  # of torch.func, for which _Mix has no rules
        return torch.stack([c * each for c, each in zip(coefficients, sets, strict=True)]).sum(0)
    total = _Mix.apply(coefficients, *sets)
    return total  # type: ignore[return-value]


class _Mix(torch.autograd.Function):
    """As the expression would, but without a temporary tensor for each set."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        coefficients, *sets = arguments
        ctx.save_for_backward(*arguments)
        return mixed(coefficients, sets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coefficients, *sets = ctx.saved_tensors
        to_coefficients, to_sets = gradients_of_mix(
            grad_outputs[0], coefficients, sets, ctx.needs_input_grad[1:]
        )
        return to_coefficients, *to_sets


def mixed(coefficients: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """What ``mix`` returns, without gradients."""
    total = sets[0] * coefficients[0]
    for m in range(1, len(sets)):
        total.addcmul_(sets[m], coefficients[m])
    return total


def gradients_of_mix(
    gradient: Tensor, coefficients: Tensor, sets: Sequence[Tensor], is_wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of the coefficients, [M], and those of the sets that are wanted."""
    flat = gradient.reshape(-1)
    to_coefficients = torch.stack([_inner(flat, each.reshape(-1).conj()) for each in sets])
    factors = coefficients.conj()
    to_sets = [gradient * factors[m] if wanted else None for m, wanted in enumerate(is_wanted)]
    return to_coefficients, to_sets


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of two vectors. In bfloat16, torch's takes 20 times as long on a CPU."""
    if one.dtype in (torch.float32, torch.float64):
        return torch.dot(one, other)
    return (one * other).sum()
