"""A transition frees what it drops before it makes anything, and never holds more than it must."""

import gc
import random
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from checks import (
    assert_storage_is,
    fake_step,
    parameters_of,
    train_step,
)
from tiny_models import Plain, loss_of, random_tying
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying


def test_tied_layers_free_their_weights_gradients_and_moments_at_once():
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    dropped = [p for ps in parameters_of(model)[1:] for p in ps]
    references = [weakref.ref(p) for p in dropped]
    references += [weakref.ref(optimizer.state[p]["exp_avg"]) for p in dropped]
    del dropped
    gc.collect()
    gc.disable()
    try:
        layers.apply(Tying.all_tied(6))
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of some tensors, and of all that are made since, as long as they live."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self._count(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._count([made] if torch.is_tensor(made) else [])
        return made

    def _count(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.total)

    @property
    def total(self) -> int:
        return sum(size for ref, size in self.sizes.items() if not ref.expired())


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("moments", ["copy", "fresh"])
def test_memory_never_rises_above_the_larger_of_before_and_after(moments):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer, optimizer_state=moments)
    sizes = set()
    for _ in range(150):
        fake_step(optimizer, generator)
        with LiveBytes(model_state(model, optimizer)) as live:
            before = live.total
            layers.apply(random_tying(rng, 6))
            after = live.total
        assert live.peak == max(before, after)
        assert after == sum(t.nbytes for t in model_state(model, optimizer))
        sizes.add((layers.tying.num_independent, before))
    assert len(sizes) > 6


def test_tying_and_untying_restores_the_memory_and_the_shapes():
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    train_step(model, optimizer)
    block = sum(t.nbytes for t in parameters_of(model)[0])
    full = sum(t.nbytes for t in model_state(model, optimizer))
    layers.apply(Tying.all_tied(6))
    tied = sum(t.nbytes for t in model_state(model, optimizer))
    num_parameters = len(parameters_of(model)[0])
    assert tied == full - 5 * (3 * block + 4 * num_parameters)  # 4 bytes: AdamW's step
    layers.apply(Tying.independent(6))
    assert sum(t.nbytes for t in model_state(model, optimizer)) == full
    assert_storage_is(model, Tying.independent(6))
    train_step(model, optimizer)
