"""How far two ways to compute one number may be apart: one rule for all tests.

Equal mathematics does not give equal bits. A library chooses among kernels by the processor, the
shape, the alignment of memory and whether a gradient is needed, and kernels differ in the order in
which they add and in where they fuse a multiplication with an addition. Floating-point addition is
not associative, so each order rounds to another result. Exact equality (``torch.equal``) is asked
only where the very same operations run on equal inputs in memory of the same layout: of weights
that are copied or stored, of a run that is resumed, of a layer just split off. Everything else is
compared with a tolerance that follows from the arithmetic.

One rounding is wrong by at most half an ``eps`` of its type, relative to the largest number that
takes part; along a chain of n roundings that is at most n ``eps`` between two results. A layer is
a chain of two norms, two residual sums and four to six products, whose sums of up to 64 terms are
added in blocks: ``ROUNDINGS`` bounds it with a margin. Mistakes that tests look for (a wrong
weight, a lost gradient) are larger by orders of magnitude.
"""

from typing import Any

import pytest
import torch

ROUNDINGS = 16
"""Consecutive roundings in one layer, forwards."""


def tolerance(layers: int = 8, dtype: torch.dtype = torch.float32) -> float:
    """The relative error that two orders of summation may make over so many layers.

    A backward pass counts as two more forward passes.
    """
    return ROUNDINGS * layers * torch.finfo(dtype).eps


def assert_close(actual: torch.Tensor, expected: torch.Tensor, layers: int = 8) -> None:
    """Two tensors agree within rounding, relative to the largest value of the expected one."""
    error = tolerance(layers, expected.dtype) * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=error)


def close_to(expected: Any, layers: int = 8) -> Any:
    """Like ``pytest.approx``, for losses and perplexities that were computed in float32."""
    return pytest.approx(expected, rel=tolerance(layers))
