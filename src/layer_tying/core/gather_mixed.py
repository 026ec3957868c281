"""Reading a mixture of sharded weights: each process mixes its rows, and the mixture is gathered.

So one matrix is sent where a layer reads one, however many sets it mixes. The gradients of the sets
and of the coefficients are made of this process's rows of the mixture's gradient; those of the
coefficients, which all processes hold, are added up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layer_tying.core.distributed import others_may_be_lost
from layer_tying.core.gather import (
    SOURCE,
    my_rows_of_mean,
    replicated_as,
    type_to_read,
    whole_of_rows,
    with_rows,
)
from layer_tying.core.mix import gradients_of_mix, mixed


def gather_mixed(module: nn.Module, coefficients: Tensor, *sets: Tensor) -> Tensor:
    """The whole sum over m of ``coefficients[m] * sets[m]``; differentiable.

    Args:
        module: the one that reads it.
        coefficients: [M], a DTensor that all processes hold.
        sets: M DTensors of one shape, over the same mesh, in rows.
    """
    full = _GatherMixed.apply(type_to_read(sets[0], module), coefficients, *sets)
    return full  # type: ignore[return-value]


class _GatherMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Any) -> Tensor:
        ctx.weights = weights  # parameters, which live longer than a backward pass

        def whole() -> Tensor:
            coefficients, *sets = (each._local_tensor.detach() for each in weights)
            return whole_of_rows(mixed(coefficients, sets), weights[1], dtype)

        full = whole()
        setattr(full, SOURCE, whole)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coefficients, *sets = (each._local_tensor.detach() for each in ctx.weights)
        rows = my_rows_of_mean(grad_outputs[0], ctx.weights[1])
        to_coefficients, to_sets = gradients_of_mix(
            rows, coefficients, sets, ctx.needs_input_grad[2:]
        )
        with others_may_be_lost():
            dist.all_reduce(to_coefficients, group=ctx.weights[0].device_mesh.get_group())
        return (
            None,
            replicated_as(to_coefficients, ctx.weights[0]),
            *(None if each is None else with_rows(each, ctx.weights[1]) for each in to_sets),
        )
