"""Sharding a model whose tying changes: each weight is held once, in parts, by all processes.

Facts (torch 2.13):
- FSDP2 settles which modules share parameters when it wraps them. Here nothing is wrapped: weights
  become DTensors, of which each process holds some rows, and a layer gathers a weight where it
  reads it (see ``gather.py``). A transition moves references between layers and copies rows and
  their optimizer state, on each process for itself; nothing is sent.
- Sharding replaces parameters, so the optimizer has to be made after it. Optimizers, clipping and
  ``torch.distributed.checkpoint`` know DTensors.
- A weight is gathered once for each layer that uses it, forward and backward: traffic is
  proportional to depth, memory to independent layers over processes.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from layer_tying.core.distributed import is_sharded
from layer_tying.core.gather import free_after_use
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.weight_access import read_gathered
from layer_tying.errors import InputError


def shard_tied_layers(layers: TiedLayers, mesh: DeviceMesh | None = None) -> None:
    """Shard a model over all processes; its tying can go on changing.

    Call it before the optimizer and ``DynamicTying`` are made. Afterwards train as on one process:
    each computes the loss of its own examples, and the gradients of the weights are means over all
    of them. Weights are those of rank 0.

    Args:
        layers: the layers of the model.
        mesh: the processes to shard over, of one dimension; by default all of them.

    Raises:
        InputError: if there is an optimizer already, the model is sharded already, its layers mix
            their weights, or no process group is initialised.
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
    if layers.mixtures:
        raise InputError("layers mix shared weights already: shard the model first, then mix")
    model = layers.stack.model
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise InputError(f"{name} keeps its weights elsewhere too and cannot be sharded")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            "the model is sharded already: shard it once, before the optimizer is made"
        )
    if mesh is None:
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                places.setdefault(weight, []).append((module, name))
    while places:  # what has been sharded is freed before the next
        weight, slots = places.popitem()
        shards = _sharded(weight, mesh)
        for module, name in slots:
            module._parameters[name] = shards
            read_gathered(module, name)
    free_after_use(model)


def _sharded(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    placement = Shard(0) if weight.ndim else Replicate()
    return nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]), weight.requires_grad)
