"""What must hold after every transition, checked without the library."""

import torch
from tiny_models import Plain, loss_of
from torch import nn

from layer_tying.core.tying import Tying


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks if isinstance(model, Plain) else model.transformer.h)


def parameters_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """For each block its parameters, read with no help of the library."""
    return [[p for _, p in b.named_parameters(remove_duplicate=False)] for b in blocks_of(model)]


def train_step(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int = 0) -> None:
    loss_of(model, seed).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def fake_step(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """An optimizer step on random gradients: as good as a real one here, and faster."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def assert_storage_is(model: nn.Module, tying: Tying) -> None:
    """Identity, memory and counts, checked without the library."""
    parameters = parameters_of(model)
    for layer, owner in enumerate(tying.owners):
        for mine, its in zip(parameters[layer], parameters[owner], strict=True):
            assert mine is its
    owned = [p for layer in tying.independent_layers for p in parameters[layer]]
    assert len({id(p) for p in owned}) == len(owned)
    assert len({p.untyped_storage().data_ptr() for p in owned}) == len(owned)
    assert len({id(p) for ps in parameters for p in ps}) == len(owned)


def assert_books_agree(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Each live parameter is held exactly once, and there are moments for no other."""
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted({id(p) for p in model.parameters()})
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in optimizer.state} <= own
