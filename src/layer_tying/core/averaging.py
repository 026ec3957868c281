"""Averaging gradients over all processes while backward makes them, with nothing to call.

``DistributedDataParallel`` does so for the parameters that it was built with. Here parameters come
and go, so each backward pass looks at those that are live: their gradients are put into buckets in
the order in which backward makes them, and a bucket is sent as soon as it is full, while backward
goes on. When backward ends, what is left is sent and the means are put in place, so that clipping
and the optimizer see means only.

Facts:
- A shared parameter's gradient is made once in a backward pass, as the sum over all its uses.
- Buckets are the same on all ranks and are sent in one order; a gradient that is missing on a rank
  counts as zeros there. One that is missing everywhere stays missing.
- A mean of equal means is that mean, so a gradient that is averaged twice is right: after
  accumulation without ``no_sync``, after a call of ``average_gradients``, and where reentrant
  checkpointing makes a gradient in several parts.
- Averaging has a process group of its own: its messages cannot be mixed up with those of
  ``DistributedDataParallel`` that keeps the rest of the model in step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from layer_tying.core.distributed import (
    buckets,
    is_sharded,
    mark_averaged,
    others_may_be_lost,
    start_averaging,
    world_size,
)
from layer_tying.core.find import LayerStack
from layer_tying.errors import InputError

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for the names it leaves alone


def leave_layers_to_us(stack: LayerStack) -> None:
    """Let a ``DistributedDataParallel`` that wraps the model later leave the layers' weights alone.

    Who compiles the model first and wraps it then gives its parameters a prefix.
    """
    names = _names_in_layers(stack)
    already = list(getattr(stack.model, IGNORED, ()))
    ours = [*names, *(f"_orig_mod.{name}" for name in names)]
    setattr(stack.model, IGNORED, list(dict.fromkeys([*already, *ours])))


def are_layers_left_to_us(model: nn.Module) -> bool:
    """Whether ``leave_layers_to_us`` was called for a model."""
    return hasattr(model, IGNORED)


class GradientAveraging:
    """Averages the gradients of a model's live parameters, whatever they are at each step.

    Where ``DistributedDataParallel`` wraps the model, it averages all but the layers' parameters,
    and its ``no_sync`` holds for those too. The last one that was made for a model is in charge.

    Args:
        stack: the layers of the model, which is not wrapped yet.
        optimizers: those that step with the means; without any, ``check_averaged`` knows nothing.
    """

    def __init__(self, stack: LayerStack, optimizers: Sequence[Optimizer] = ()) -> None:
        self._stack = stack
        self._is_pending = False
        self._steps = [each.register_step_post_hook(self._has_stepped) for each in optimizers]
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self._is_paused = False
        self._replace_earlier()
        self._hooks = WeakIdKeyDictionary()  # of each parameter
        self._backward: Callable[[], object] = lambda: None  # a weak reference, while it runs
        self._buffers: dict[int, Tensor] = {}  # of each bucket, between steps
        self._forget()
        leave_layers_to_us(stack)
        self._note = stack.model.register_forward_pre_hook(_note_wrapper)
        self._add_hooks(_trainable(stack.model.parameters()))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients as they are: for all but the last batch of an optimizer step."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def check_averaged(self) -> None:
        """Check that no gradients of ``no_sync`` wait for the last batch of their step.

        Raises:
            InputError: if some do: those of a layer that is tied now would be lost.
        """
        if self._is_pending:
            raise InputError(
                "the tying cannot change while gradients accumulate: call step of DynamicTying "
                "once for each step of the optimizer, after it"
            )

    def _has_stepped(self, *_: Any) -> None:
        self._is_pending = False

    def _replace_earlier(self) -> None:
        earlier = _in_charge.get(self._stack.model)
        before = earlier() if earlier else None
        if before is not None:
            for hook in (before._note, *before._steps, *before._hooks.values()):
                hook.remove()
        _in_charge[self._stack.model] = weakref.ref(self)

    def _add_hooks(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._gradient_is_made)
                self._hooks[parameter] = hook

    def _averaged_here(self) -> list[nn.Parameter]:
        """The parameters to average, in the order of the model: those that DDP does not hold."""
        parameters = _trainable(self._stack.model.parameters())
        wrapper = _wrapper_of(self._stack.model)
        if wrapper is None:
            return parameters
        held = {id(p) for p in wrapper._module_parameters}
        return [p for p in parameters if id(p) not in held]

    def _gradient_is_made(self, parameter: nn.Parameter) -> None:
        wrapper = _wrapper_of(self._stack.model)
        is_held_back = wrapper is not None and not wrapper.require_backward_grad_sync
        if self._is_paused or is_held_back:
            self._is_pending = bool(self._steps)
            return
        if world_size() == 1:
            return
        if self._backward() is None:
            self._begin()
        index = self._bucket_of.get(parameter)
        if index is None:
            return  # of DistributedDataParallel
        if parameter in self._made:
            self._incomplete.add(index)  # reentrant checkpointing makes it in parts
        else:
            self._made.add(parameter)
            self._num_missing[index] -= 1
        while self._num_sent < len(self._buckets) and not self._num_missing[self._num_sent]:
            self._send_next()

    def _begin(self) -> None:
        """At the first gradient of a backward pass, see which parameters are live."""
        self._is_pending = False
        parameters = self._averaged_here()
        self._add_hooks(parameters)
        if self._means:  # of a backward pass that failed: they may still be on their way
            self._buffers.clear()
        self._forget()
        self._buckets = list(buckets(reversed(parameters)))
        self._buffers = {i: b for i, b in self._buffers.items() if i < len(self._buckets)}
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._num_missing = [len(bucket) for bucket in self._buckets]

        def finish() -> None:
            self._finish()

        self._backward = weakref.ref(finish)  # held by the backward pass alone, also if that fails
        Variable._execution_engine.queue_callback(finish)  # type: ignore[no-untyped-call]

    @property
    def _num_sent(self) -> int:
        return len(self._means)

    def _send_next(self) -> None:
        self._means.append(self._send(self._num_sent))

    def _send(self, index: int) -> Callable[[], list[Tensor]]:
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self._buckets[index]
        ]
        return start_averaging(gradients, self._group, self._buffer(index, gradients))

    def _buffer(self, index: int, gradients: Sequence[Tensor]) -> Tensor:
        """Where a bucket is put together. On a CPU it is kept: new memory costs a tenth of a step.

        A GPU's allocator keeps what is freed, and forward can have it.
        """
        like, size = gradients[0], sum(g.numel() for g in gradients)
        buffer = self._buffers.get(index)
        if buffer is None or (buffer.numel(), buffer.dtype) != (size, like.dtype):
            buffer = like.new_empty(size)
            if like.device.type == "cpu":
                self._buffers[index] = buffer
        return buffer

    def _finish(self) -> None:
        """Send what backward has left, and put the means in place."""
        self._backward = lambda: None
        if not self._buckets:  # DistributedDataParallel holds all that has a gradient
            return
        while self._num_sent < len(self._buckets):
            self._send_next()
        for index in sorted(self._incomplete):
            self._means[index]()
            self._means[index] = self._send(index)
        is_somewhere = self._which_are_made()
        for bucket, means in zip(self._buckets, self._means, strict=True):
            for parameter, mean in zip(bucket, means(), strict=True):
                _put_in_place(parameter, mean, is_somewhere)
        self._forget()

    def _forget(self) -> None:
        """Hold no parameter between backward passes: a layer that is tied has to be freed."""
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._num_missing: list[int] = []  # of each bucket's gradients
        self._made: set[nn.Parameter] = set()
        self._incomplete: set[int] = set()
        self._means: list[Callable[[], list[Tensor]]] = []

    def _which_are_made(self) -> Callable[[nn.Parameter], bool]:
        """Whether any rank has made a parameter's gradient; read only where it is missing."""
        places = {parameter: place for place, parameter in enumerate(self._bucket_of)}
        made = torch.tensor([p.grad is not None for p in places], dtype=torch.uint8)
        made = made.to(next(iter(places)).device)
        with others_may_be_lost():
            dist.all_reduce(made, dist.ReduceOp.MAX, group=self._group)
        return lambda parameter: bool(made[places[parameter]])


