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
from torch.optim import Optimizer

from layer_tying.core.tied_layers import TiedLayers
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
        layers: tied; its independent layers hold the M sets. Its tying is the start, and stays.
        optimizer: of the model, to which the coefficients are added, without weight decay and with
            ``LEARNING_RATE_FACTOR`` times the learning rate of its first group.

    Attributes:
        coefficients: each layer's, by the name of the matrix within the layer: [M] each.

    Raises:
        InputError: if there is one set only, or the layers have no matrix to mix.
    """

    def __init__(self, layers: TiedLayers, optimizer: Optimizer | None = None) -> None:
        owners = layers.tying.independent_layers
        if len(owners) < 2:
            raise InputError(
                f"a mixture needs two independent layers or more, and the tying is {layers.tying}"
            )
        if len(set(layers.stack.kinds)) > 1:
            raise InputError("the layers of this model differ, and a mixture needs equal ones")
        self.layers = layers
        self.coefficients: list[dict[str, nn.Parameter]] = []
        for layer, slots in enumerate(layers.stack.slots):
            matrices = {name: slot for name, slot in slots.items() if stored(slot).ndim > 1}
            if not matrices:
                raise InputError(f"{layers.stack.names[layer]} has no matrix to mix")
            one_hot = torch.zeros(len(owners))
            one_hot[owners.index(layers.tying.owners[layer])] = 1.0
            mine = {}
            for name, (module, attribute) in matrices.items():
                sets = [layers.stack.slots[owner][name] for owner in owners]
                mine[name] = nn.Parameter(one_hot.to(stored((module, attribute)), copy=True))
                module.register_parameter(f"{attribute}_mixture", mine[name])
                read_mixed(module, attribute, sets)
            self.coefficients.append(mine)
        layers.keep_tying("the layers mix shared weights, which settles their tying")
        if optimizer is not None:
            optimizer.add_param_group(coefficient_group(self, optimizer.param_groups[0]["lr"]))

    def __iter__(self) -> Iterator[nn.Parameter]:
        """All coefficients, layer by layer."""
        return (vector for layer in self.coefficients for vector in layer.values())

    def matrix(self, name: str) -> Tensor:
        """[L, M] the coefficients of one matrix, by its name within a layer, detached."""
        return torch.stack([layer[name].detach() for layer in self.coefficients])

    def materialise(self) -> dict[str, Tensor]:
        """Every mixed matrix by its name in the model: what each layer reads, as plain tensors."""
        with torch.no_grad():
            return {
                f"{layer}.{name}": getattr(*slots[name]).clone()
                for layer, slots, mine in zip(
                    self.layers.stack.names,
                    self.layers.stack.slots,
                    self.coefficients,
                    strict=True,
                )
                for name in mine
            }


def coefficient_group(mixtures: Mixtures, learning_rate: float) -> dict[str, Any]:
    """An optimizer's ``param_group`` for the coefficients."""
    return {
        "params": list(mixtures),
        "lr": LEARNING_RATE_FACTOR * learning_rate,
        "weight_decay": 0.0,
        FACTOR_KEY: LEARNING_RATE_FACTOR,
    }
