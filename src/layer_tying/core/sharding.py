"""FSDP2 for models whose independent layers do not fit one device: a tie group is a sharding unit.

Facts (torch 2.13):
- ``fully_shard`` refuses parameters that two units share, so all layers of a group make one unit:
  it is gathered when the first of them runs and freed after the last.
- Sharding replaces parameters, so the optimizer has to be made after it.
- A unit's modules are settled when it is made. The tying therefore cannot change any more:
  ``TiedLayers.apply`` and ``DynamicTying`` refuse a sharded model.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from layer_tying.core import distributed
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.errors import InputError


def shard_tied_layers(layers: TiedLayers, **options: Any) -> None:
    """Shard a tied model over all processes, one unit a tie group and one for the rest.

    Call it before the optimizer is made. Afterwards train as with any FSDP2 model: each process
    computes the loss of its own examples, and FSDP averages the gradients.

    Args:
        layers: the layers of the model, with the tying that they shall keep.
        options: for ``fully_shard``: ``mesh``, ``mp_policy``, ``reshard_after_forward``, ...

    Raises:
        InputError: if there is an optimizer already, the model is sharded already, or no process
            group is initialised.
    """
    if not dist.is_initialized():
        raise InputError(
            "there is nothing to shard over: start with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if layers.optimizers:
        raise InputError(
            "the optimizer was made before the model is sharded and would train nothing: "
            "call shard_tied_layers with TiedLayers(model), then make the optimizer"
        )
    model = layers.stack.model
    distributed.refuse_sharded(model.parameters())
    for group in layers.tying.groups.values():
        fully_shard([layers.stack.blocks[layer] for layer in group], **options)
    fully_shard(model, **options)
