"""Mixtures of a trained model's layers in closed form, by truncated singular value decomposition.

The matrices W[0], ..., W[L-1] that L layers have in one place are approximated by mixtures of M
sets, W[i] ~ sum over m of c[i, m] A[m]. Weighted by the inputs x that the matrices see, the error
is the sum over i of E |(W[i] - sum over m of c[i, m] A[m]) x|^2. With S = E[x x'], taken over the
inputs of all layers, the best mixtures (Eckart and Young 1936) depend on the matrices only through

    G[i, j] = tr(W[i] S W[j]'),   [L, L]

The columns of c are the eigenvectors of G of the M largest eigenvalues, and A[m] is the sum over j
of c[j, m] W[j].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layer_tying.compression.outcome import OutcomeOf
from layer_tying.core.find import LayerStack, Slot
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.weight_access import stored


def best_mixtures(
    matrices: Sequence[Tensor], number: int, second_moment: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The best M sets, and the coefficients of each layer.

    Args:
        matrices: L of one shape [out, in].
        number: M.
        second_moment: S, [in, in]; the identity if None.

    Returns:
        [L, M] coefficients, whose columns are as long as those of a tying, sqrt(L / M); and M sets.
    """
    kind = torch.promote_types(matrices[0].dtype, torch.float32)  # half precision is too coarse
    whole = [w.to(kind) for w in matrices]
    weighted = [w if second_moment is None else w @ second_moment.to(kind) for w in whole]
    gram = torch.stack([torch.stack([(a * b).sum() for b in whole]) for a in weighted]).double()
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)  # eigenvalues rise
    leading = vectors.flip(1)[:, :number].to(whole[0])
    length = (len(matrices) / number) ** 0.5
    sets = [
        torch.stack([leading[j, m] * w for j, w in enumerate(whole)]).sum(0) / length
        for m in range(number)
    ]
    return leading * length, sets


def start_from_closed_form(
    layers: TiedLayers, teacher: LayerStack, batches: Iterable[Any], outcome_of: OutcomeOf
) -> None:
    """Let mixtures start from the best ones of the teacher's layers; vectors stay as they are.

    Args:
        layers: the student's, which mix.
        teacher: the layers of the untouched model.
        batches: on which the second moments of the inputs are measured.
        outcome_of: runs a model on a batch.
    """
    assert layers.mixtures is not None
    owners = layers.tying.independent_layers
    moments = _second_moments(teacher, batches, outcome_of)
    with torch.no_grad():
        for name in layers.mixtures.coefficients[0]:
            slots = [slots[name] for slots in teacher.slots]
            matrices = [_out_in(slot, stored(slot)) for slot in slots]
            found, sets = best_mixtures(matrices, len(owners), moments.get(name))
            for mine, row in zip(layers.mixtures.coefficients, found, strict=True):
                mine[name].copy_(row)
            for owner, each in zip(owners, sets, strict=True):
                parameter = layers.parameters(owner)[name]
                parameter.copy_(_out_in(slots[0], each))


def _second_moments(
    stack: LayerStack, batches: Iterable[Any], outcome_of: OutcomeOf
) -> dict[str, Tensor]:
    """The sum of x x' over the inputs of each linear map of all layers, by its weight's name."""
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), _adding_up_inputs(stack, sums):
        for batch in batches:
            outcome_of(stack.model, batch)
    return sums  # a common factor changes nothing


@contextmanager
def _adding_up_inputs(stack: LayerStack, sums: dict[str, Tensor]) -> Iterator[None]:
    hooks = []
    for slots in stack.slots:
        for name, (module, attribute) in slots.items():
            if attribute == "weight" and _is_linear(module):

                def add(_: nn.Module, inputs: Any, name: str = name) -> None:
                    x = inputs[0].flatten(0, -2).float()
                    sums[name] = sums.get(name, 0) + x.T @ x  # type: ignore[operator]

                hooks.append(module.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's linear maps hold their weights as [in, out]."""
    return type(module).__qualname__ == "Conv1D"


def _out_in(slot: Slot, weight: Tensor) -> Tensor:
    """A weight as [out, in], or back."""
    return weight.T if _is_transposed(slot[0]) else weight
