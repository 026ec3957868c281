"""Tying in one call, and a tying that is undone where what follows it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from layer_tying.core import parts
from layer_tying.core.optimizer_state import listed, order_in, restore_order
from layer_tying.core.patterns import pattern
from layer_tying.core.tied_layers import Options, TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import (
    forget_settings,
    is_remembered,
    remember_settings,
    settings_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


def tie(
    model: nn.Module,
    tying: str | Tying,
    num_groups: int | None = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    **options: Unpack[Options],
) -> TiedLayers:
    """Tie the layers of a model in a fixed pattern: ``tie(model, "cycle", 3)``.

    Args:
        model: as in ``TiedLayers``.
        tying: a pattern's name (see ``pattern``), or a ``Tying``.
        num_groups: M, the number of independent layers, where the pattern needs it.
        optimizer: the optimizer of the model's parameters, if it was made before.
        options: those of ``TiedLayers``.

    Returns:
        The tied layers, whose tying can be changed again.

    Raises:
        InputError: if the layers or the tying do not fit; then nothing has changed.
    """
    with tied_layers(model, optimizer, **options) as layers:
        if isinstance(tying, str):
            tying = pattern(tying, layers.tying.num_layers, num_groups)
        layers.apply(tying)
        return layers


@contextmanager
def tied_layers(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    **options: Unpack[Options],
) -> Iterator[TiedLayers]:
    """``TiedLayers``, whose options the model forgets again if what is done with them fails."""
    before = settings_of(model) if is_remembered(model) else None
    order = order_in(listed(optimizer))
    which = {name: value for name, value in options.items() if name in parts.WHICH}
    of_part, stack = parts.settings_of_part(model, which)
    layers = TiedLayers(model, optimizer, **options)
    try:
        yield layers
    except BaseException:
        parts.remember_part(stack, of_part)
        TiedLayers(model)  # lets them read their weights as before
        forget_settings(model)
        if before:
            remember_settings(model, before)
        for part in parts.parts_of(model):  # what another one scales may have been read here
            TiedLayers(model, **parts.which(part))
        restore_order(order)
        raise
