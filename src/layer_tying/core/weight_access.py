"""The gradient mode ``owner``: a shared weight learns from its owner's position alone.

The modules of a tied layer read their shared weights detached from the graph: autograd saves
nothing for their weight gradients and computes none, while the gradient with respect to the
activations still flows through them. This is what the published code did (its tied copies are
frozen).

A weight is detached where it is read: the module's class is exchanged for a subclass in which the
weight is a property (``torch.nn.utils.parametrize`` works likewise). Unlike hooks that detach
weights while a layer runs, this leaves nothing to restore when a layer raises, sees the recomputed
forward pass of gradient checkpointing, and gives compiled blocks two graphs, an owner's and a tied
layer's. ``module.parameters()`` and ``state_dict()`` go on showing the parameters themselves;
``module._parameters[name]`` is the way to read one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from layer_tying.core.find import Slot

_plain_class: dict[type[nn.Module], type[nn.Module]] = {}


def read_as_they_are(slots: Iterable[Slot]) -> None:
    """Make modules read their weights with gradient again."""
    for module, _ in slots:
        module.__class__ = _plain_class.get(type(module), type(module))


def read_detached(slots: Iterable[Slot]) -> None:
    """Make modules read these of their weights without gradient."""
    attributes: dict[nn.Module, list[str]] = {}
    for module, attribute in slots:
        attributes.setdefault(module, []).append(attribute)
    read_as_they_are((module, "") for module in attributes)
    for module, names in attributes.items():
        module.__class__ = _detaching(type(module), tuple(names))


@cache
def _detaching(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """One subclass for all modules alike, so that compiled code is shared between them."""
    body: dict[str, object] = {name: _detached_weight(name) for name in names}

    def reduced(self: nn.Module, protocol: int) -> tuple[object, ...]:
        _, _, *state = plain.__reduce_ex__(self, protocol)
        return _blank, (plain, names), *state

    body["__reduce_ex__"] = reduced  # by name, pickle would take it for the plain class
    derived = type(plain.__name__, (plain,), {"__module__": plain.__module__, **body})
    derived.__qualname__ = plain.__qualname__
    _plain_class[derived] = plain
    return derived


def _blank(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module as pickle and copy make it, before they put its state back."""
    derived = _detaching(plain, names)
    return derived.__new__(derived)


def _detached_weight(name: str) -> property:
    def read(module: nn.Module) -> torch.Tensor:
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter.detach()

    return property(read)
