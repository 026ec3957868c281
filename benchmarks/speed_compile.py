"""A part of speed.py: layers compiled by torch.compile, in the setting of ``--compile``."""

from __future__ import annotations

import time

import torch
from common import DEVICE, Case, random_tying
from torch import Tensor, nn
from torch.optim import Optimizer

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.families import TextInput
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.optimization import adamw
from layer_tying.runs.precision import autocast, choose_attention
from layer_tying.tasks.cross_entropy import language_model_loss

TRANSITIONS = 20
BYTES = 256  # the vocabulary

Side = tuple[nn.Module, Optimizer]


def measure_compile(case: Case) -> Case:
    """Eager and compiled layers in turn, and what 20 transitions make torch compile.

    As the command trains: 8 x 128 tokens, float32 weights, products in bf16, its attention.
    """
    from torch._dynamo.utils import counters

    config = TrainConfig.from_flat(
        policy="none",
        family=case["family"],
        nlayers=case["layers"],
        emsize=case["width"],
        nhead=case["heads"],
        precision="bf16",
    )
    tyings = [
        random_tying(case["layers"], case["independent"], seed) for seed in range(TRANSITIONS + 1)
    ]
    eager, compiled = side(config, tyings[0]), side(config, tyings[0])
    layers = TiedLayers(*compiled)
    for block in layers.stack.blocks:
        block.compile()
    first = sum(step_seconds(config, compiled) for _ in range(2))
    graphs = counters["stats"]["unique_graphs"]
    for tying in tyings[1:]:
        layers.apply(tying)
        step_seconds(config, compiled)
    made = counters["stats"]["unique_graphs"] - graphs
    step_seconds(config, eager)
    pairs = [
        (step_seconds(config, eager), step_seconds(config, compiled))
        for _ in range(case["repeats"])
    ]
    fastest = [min(times) for times in zip(*pairs, strict=True)]
    return {
        "graphs": graphs,
        "transitions": TRANSITIONS,
        "graphs_made_by_transitions": made,
        "first_steps_seconds": first,
        "seconds": dict(zip(("eager", "compiled"), fastest, strict=True)),
        "compiled_of_eager": fastest[1] / fastest[0],
    }


def side(config: TrainConfig, tying: Tying) -> Side:
    torch.manual_seed(0)
    model_config = transformers_config(config.model, TextInput(BYTES, config.data.bptt))
    model = build_model(model_config, tying, device=DEVICE)
    model.config.use_cache = False
    choose_attention(model, config.optimization.precision, config.data.bptt)
    return model, adamw(model, config.optimization)


def step_seconds(config: TrainConfig, side: Side) -> float:
    model, optimizer = side
    rng = torch.Generator().manual_seed(0)
    tokens: Tensor = torch.randint(
        BYTES, (config.data.batch_size, config.data.bptt + 1), generator=rng
    )
    tokens = tokens.to(DEVICE)
    start = time.perf_counter()
    with autocast(config.optimization.precision, DEVICE):
        loss = language_model_loss(model, tokens[:, :-1], tokens[:, 1:])  # type: ignore[arg-type]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for an accelerator
    return time.perf_counter() - start
