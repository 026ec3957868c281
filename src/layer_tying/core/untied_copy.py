"""A model whose layers share nothing, from one whose layers do."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from layer_tying.core.parts import parts_of, stack_of, which
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import TyingSettings, forget_settings
from layer_tying.core.weight_access import drop_mixtures, weights_as_read


def untied_copy(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    untied: Sequence[str] = (),
    by_kind: bool = False,
) -> nn.Module:
    """A copy of a model whose layers have weights of their own and compute what the model's do.

    Mixtures and 1/n residual scaling go into the weights, and the copy remembers no tying.

    Args:
        model: any module whose layers can be found.
        layers, untied, by_kind: which layers they are (see ``TyingSettings``), where they share
            weights without having been tied here; otherwise the model remembers it.

    Raises:
        InputError: if what is scaled is more than one linear map, so that weights cannot show it.
    """
    copied = copy.deepcopy(model)
    parts = parts_of(copied) or [TyingSettings().but(layers=layers, untied=untied, by_kind=by_kind)]
    stacks = [stack_of(copied, part) for part in parts]
    as_read = {name: w.clone() for stack in stacks for name, w in weights_as_read(stack)}
    drop_mixtures(copied)
    for module in copied.modules():  # what wraps a tied model has it within
        forget_settings(module)
    for part in parts:
        tied = TiedLayers(copied, **which(part))
        tied.apply(Tying.independent(tied.tying.num_layers))
    forget_settings(copied)
    with torch.no_grad():
        for name, weight in as_read.items():
            copied.get_parameter(name).copy_(weight)
    return copied
