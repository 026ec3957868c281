"""Learned mixtures: each layer reads its own combination of a few shared sets of weights.

M stored sets A[0], ..., A[M-1] (the weights of the independent layers) and, for each layer i and
each of its matrices k, M coefficients: the layer reads

    W[i, k] = sum over m of c[i, k, m] A[m, k]

(Savarese and Maire, ICLR 2019; there the sets are templates). A tying is the case of one-hot
coefficients, from which training starts. Vectors (norms, biases) stay tied.

A mixed matrix is made where it is read and freed after use; under gradient checkpointing it is made
again in the backward pass. What is stored is M sets and L x M numbers for each matrix of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layer_tying.core.distributed import held_here, is_sharded
from layer_tying.core.find import MIXTURE, LayerStack, Slot
from layer_tying.core.gather import replicated_as
from layer_tying.core.tying import Tying
from layer_tying.core.weight_access import read_mixed, stored
from layer_tying.errors import InputError

LEARNING_RATE_FACTOR = 5.0
"""How much faster the coefficients learn than the model; measured, see the log."""

FACTOR_KEY = "learning_rate_factor"  # in an optimizer's param_group, for those that set rates


class Mixtures:
    """The coefficients with which the layers of a tied model mix its shared sets of weights.

    They are parameters of the model: the matrix ``c_proj.weight`` of a layer has its coefficients
    in ``c_proj.weight_mixture``, a vector of M numbers.

    Args:
        stack: the layers.
        tying: theirs; the independent layers hold the M sets. It is the start, and stays.

    Attributes:
        coefficients: each layer's, by the name of the matrix within the layer: [M] each.

    Raises:
        InputError: if there is one set only, or the layers differ, or have no matrix to mix.
    """

    def __init__(self, stack: LayerStack, tying: Tying) -> None:
        owners = tying.independent_layers
        if len(owners) < 2:
            raise InputError(
                f"a mixture needs two independent layers or more, and the tying is {tying}"
            )
        if len(set(stack.kinds)) > 1:
            raise InputError("the layers of this model differ, and a mixture needs equal ones")
        self._stack = stack
        self._owners = owners
        self.coefficients: list[dict[str, nn.Parameter]] = []
        for layer, slots in enumerate(stack.slots):
            one_hot = torch.zeros(len(owners))
            one_hot[owners.index(tying.owners[layer])] = 1.0
            self.coefficients.append(
                {
                    name: _coefficients(slot, one_hot)
                    for name, slot in slots.items()
                    if stored(slot).ndim > 1
                }
            )
        if not self.coefficients[0]:
            raise InputError(f"{stack.names[0]} has no matrix to mix")

    def set_weight_access(self) -> None:
        """Let each layer read its mixtures."""
        for slots, mine in zip(self._stack.slots, self.coefficients, strict=True):
            for name in mine:
                read_mixed(*slots[name], [self._stack.slots[owner][name] for owner in self._owners])

    def __iter__(self) -> Iterator[nn.Parameter]:
        """All coefficients, layer by layer."""
        return (vector for layer in self.coefficients for vector in layer.values())

    def matrices(self) -> dict[str, Tensor]:
        """[L, M] the coefficients of each matrix, by its name within a layer, detached."""
        return {
            name: torch.stack([held_here(layer[name]).detach() for layer in self.coefficients])
            for name in self.coefficients[0]
        }


def _coefficients(slot: Slot, one_hot: Tensor) -> nn.Parameter:
    """Those that the module has already (of a model that was loaded), or new ones."""
    module, attribute = slot
    name = f"{attribute}{MIXTURE}"
    if name not in module._parameters:
        weight = stored(slot)
        values = one_hot.to(device=weight.device, dtype=weight.dtype, copy=True)
        if is_sharded(weight):
            values = replicated_as(values, weight)
        module.register_parameter(name, nn.Parameter(values))
    return stored((module, name))


def coefficient_group(mixtures: Mixtures, learning_rate: float) -> dict[str, Any]:
    """An optimizer's ``param_group`` for the coefficients."""
    return {
        "params": list(mixtures),
        "lr": LEARNING_RATE_FACTOR * learning_rate,
        "weight_decay": 0.0,
        FACTOR_KEY: LEARNING_RATE_FACTOR,
    }