def _put_in_place(
    parameter: nn.Parameter, mean: Tensor, is_somewhere: Callable[[nn.Parameter], bool]
) -> None:
    if parameter.grad is not None:
        parameter.grad.copy_(mean)
    elif is_somewhere(parameter):
        parameter.grad = mean.clone()
    if parameter.grad is not None:
        mark_averaged(parameter.grad)


_in_charge: weakref.WeakKeyDictionary[nn.Module, weakref.ref[GradientAveraging]]
_in_charge = weakref.WeakKeyDictionary()
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]]
_wrappers = weakref.WeakKeyDictionary()


def _wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that the model has last run in, if that is still there."""
    wrapper = _wrappers.get(model)
    return wrapper() if wrapper else None


def _note_wrapper(model: nn.Module, _: Any) -> None:
    """Before the model runs: note the DDP it runs in. (A function, so that models can be copied.)

    Raises:
        InputError: if that holds the layers' parameters.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        _wrappers.pop(model, None)
    elif wrapper is not _wrapper_of(model):
        if not wrapper.parameters_to_ignore.issuperset(getattr(model, IGNORED)):
            raise InputError(
                "DistributedDataParallel holds the layers' weights and would never sync those that "
                "are made later: make DynamicTying first, then wrap that same model"
            )
        _wrappers[model] = weakref.ref(wrapper)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in dict.fromkeys(parameters) if p.requires_grad and not is_sharded(p)]


def _names_in_layers(stack: LayerStack) -> Sequence[str]:
    return [
        f"{layer}.{name}"
        for layer, slots in zip(stack.names, stack.slots, strict=True)
        for name in slots
    ]
