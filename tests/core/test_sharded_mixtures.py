"""Learned mixtures of sharded weights, against whole ones on one process with all of a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from tiny_models import Plain, gpt2, llama, tokens
from torch import nn

from layer_tying import DynamicTying, TiedLayers, load_sharded, save_sharded, shard_tied_layers
from layer_tying.core import distributed
from layer_tying.core.gather import whole
from layer_tying.core.weight_access import weights_as_read

MODELS = {"gpt2": gpt2, "llama": llama, "plain": Plain}
Outcome = tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def made(name: str, is_sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer, DynamicTying]:
    torch.manual_seed(0)
    model = MODELS[name]()
    if is_sharded:
        shard_tied_layers(TiedLayers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    outputs = ["attention", "feed_forward.1"]
    options: dict[str, Any] = {"residual_outputs": outputs} if name == "plain" else {}
    return model, optimizer, DynamicTying(model, optimizer, "mixture", **options)


def loss_on_my_rows(model: nn.Module, step: int) -> torch.Tensor:
    if isinstance(model, Plain):
        x = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(step))
        return model(distributed.dealt(x)).square().mean()  # type: ignore[call-overload]
    ids = distributed.dealt(tokens(batch=4, seed=step))  # type: ignore[call-overload]
    return model(input_ids=ids, labels=ids).loss


def train(name: str, steps: int, checkpointing: bool = False, mixed: bool = False) -> Outcome:
    """The losses, the gradients of each step, and what the layers read at the end."""
    model, optimizer, tying = made(name, distributed.world_size() > 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = [], []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_on_my_rows(model, step)
        loss.backward()
        gradients.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tying.step(loss)
        losses.append(distributed.mean(loss.item()))
    tying.layers.verify()
    return losses, gradients, dict(weights_as_read(tying.layers.stack))


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ({"name": "gpt2", "steps": 8}, 1e-5),
        ({"name": "llama", "steps": 4, "checkpointing": True}, 1e-5),
        ({"name": "plain", "steps": 4}, 1e-5),
        ({"name": "gpt2", "steps": 4, "mixed": True}, 1e-2),
    ],
    ids=["gpt2", "checkpointing", "plain", "bf16"],
)
def test_mixtures_of_sharded_weights_follow_those_of_whole_ones(case, tolerance):
    ((losses, gradients, read),) = on_ranks(1, call, train, case)
    for ours, our_gradients, our_read in on_ranks(2, call, train, case):
        assert ours == pytest.approx(losses, rel=tolerance)
        for mine, its in zip(our_gradients, gradients, strict=True):
            assert any(name.endswith("_mixture") for name in its)
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=10 * tolerance)
        torch.testing.assert_close(our_read, read, rtol=1e-3, atol=10 * tolerance)


def call(function: Any, options: dict[str, Any]) -> Any:
    return function(**options)


def messages_of_a_read() -> list[str]:
    model, _, tying = made("plain", True)
    sent = []
    for name in ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def note(*arguments: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            sent.append(name)
            return original(*arguments, **more)

        setattr(dist, name, note)
    model.blocks[3].feed_forward[0].weight.sum().backward()
    assert len(tying.layers.mixtures.coefficients[3]["feed_forward.0.weight"]) > 1
    return sent


def test_a_mixture_is_sent_as_one_matrix_however_many_sets_it_mixes():
    wanted = ["all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"]
    assert on_ranks(2, messages_of_a_read) == [wanted, wanted]


def saved_and_resumed(folder: Path, first: int, last: int) -> list[float]:
    model, optimizer, tying = made("plain", distributed.world_size() > 1)
    if first:
        tying.load_state_dict(load_sharded(folder, tying.layers))
    losses = []
    for step in range(first, last):
        loss = loss_on_my_rows(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(distributed.mean(loss.item()))
    if not first:
        save_sharded(folder, tying.layers, tying.state_dict())
    return losses


@pytest.mark.numerics
def test_mixtures_that_were_saved_on_two_processes_go_on_on_one(tmp_path):
    (wanted,) = on_ranks(1, saved_and_resumed, tmp_path / "alone", 0, 6)
    for before in on_ranks(2, saved_and_resumed, tmp_path / "saved", 0, 3):
        assert before == pytest.approx(wanted[:3], rel=1e-5)
    (after,) = on_ranks(1, saved_and_resumed, tmp_path / "saved", 3, 6)
    assert after == pytest.approx(wanted[3:], rel=1e-5)
