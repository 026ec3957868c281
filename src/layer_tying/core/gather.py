"""Reading a sharded weight: it is gathered where it is read and freed after use.

A sharded weight is a DTensor, of which each process holds some rows. Reading it gathers all of
them; the backward pass adds up the gradients of all processes and leaves each its own rows (a
reduce-scatter), as their mean. Autograd saves what a layer was computed with until the backward
pass needs it: for gathered weights it keeps no more than where they came from, and they are
gathered again.

Under autocast, matrices are gathered in its type (embeddings, which autocast leaves alone, are
not), and gradients are added up in the type of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from layer_tying.core.distributed import held_here, is_sharded, others_may_be_lost, rank

SOURCE = "_gathered_from"  # of a gathered weight: the function that gathers it


def gather(sharded: Tensor, module: nn.Module) -> Tensor:
    """The whole of a sharded weight; differentiable.

    Args:
        sharded: a DTensor over a mesh of one dimension, in rows or replicated.
        module: the module that reads it; autocast casts no embedding.
    """
    full = _Gather.apply(sharded, type_to_read(sharded, module))
    return full  # type: ignore[return-value]


def type_to_read(weight: Tensor, module: nn.Module) -> torch.dtype:
    """The type to gather a weight in: autocast's, where that casts it."""
    device = weight.device.type
    is_cast = torch.is_autocast_enabled(device) and weight.ndim > 1 and weight.is_floating_point()
    if not is_cast or isinstance(module, nn.Embedding):
        return weight.dtype
    return torch.get_autocast_dtype(device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharded: Any, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.sharded = sharded

        def whole() -> Tensor:
            return _whole(sharded, dtype)

        full = whole()
        setattr(full, SOURCE, whole)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return with_rows(my_rows_of_mean(gradients[0], ctx.sharded), ctx.sharded), None


def _whole(sharded: Any, dtype: torch.dtype) -> Tensor:
    return whole_of_rows(sharded._local_tensor.detach(), sharded, dtype)


def whole_of_rows(local: Tensor, sharded: Any, dtype: torch.dtype) -> Tensor:
    """All rows, of which each process has these, as many as it holds of a sharded tensor."""
    local = local.to(dtype)
    if not sharded.placements[0].is_shard():
        return local.clone()
    group = sharded.device_mesh.get_group()
    num_rows, *rest = sharded.shape
    padded = _padded(local, _rows_each(num_rows, group))
    gathered = padded.new_empty(len(padded) * dist.get_world_size(group), *rest)
    with others_may_be_lost():
        dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered if len(gathered) == num_rows else gathered[:num_rows].clone()


def my_rows_of_mean(gradient: Tensor, sharded: Any) -> Tensor:
    """Of the mean of a whole weight's gradients, what this process holds of the weight."""
    group = sharded.device_mesh.get_group()
    mean = gradient.to(sharded.dtype) / sharded.device_mesh.size()
    with others_may_be_lost():
        if sharded.placements[0].is_shard():
            return _my_rows_of_sum(mean, group)
        dist.all_reduce(mean, group=group)
    return mean


def _my_rows_of_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of the sum over all processes, the rows that this one holds."""
    num_rows, world = len(tensor), dist.get_world_size(group)
    each = _rows_each(num_rows, group)
    mine = tensor.new_empty(each, *tensor.shape[1:])
    dist.reduce_scatter_tensor(mine, _padded(tensor.contiguous(), each * world), group=group)
    start = min(each * dist.get_rank(group), num_rows)
    return mine[: min(each, num_rows - start)]


def _rows_each(num_rows: int, group: dist.ProcessGroup) -> int:
    """The most rows that a process holds; the last ones may hold fewer, or none."""
    return -(-num_rows // dist.get_world_size(group))


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; of a sharded one, every process calls this."""
    return _whole(tensor, tensor.dtype) if is_sharded(tensor) else tensor.detach()


def whole_on_rank_0(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are, but of sharded tensors all of it, on the CPU of rank 0.

    Sharded tensors are gathered one by one, and every process calls this; on the other ranks there
    are none of them in what is returned.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if not is_sharded(value):
            found[name] = value
            continue
        together = whole(value)
        if rank() == 0:
            found[name] = together.cpu()
    return found


def put(target: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; into a sharded one, this process's rows of all the values."""
    with torch.no_grad():
        held_here(target).copy_(_held_of(values, target) if is_sharded(target) else values)


def sharded_as(values: Tensor, other: Tensor) -> Tensor:
    """A new tensor that is sharded as another one of its shape is, with these values."""
    return with_rows(_held_of(values, other).to(other.device, copy=True), other)


def with_rows(local: Tensor, other: Any) -> Tensor:
    """The tensor that is sharded as another one is, of which this process holds these rows."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": other.shape, "stride": other.stride()}
    return DTensor.from_local(local, other.device_mesh, other.placements, run_check=False, **layout)


def replicated_as(values: Tensor, other: Any) -> Tensor:
    """A tensor over the processes that share another one, of which each of them holds all."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(values, other.device_mesh, [Replicate()], run_check=False)


def _held_of(values: Tensor, sharded: Any) -> Tensor:
    """Of all values of a tensor that is sharded like this one, those that this process holds."""
    if not sharded.placements[0].is_shard():
        return values
    group = sharded.device_mesh.get_group()
    each = _rows_each(len(values), group)
    return values[each * dist.get_rank(group) :][:each]


def free_after_use(model: nn.Module) -> None:
    """While the model runs, let autograd save no gathered weight, but gather it again."""
    entered: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        entered.append(saved_tensors_hooks(_pack, _unpack))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        if entered:
            entered.pop().__exit__()

    model.register_forward_pre_hook(enter, prepend=True)
    model.register_forward_hook(leave, always_call=True)


Packed = Tensor | tuple[Callable[[], Tensor], tuple[Any, ...]]


def _pack(tensor: Tensor) -> Packed:
    base = tensor if tensor._base is None else tensor._base
    source = getattr(base, SOURCE, None)
    if source is None:
        return tensor
    return source, (tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    source, view = packed
    return source().as_strided(*view)
