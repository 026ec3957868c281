"""Matrices of a compact export as 8-bit integers.

A matrix W is stored as integers q and a scale s for each of its rows (the first index): W[i, ...]
is about s[i] q[i, ...], with s[i] = max |W[i, ...]| / 127, rounded to the nearest. Vectors stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layer_tying.core.budget import SCALE, has_rows

LARGEST = 127


def with_scales(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is stored of a tensor: a matrix as int8 [rows, ...] and float32 scales [rows]."""
    if not (tensor.is_floating_point() and has_rows(tensor.shape)):
        return {name: tensor.contiguous()}
    rows = tensor.detach().float().flatten(1)
    scales = (rows.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    integers = (rows / scales[:, None]).round().to(torch.int8)
    return {name: integers.view(tensor.shape), f"{name}{SCALE}": scales}


def without_scales(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a model takes: as they are, or in float32 if any of them has scales."""
    restored = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    scaled = restored.keys() & {each.removesuffix(SCALE) for each in stored.keys() - restored}
    for name, tensor in restored.items() if scaled else ():
        restored[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name in scaled:
        scales = stored[f"{name}{SCALE}"]
        restored[name] = restored[name] * scales.view(-1, *[1] * (restored[name].ndim - 1))
    return restored
