"""Many processes: what the ranks of a run agree on. With one process there is nothing to do.

Facts:
- Parameters come and go while a model trains. ``DistributedDataParallel`` knows those it was built
  with and does not sync any that come later, so there is no wrapper here: who averages gradients
  looks at the parameters that are live, at each step. What is sent is proportional to them.
- Every rank sees the same stream of global batches and takes the rows ``rank::world_size`` of each.
  The order of the data does not depend on the number of processes.
- All-reduced values are equal on all ranks to the last bit, so weights stay equal too.
- Gradients travel by the process group's own backend (NCCL on GPUs); all else travels by gloo
  between CPUs, where it neither waits for a GPU nor fills one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layer_tying.errors import InputError

T = TypeVar("T")
AnyTensor = TypeVar("AnyTensor", bound=Tensor)
BUCKET_BYTES = 25 * 2**20  # DDP's: large enough to fill a link, small beside a model


START_ALIKE = (  # what to do about weights that differ between processes
    "all processes start from the same weights: seed them alike before the model is made, or load "
    "the same checkpoint"
)
AVERAGE = (
    "its gradients were not averaged; initialise the process group before DynamicTying is made, or "
    "call layer_tying.average_gradients(model.parameters()) after backward"
)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes. Call it between backward and step.

    Gradients are sent together in buckets, in the order given, which has to be the same on all
    ranks (``model.parameters()`` is). A parameter that has a gradient on some ranks only counts as
    having a gradient of zeros on the others; one that has none anywhere goes on having none.

    Args:
        parameters: the model's; each shared one is sent once.
    """
    if world_size() == 1:
        return
    trainable = [p for p in dict.fromkeys(parameters) if p.requires_grad and not is_sharded(p)]
    pending: list[tuple[list[Tensor], Callable[[], list[Tensor]]]] = []
    for gradients in buckets(_gradients_anywhere(trainable)):
        pending.append((gradients, start_averaging(gradients)))
        if len(pending) > 1:  # one is being sent while the next is put together
            _put_in_place(*pending.pop(0))
    for each in pending:
        _put_in_place(*each)


def _put_in_place(gradients: Sequence[Tensor], means: Callable[[], list[Tensor]]) -> None:
    for gradient, mean in zip(gradients, means(), strict=True):
        gradient.copy_(mean)


def mark_averaged(gradient: Tensor) -> None:
    """Note that a gradient is a mean over all processes, as it is now."""
    gradient._averaged_version = gradient._version  # type: ignore[attr-defined]


def _is_averaged(gradient: Tensor) -> bool:
    return getattr(gradient, "_averaged_version", None) == gradient._version


def _gradients_anywhere(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients to average: those that a rank has; made of zeros where it is another rank."""
    is_due = [p.grad is not None and not _is_averaged(p.grad) for p in parameters]
    somewhere = torch.tensor(is_due, dtype=torch.uint8)
    with others_may_be_lost():
        dist.all_reduce(somewhere, dist.ReduceOp.MAX, group=_between_cpus())
    gradients = []
    for parameter, is_needed in zip(parameters, somewhere.tolist(), strict=True):
        if is_needed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    return gradients


def buckets(tensors: Iterable[AnyTensor]) -> Iterator[list[AnyTensor]]:
    """Neighbours of one type, together at most ``BUCKET_BYTES`` (or one that is larger)."""
    bucket: list[AnyTensor] = []
    size = 0
    for tensor in tensors:
        is_full = size + tensor.nbytes > BUCKET_BYTES
        if bucket and (is_full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def start_averaging(
    gradients: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
    buffer: Tensor | None = None,
) -> Callable[[], list[Tensor]]:
    """Send a copy of these gradients; what is returned waits for their means and has them.

    Args:
        gradients: of one type.
        group: who takes part.
        buffer: flat, where the copy and the means are put; by default new memory.
    """
    flat = torch.cat([g.detach().reshape(-1) for g in gradients], out=buffer).div_(world_size())
    with others_may_be_lost():
        work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None

    def means() -> list[Tensor]:
        with others_may_be_lost():
            work.wait()
        parts = flat.split([g.numel() for g in gradients])
        return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]

    return means


def check_in_sync(model: nn.Module, remedy: str) -> None:
    """Check that all ranks have the same weights, to the last bit. Sharded ones are held once.

    Args:
        model: every rank's own.
        remedy: what to do about weights that differ.

    Raises:
        InputError: on all ranks, if a parameter differs between them, naming the first.
    """
    if world_size() == 1:
        return
    everyone = gather({n: _facts(p) for n, p in model.named_parameters() if not is_sharded(p)})
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        if len({facts.get(name) for facts in everyone}) > 1:
            raise InputError(f"{name} differs between processes: {remedy}")


def _facts(parameter: nn.Parameter) -> tuple[str, int]:
    return f"{tuple(parameter.shape)} {parameter.dtype}", int(_bit_sum(parameter))


def is_sharded(parameter: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    if not dist.is_initialized():  # then there are none, and importing them takes a second
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def held_here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows of a sharded one, else all of it."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers: exact, in whatever order it is added up."""
    same_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(same_size[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of a list that is dealt out to all of them."""
    return items[rank() :: world_size()]


def gather_dealt(mine: Sequence[T]) -> list[T]:
    """What all ranks made of their shares, as one list in the order before it was dealt out."""
    shares = gather(mine)
    return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        with others_may_be_lost():
            dist.all_gather_object(values, value, group=_between_cpus())
    return values


def sums(*values: float) -> list[float]:
    """Each value's sum over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    with others_may_be_lost():
        dist.all_reduce(totals, group=_between_cpus())
    return totals.tolist()


def mean(value: float) -> float:
    """A value's mean over all ranks, in float64."""
    return sums(value)[0] / world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return sums(float(flag))[0] > 0


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        with others_may_be_lost():
            dist.broadcast_object_list(values, src=0, group=_between_cpus())
    return values[0]


def on_rank_0(function: Callable[[], object]) -> None:
    """Do something on rank 0 only, while the others wait.

    Raises:
        InputError: on all ranks, if rank 0 raises one.
    """
    problem = None
    if rank() == 0:
        try:
            function()
        except InputError as error:
            problem = str(error)
    problem = from_rank_0(problem)
    if problem is not None:
        raise InputError(problem)


@contextmanager
def others_may_be_lost() -> Iterator[None]:
    """Say in one line what torch says in many when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"process {rank()} lost another one, which may have said why; a run goes on from its "
            f"last checkpoint with --resume ({str(error).splitlines()[0][:120]})"
        ) from error


def _between_cpus() -> dist.ProcessGroup | None:
    """The group for values on the CPU; None is torch's default group."""
    return None if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


@cache
def _gloo_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group
