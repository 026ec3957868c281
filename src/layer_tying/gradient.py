"""The gradient mode ``owner``: a shared weight learns from its owner's position alone.

Tied positions run on detached weights, so autograd saves nothing for their weight gradients and
computes none; the gradient with respect to the activations still flows through them. This is what
the published code did (its tied copies are frozen).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from layer_tying.find import LayerStack, Slot


def use_only_the_owners_gradient(stack: LayerStack, is_owner: Callable[[int], bool]) -> None:
    """Detach, while a layer runs that ``is_owner`` denies, the weights it shares.

    The hooks sit on the parts of a layer (its attention, its feed-forward network), not on the
    layer: under gradient checkpointing a layer's parts run again in the backward pass, inside the
    checkpoint, and must see the same detached weights.
    """
    for layer, block in enumerate(stack.blocks):
        slots = set(stack.slots[layer].values())
        for part in _parts(block):
            own = [(m, a) for m in part.modules() for a in m._parameters if (m, a) in slots]
            _detach_while_running(part, own, lambda layer=layer: is_owner(layer))
        direct = [
            (block, attribute) for attribute in block._parameters if (block, attribute) in slots
        ]
        _detach_while_running(block, direct, lambda layer=layer: is_owner(layer))


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a block that are called (a list of modules is not)."""
    for child in block.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        else:
            yield child


def _detach_while_running(part: nn.Module, slots: list[Slot], is_owner: Callable[[], bool]) -> None:
    if not slots:
        return
    held: list[nn.Parameter] = []

    def detach(_part: nn.Module, _inputs: object) -> None:
        if torch.is_grad_enabled() and not is_owner():
            for module, attribute in slots:
                parameter = getattr(module, attribute)
                held.append(parameter)
                module._parameters[attribute] = parameter.detach()

    def restore(_part: nn.Module, _inputs: object, _output: object) -> None:
        if held:
            for (module, attribute), parameter in zip(slots, held, strict=True):
                module._parameters[attribute] = parameter
            held.clear()

    part.register_forward_pre_hook(detach)
    part.register_forward_hook(restore, always_call=True)
