"""Blocks compiled by torch.compile: a transition makes no new graph."""

import random

import pytest
import torch
from tiny_models import gpt2, loss_of, random_tying
from torch._dynamo.utils import counters

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying


def compile_module(block: torch.nn.Module) -> None:
    block.compile(backend="aot_eager")


def compile_forward(block: torch.nn.Module) -> None:
    block.forward = torch.compile(block.forward, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_block", [compile_module, compile_forward])
@pytest.mark.parametrize(
    ("gradient", "num_graphs"),
    [("sum", 1), ("owner", 2)],  # one for owners and one for tied layers
)
def test_compiled_blocks_are_shared_by_all_layers_and_do_not_recompile(
    gradient, num_graphs, compile_block
):
    rng = random.Random(0)
    torch.manual_seed(0)
    compiled, eager = gpt2(use_cache=False), gpt2(use_cache=False)
    eager.load_state_dict(compiled.state_dict())
    models = []
    for model in (compiled, eager):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        models.append((model, optimizer, TiedLayers(model, optimizer, gradient=gradient)))
    for block in compiled.transformer.h:
        compile_block(block)

    def train_both(tying: Tying, seed: int) -> None:
        losses = []
        for model, optimizer, layers in models:
            layers.apply(tying)
            layers.verify()
            loss = loss_of(model, seed)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    train_both(Tying((0, 0, 0, 3, 3, 3)), seed=0)
    assert counters["stats"]["unique_graphs"] == num_graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        for transition in range(20):
            train_both(random_tying(rng, 6), seed=transition)
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
