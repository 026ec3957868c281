"""FSDP2 with tie groups as units, on two processes, against plain training on one."""

import re

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from tiny_models import Plain, gpt2, llama, loss_of, tokens
from torch import nn

from layer_tying import DynamicTying, InputError, TiedLayers, Tying, shard_tied_layers
from layer_tying.core import distributed

TYINGS = [(0,) * 6, (0, 1, 0, 1, 0, 1), (0, 0, 2, 2, 0, 2), (0, 1, 2, 3, 4, 5)]


def losses_of(model: nn.Module, is_sharded: bool) -> list[float]:
    """Eight steps; the optimizer is made here, after sharding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for step in range(8):
        ids = tokens(batch=4, seed=step)
        if is_sharded:
            ids = ids[distributed.rank() :: distributed.world_size()]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(distributed.mean(loss.item()))
    return losses


def sharded_and_plain(cases: list[tuple]) -> list[tuple[list[float], list[float], float]]:
    """The losses of both, and which share of the parameters this process held."""
    results = []
    for make, owners, options, checkpointing in cases:
        runs = []
        for is_sharded in (True, False):
            torch.manual_seed(0)
            model = make()
            layers = TiedLayers(model, **options)
            layers.apply(Tying(owners))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            whole = sum(p.numel() for p in model.parameters())
            if is_sharded:
                shard_tied_layers(layers)
                assert TiedLayers(model, **options).tying == layers.tying
                here = sum(p.to_local().numel() for p in model.parameters())  # type: ignore
                share = here / whole
            runs.append(losses_of(model, is_sharded))
        results.append((*runs, share))
    return results


@pytest.mark.numerics
def test_a_sharded_model_trains_like_a_whole_one():
    cases = [
        (gpt2, TYINGS[0], {}, False),
        (gpt2, TYINGS[1], {"untied": ["ln_*"]}, True),
        (llama, TYINGS[2], {"gradient": "owner"}, True),
        (llama, TYINGS[3], {}, False),
    ]
    for results in on_ranks(2, sharded_and_plain, cases):
        for sharded, plain, share in results:
            assert sharded == pytest.approx(plain, abs=1e-5)
            assert len(set(sharded)) == len(sharded), "it learns nothing"
            assert 0.45 < share < 0.55


def refusals() -> list[str]:
    """What is said of combinations that cannot work, before anything is trained."""
    layers = TiedLayers(gpt2())
    layers.apply(Tying(TYINGS[1]))
    shard_tied_layers(layers)
    layers.apply(Tying(TYINGS[1]))  # what is so already can be asked for
    model = layers.stack.model
    optimizer = torch.optim.AdamW(model.parameters())
    plain = Plain()
    before = TiedLayers(plain, torch.optim.AdamW(plain.parameters()))
    late = DynamicTying(plain, None, "dqn")
    late_layers = late.layers
    assert isinstance(late_layers, TiedLayers)
    shard_tied_layers(late_layers)
    loss_of(plain)
    attempts = [
        lambda: layers.apply(Tying(TYINGS[0])),
        lambda: DynamicTying(model, optimizer, "dqn"),
        lambda: shard_tied_layers(layers),
        lambda: shard_tied_layers(before),
        lambda: late.step(reward=lambda: 0.0),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(InputError) as error:
            attempt()
        said.append(str(error.value))
    return said


def test_what_cannot_work_is_refused_in_one_line():
    wanted = [r"cannot change any more"] * 3 + [r"then make the optimizer", r"cannot change any"]
    for said in on_ranks(2, refusals):
        for message, pattern in zip(said, wanted, strict=True):
            assert re.search(pattern, message) and "\n" not in message


def test_one_process_without_a_group_has_nothing_to_shard_over():
    assert not dist.is_initialized()
    with pytest.raises(InputError, match="torchrun"):
        shard_tied_layers(TiedLayers(gpt2()))
