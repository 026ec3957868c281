"""1/n residual scaling: what layers that share weights add to the residual stream.

The outputs of n layers that share weights are alike, and their sum grows with n, where that of n
independent layers grows with the square root of n. Dividing by n keeps the sum in bounds, either in
the initial weights or, which a training run cannot undo, in each forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn

from layer_tying.core.find import LayerStack
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError


def residual_modules(stack: LayerStack, outputs: Sequence[str]) -> list[list[nn.Module]]:
    """For each layer, the modules whose output is added to the residual stream.

    Args:
        stack: the layers of a model.
        outputs: name patterns (as in ``fnmatch``, within a layer), such as
            ``["attn.c_proj", "mlp.c_proj"]`` for GPT-2.

    Raises:
        InputError: if a layer has no module of such a name.
    """
    found = []
    for layer, block in zip(stack.names, stack.blocks, strict=True):
        named = [(name, module) for name, module in block.named_modules() if name]
        mine = [m for name, m in named if any(fnmatch(name, pattern) for pattern in outputs)]
        if not mine:
            raise InputError(
                f"{layer} has no module named {' or '.join(outputs) or 'as a residual output'}: "
                f"residual_outputs names the modules that write to the residual stream, out of "
                f"{', '.join(name for name, _ in named)}"
            )
        found.append(mine)
    return found


def divide_initial_weights(tying: Tying, modules: Sequence[Sequence[nn.Module]]) -> None:
    """Divide the weights of the residual outputs by the number of layers that use them.

    For weights that have just been drawn: it changes what the model computes.

    Args:
        tying: of the layers.
        modules: each layer's, as ``residual_modules`` gives them.
    """
    for users in tying.groups.values():
        # What a layer keeps for itself, such as a bias that is not tied, is divided as well.
        of_the_group = {p: None for layer in users for m in modules[layer] for p in m.parameters()}
        for parameter in of_the_group:
            parameter.data /= len(users)


def factors(tying: Tying, power: float) -> list[float]:
    """For each layer 1/n^p, where n layers use its weights."""
    num_uses = {owner: len(users) for owner, users in tying.groups.items()}
    return [num_uses[owner] ** -power for owner in tying.owners]
