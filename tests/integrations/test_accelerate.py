"""A model that accelerate or DDP wraps after ``DynamicTying`` was made, on several processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from many_processes import on_ranks
from tiny_models import Plain
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layer_tying import DynamicTying, InputError, RandomPolicy
from layer_tying.core import distributed


def rows(step: int) -> torch.Tensor:
    """This process's rows of a batch of four."""
    x = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(step))
    return x[distributed.rank() :: distributed.world_size()]


def train_with_accelerate(steps: int, **options: Any) -> tuple[list, list, dict]:
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    losses, states = [], []
    for step in range(steps):
        with accelerator.accumulate(wrapped):
            loss = wrapped(rows(step)).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(distributed.mean(loss.item()))
        if accelerator.sync_gradients:
            tying.step(loss)
            states.append(tying.tying.owners)
    tying.layers.verify()
    return losses, states, {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_followed(world: int, steps: int, cases: list[dict[str, Any]], rel: float) -> None:
    for (losses, states, weights), ranks in zip(
        on_ranks(1, cases_of, steps, cases)[0],
        zip(*on_ranks(world, cases_of, steps, cases), strict=True),
        strict=True,
    ):
        assert len(set(states)) > len(states) // 2 or steps > 100
        for their_losses, their_states, their_weights in ranks:
            assert their_losses == pytest.approx(losses, rel=rel)
            assert their_states == states
            torch.testing.assert_close(their_weights, weights, rtol=1e-4, atol=20 * rel)
            torch.testing.assert_close(their_weights, ranks[0][2], rtol=0, atol=0)


def cases_of(steps: int, cases: list[dict[str, Any]]) -> list[tuple[list, list, dict]]:
    return [train_with_accelerate(steps, **case) for case in cases]


@pytest.mark.numerics
def test_a_prepared_model_on_two_processes_follows_one():
    assert_followed(2, 16, [{}, {"gradient_accumulation_steps": 2}], rel=1e-5)


@pytest.mark.slow
@pytest.mark.numerics
def test_a_prepared_model_follows_through_200_transitions():
    assert_followed(4, 200, [{}], rel=1e-5)


class Sometimes(Plain):
    """Its head has a part that is used in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        self.calls += 1
        return x + self.part(x) if self.calls % 2 else x


def ddp_with(options: dict[str, Any], mixed: bool) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Decisions each step; on rank 1 a loss is NaN once, and the scaler skips that step."""
    torch.manual_seed(0)
    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=1)
    wrapped = DistributedDataParallel(model, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    norms = []
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = wrapped(rows(step)).float().square().mean()
        if step == 3 and dist.get_rank() == 1:
            loss = loss * float("nan")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(str(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        tying.step(loss)
    return norms, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mixed", [False, True])
def test_unused_parameters_mixed_precision_and_scaling_keep_ranks_equal(mixed):
    options = {"find_unused_parameters": True}
    (norms, weights), (their_norms, theirs) = on_ranks(2, ddp_with, options, mixed)
    assert norms == their_norms and norms[3] == "nan" and norms.count("nan") == 1
    assert all(torch.isfinite(each).all() for each in weights.values())
    torch.testing.assert_close(weights, theirs, rtol=0, atol=0)


def prepared_too_early() -> str:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = accelerator.prepare(Plain())
    with pytest.raises(InputError) as refused:
        DynamicTying(model, None)
    return str(refused.value)


def test_a_model_that_was_prepared_before_is_refused():
    for said in on_ranks(2, prepared_too_early):
        assert "\n" not in said and "accelerator.prepare" in said and "first" in said
