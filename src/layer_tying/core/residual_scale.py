"""Initial weights of layers that are used several times."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.errors import InputError


def damp_shared_layers(layers: TiedLayers, outputs: Sequence[str]) -> None:
    """Divide what shared layers add to the residual stream by the number of their uses.

    The outputs of n layers that share weights are alike at the start of training, and their sum
    grows with n, where that of n independent ones grows with the square root of n. For weights that
    have just been drawn: it changes what the model computes.

    Args:
        layers: tied as they shall start.
        outputs: name patterns (as in ``fnmatch``, within a layer) of the parameters that write to
            the residual stream, such as ``["attn.c_proj.*", "mlp.c_proj.*"]`` for GPT-2.

    Raises:
        InputError: if a layer has no parameter of such a name; then nothing has changed.
    """
    divided: list[tuple[nn.Parameter, int]] = []
    for owner, users in layers.tying.groups.items():
        mine = [
            parameter
            for name, parameter in layers.parameters(owner).items()
            if any(fnmatch(name, pattern) for pattern in outputs)
        ]
        if not mine:
            names = ", ".join(layers.parameters(owner))
            raise InputError(f"layer {owner} has none of {', '.join(outputs)}: it has {names}")
        divided += [(parameter, len(users)) for parameter in mine]
    for parameter, number in divided:
        parameter.data /= number
