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

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layer_tying.core.distributed import held_here, is_sharded
from layer_tying.core.find import MIXTURE, LayerStack, Slot
from layer_tying.core.gather import replicated_as
from layer_tying.core.optimizer_state import remove_from
from layer_tying.core.tying import Tying
from layer_tying.core.weight_access import read_mixed, stored
from layer_tying.errors import InputError

LEARNING_RATE_FACTOR = 5.0
"""How much faster the coefficients learn than the model; measured, see the log."""

FACTOR_KEY = "learning_rate_factor"  # in an optimizer's param_group, for those that set rates
INITIAL_RATE = "initial_lr"  # in a param_group that a scheduler of torch has seen


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
        check_mixable(stack, tying.num_independent)
        owners = tying.independent_layers
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

    def set_weight_access(self) -> None:
        """Let each layer read its mixtures."""
        for slots, mine in zip(self._stack.slots, self.coefficients, strict=True):
            for name in mine:
                read_mixed(*slots[name], [self._stack.slots[owner][name] for owner in self._owners])

    def __iter__(self) -> Iterator[nn.Parameter]:
        """All coefficients, layer by layer."""
        return (vector for layer in self.coefficients for vector in layer.values())

    def sets(self) -> Iterator[nn.Parameter]:
        """The matrices that are mixed: those of the independent layers."""
        for owner in self._owners:
            for name in self.coefficients[owner]:
                yield stored(self._stack.slots[owner][name])

    def named(self) -> dict[str, nn.Parameter]:
        """All coefficients by their names in the model, in the same order."""
        return {
            f"{block}.{name}{MIXTURE}": vector
            for block, layer in zip(self._stack.names, self.coefficients, strict=True)
            for name, vector in layer.items()
        }

    def matrices(self) -> dict[str, Tensor]:
        """[L, M] the coefficients of each matrix, by its name within a layer, detached."""
        return {
            name: torch.stack([held_here(layer[name]).detach() for layer in self.coefficients])
            for name in self.coefficients[0]
        }


def check_mixable(stack: LayerStack, num_sets: int) -> None:
    """Raise an InputError if these layers cannot mix so many sets of shared weights."""
    if num_sets < 2:
        problem = f"a mixture needs two independent layers or more, got {num_sets}"
    elif len(set(stack.kinds)) > 1:
        problem = "the layers of this model differ, and a mixture needs equal ones"
    elif all(stored(slot).ndim < 2 for slot in stack.slots[0].values()):
        problem = f"{stack.names[0]} has no matrix to mix"
    elif integers := [name for name, slot in stack.slots[0].items() if _is_of_integers(slot)]:
        problem = f"{stack.names[0]}.{integers[0]} holds integers, which cannot be mixed"
    else:
        return
    raise InputError(
        f"{problem}; tie the layers instead, by another policy or with sharing='tied' of compress"
    )


def _is_of_integers(slot: Slot) -> bool:
    weight = stored(slot)
    return weight.ndim > 1 and not (weight.is_floating_point() or weight.is_complex())


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


def refuse_schedulers(optimizers: Iterable[Optimizer]) -> None:
    """Raise an InputError if a scheduler exists, which cannot take one more ``param_group``."""
    for optimizer in optimizers:
        if any(INITIAL_RATE in group for group in optimizer.param_groups):
            raise InputError(
                "a learning-rate scheduler of this optimizer exists already, and mixtures add a "
                "param_group to the optimizer: make the scheduler afterwards"
            )


def add_to_optimizers(mixtures: Mixtures, optimizers: Sequence[Optimizer]) -> None:
    """Give one of the optimizers the coefficients, in a ``param_group`` of their own.

    Where an optimizer was made with all parameters of a model that mixes already, they are taken
    out of its other groups. Otherwise the first one gets them that holds vectors: some, such as
    Muon, take matrices only.

    Raises:
        InputError: if that optimizer has a scheduler, which cannot take one more group.
    """
    coefficients = {id(p) for p in mixtures}
    for optimizer in optimizers:
        groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        if any(group and group <= coefficients for group in groups):
            return
        if any(group & coefficients for group in groups):
            _add_group(mixtures, optimizer)
            return
    _add_group(mixtures, next(filter(_holds_vectors, optimizers), optimizers[0]))


def _holds_vectors(optimizer: Optimizer) -> bool:
    return any(p.ndim < 2 for group in optimizer.param_groups for p in group["params"])


def _add_group(mixtures: Mixtures, optimizer: Optimizer) -> None:
    refuse_schedulers([optimizer])
    rate = _rate_of_matrices(mixtures, optimizer)
    is_named = "param_names" in optimizer.param_groups[0]
    remove_from(optimizer, mixtures)
    optimizer.add_param_group(
        {
            "params": list(mixtures.named().items() if is_named else mixtures),
            "lr": None if rate is None else LEARNING_RATE_FACTOR * rate,
            "weight_decay": 0.0,
            FACTOR_KEY: LEARNING_RATE_FACTOR,
        }
    )


def _rate_of_matrices(mixtures: Mixtures, optimizer: Optimizer) -> float | None:
    """The learning rate of the first mixed matrix that it holds; if it holds none, its first."""
    matrices = {id(matrix) for matrix in mixtures.sets()}
    groups = optimizer.param_groups
    theirs = (group for group in groups if any(id(p) in matrices for p in group["params"]))
    return next(theirs, groups[0])["lr"]
