"""1/n residual scaling: what layers that share weights add to the residual stream.

The outputs of n layers that share weights are alike, and their sum grows with n, where that of n
independent layers grows with the square root of n. Dividing by n in each forward pass keeps the sum
in bounds; dividing the initial weights instead does so for a while only, and gained less.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

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
        InputError: if a layer has no module of such a name, if one of them is a part of another, or
            if it is never called.
    """
    found = []
    for layer, block in zip(stack.names, stack.blocks, strict=True):
        named = [(name, module) for name, module in block.named_modules() if name]
        mine = [m for name, m in named if any(fnmatchcase(name, pattern) for pattern in outputs)]
        if not mine:
            raise InputError(
                f"{layer} has no module named {' or '.join(outputs) or 'as a residual output'}: "
                f"residual_outputs names the modules that write to the residual stream, out of "
                f"{', '.join(name for name, _ in named)}"
            )
        _check_called(layer, block, mine)
        found.append(mine)
    return found


def _check_called(layer: str, block: nn.Module, outputs: Sequence[nn.Module]) -> None:
    """Refuse modules that would be scaled twice, or never, as nobody calls them."""
    for name, module in block.named_modules(prefix=layer):
        within = module.named_modules(prefix=name) if module in outputs else ()
        for inner, each in within:
            if each is not module and each in outputs:
                raise InputError(
                    f"residual_outputs names {name} and {inner}, which is a part of it: name one"
                )
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in outputs:
            raise InputError(
                f"residual_outputs names {name}.out_proj, which {type(module).__name__} never "
                f"calls: name {name.removeprefix(f'{layer}.')!r} instead"
            )


def check_named(stack: LayerStack, outputs: Sequence[str]) -> None:
    """Raise an InputError if a pattern is the name of no module: a slip of the pen."""
    names = {name for block in stack.blocks for name, _ in block.named_modules() if name}
    for pattern in outputs:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"residual_outputs {pattern!r} is the name of no module in {stack.names[0]} or the "
                f"other layers; there are {', '.join(sorted(names))}"
            )


def factors(tying: Tying, power: float) -> list[float]:
    """For each layer 1/n^p, where n layers use its weights."""
    num_uses = {owner: len(users) for owner, users in tying.groups.items()}
    return [num_uses[owner] ** -power for owner in tying.owners]
