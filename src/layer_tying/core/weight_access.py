"""How a layer reads the weights that it shares: as they are, without gradient, or scaled.

A layer reads a weight by ``module.weight``. To change what it reads, the module's class is
exchanged for a subclass in which the weight is a property, as ``torch.nn.utils.parametrize`` does.
Unlike hooks that change weights while a layer runs, this leaves nothing to restore when a layer
raises, sees the recomputed forward pass of gradient checkpointing, and gives compiled layers one
graph for each way of reading, not one for each tying. ``module.parameters()`` and ``state_dict()``
go on showing the stored tensors; ``module._parameters[name]`` is the way to reach one.

Two ways of reading can be combined:

- *detached*: a tied layer reads without gradient. Autograd saves nothing for the weight gradient
  and computes none, while the gradient of the activations flows on (gradient mode ``"owner"``,
  which is what the published code does: its tied copies are frozen).
- *scaled*: what a module returns is multiplied by a factor (1/n residual scaling), by a forward
  hook, since torch's ``TransformerEncoderLayer`` skips the forward of its parts in inference unless
  they have hooks. The factor is a tensor, so that compiled layers are not compiled again when it
  changes; the class is exchanged as well, because that is what compiled layers check.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layer_tying.core.find import Slot

FACTOR = "_residual_factor"  # where a scaled module keeps its factor, a 0-dimensional tensor
_plain_class: dict[type[nn.Module], type[nn.Module]] = {}


def read_as_they_are(modules: Iterable[nn.Module]) -> None:
    """Let modules read their weights, and return their outputs, as their own classes do."""
    for module in modules:
        module.__class__ = _plain_class.get(type(module), type(module))
        if module.__dict__.pop(FACTOR, None) is not None:
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if hook is _scaled]:
                del hooks[key]


def read_detached(slots: Iterable[Slot]) -> None:
    """Let modules read these of their weights without gradient."""
    attributes: dict[nn.Module, list[str]] = {}
    for module, attribute in slots:
        attributes.setdefault(module, []).append(attribute)
    for module, names in attributes.items():
        _exchange(module, tuple(names), FACTOR in module.__dict__)


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns (of a tuple, its first element) by a factor."""
    if FACTOR not in module.__dict__:
        module.register_forward_hook(_scaled, prepend=True)
        _exchange(module, _detached_names(type(module)), True)
    module.__dict__[FACTOR] = torch.tensor(factor)


def _scaled(module: nn.Module, _: Any, output: Any) -> Any:
    factor = module.__dict__[FACTOR]
    if isinstance(output, tuple):
        return output[0] * factor, *output[1:]
    return output * factor


def _exchange(module: nn.Module, detached: tuple[str, ...], is_scaled: bool) -> None:
    plain = _plain_class.get(type(module), type(module))
    module.__class__ = _reading(plain, detached, is_scaled)


def _detached_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    return getattr(module_class, "_detached_names", ()) if module_class in _plain_class else ()


@cache
def _reading(plain: type[nn.Module], detached: tuple[str, ...], is_scaled: bool) -> type[nn.Module]:
    """One subclass for all modules that read alike, so that they share compiled code."""

    def reduced(self: nn.Module, protocol: Any) -> tuple[object, ...]:
        _, _, *state = plain.__reduce_ex__(self, protocol)
        return _blank, (plain, detached, is_scaled), *state

    body: dict[str, object] = {name: _detached_weight(name) for name in detached}
    body["_detached_names"] = detached
    body["__reduce_ex__"] = reduced  # by name, pickle would take the class for the plain one
    derived = type(plain.__name__, (plain,), {"__module__": plain.__module__, **body})
    derived.__qualname__ = plain.__qualname__
    _plain_class[derived] = plain
    return derived


def _blank(plain: type[nn.Module], detached: tuple[str, ...], is_scaled: bool) -> nn.Module:
    """A module as pickle and copy create it, before they restore its state."""
    derived = _reading(plain, detached, is_scaled)
    return derived.__new__(derived)


def _detached_weight(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter.detach()

    return property(read)
