"""A process that dies ends the others within seconds, with one line, however weights are held."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from many_processes import Died, on_ranks
from tiny_models import Plain, loss_of

from layer_tying import DynamicTying, InputError, RandomPolicy, TiedLayers, shard_tied_layers


def die_on_rank_1(is_sharded: bool) -> float:
    torch.manual_seed(0)
    model = Plain()
    if is_sharded:
        shard_tied_layers(TiedLayers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=1)
    began = time.monotonic()
    try:
        for step in range(8):
            if step == 5 and dist.get_rank() == 1:
                os._exit(9)
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            tying.step()
    except InputError as error:
        assert "process 0 lost another one" in str(error) and "\n" not in str(error)
        return time.monotonic() - began
    raise AssertionError("it went on alone")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_process_that_dies_ends_the_other(is_sharded):
    waited, died = on_ranks(2, die_on_rank_1, is_sharded)
    assert isinstance(died, Died)
    assert isinstance(waited, float) and waited < 60, waited
