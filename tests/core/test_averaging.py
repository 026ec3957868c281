"""Gradients that are averaged while backward makes them, in a user's own loop on many processes."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from tiny_models import Plain, gpt2, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from layer_tying import DynamicTying, InputError, RandomPolicy, Tying, average_gradients
from layer_tying.core import distributed

Losses = list[float]
Weights = dict[str, torch.Tensor]


def my_loss(model: nn.Module, step: int) -> torch.Tensor:
    """Of this process's rows of a batch of four."""
    x = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(step))
    return model(distributed.dealt(x)).square().mean()  # type: ignore[call-overload]


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(steps: int, every: int = 1) -> tuple[Losses, list[tuple[int, ...]], Weights]:
    """The same lines on one process and on many."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=every)
    losses, states = [], []
    for step in range(steps):
        loss = my_loss(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tying.step(loss)
        losses.append(distributed.mean(loss.item()))
        states.append(tying.tying.owners)
    tying.layers.verify()
    return losses, states, weights_of(model)


def assert_followed(world: int, steps: int) -> None:
    ((losses, states, weights),) = on_ranks(1, train, steps)
    ranks = on_ranks(world, train, steps)
    assert len(set(states)) > min(steps, 100) // 2
    for their_losses, their_states, their_weights in ranks:
        assert their_losses == pytest.approx(losses, rel=1e-5)
        assert their_states == states
        torch.testing.assert_close(their_weights, weights, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(their_weights, ranks[0][2], rtol=0, atol=0)


@pytest.mark.numerics
def test_two_processes_follow_one_with_nothing_to_call():
    assert_followed(2, steps=12)


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("world", [2, 4])
def test_many_processes_follow_one_through_200_transitions(world):
    assert_followed(world, steps=200)


class Counted:
    """What is handed to all_reduce, in bytes; and what had been made by then."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.probe: Callable[[], bool] = lambda: False
        self.probed: list[bool] = []
        all_reduce = dist.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.sizes.append(tensor.nbytes)
            self.probed.append(self.probe())
            return all_reduce(tensor, *args, **options)

        dist.all_reduce = counting

    def taken(self) -> int:
        total = sum(self.sizes)
        self.sizes.clear()
        return total


def traffic_on_a_rank(tyings: list[tuple[int, ...]]) -> list[tuple[int, int, int, bool]]:
    """Bytes sent by backward, by hand, and held; and whether backward went on meanwhile."""
    distributed.BUCKET_BYTES = 4000
    torch.manual_seed(0)
    model = gpt2()
    tying = DynamicTying(model, None, RandomPolicy(0), initial="none")
    counted = Counted()
    counts = []
    for owners in tyings:
        tying.layers.apply(Tying(owners))
        model.zero_grad()
        first_made_last = model.transformer.wpe.weight
        counted.probed.clear()
        counted.probe = lambda w=first_made_last: w.grad is None
        loss_of(model).backward()
        overlapped = counted.probed[0] and not counted.probed[-1]
        by_itself = counted.taken()
        average_gradients(model.parameters())
        held = sum(p.nbytes for p in model.parameters())
        counts.append((by_itself, counted.taken(), held, overlapped))
    return counts


def test_traffic_is_proportional_to_independent_layers_and_sent_once():
    tyings = [(0,) * 6, (0, 1, 0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 3, 4, 5)]
    for counts in on_ranks(2, traffic_on_a_rank, tyings):
        for by_itself, by_hand, held, overlapped in counts:
            assert held <= by_itself <= 1.01 * held  # a byte a tensor says who has a gradient
            assert by_hand < 0.01 * held, "nothing is averaged twice"
            assert overlapped, "it is sent while backward goes on"


def buffers_on_a_rank(tyings: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Where gradients are put together to be sent, and their bytes, at each backward pass."""
    torch.manual_seed(0)
    model = Plain()
    tying = DynamicTying(model, None, RandomPolicy(0), initial="none")
    places = []
    all_reduce = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if tensor.is_floating_point():
            places.append((tensor.data_ptr(), tensor.untyped_storage().nbytes()))
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = noting
    for step, owners in enumerate(tyings):
        tying.layers.apply(Tying(owners))
        my_loss(model, step).backward()
    return places


def test_gradients_are_put_together_in_the_same_memory_until_the_tying_changes():
    untied, tied = tuple(range(6)), (0,) * 6
    for places in on_ranks(2, buffers_on_a_rank, [untied, untied, tied, tied]):
        first, second, smaller, last = places
        assert first == second and smaller == last
        assert smaller[1] < first[1], "what is held falls with the independent layers"


def accumulate(uses_no_sync: bool) -> tuple[Weights, int]:
    torch.manual_seed(0)
    model = Plain()
    tying = DynamicTying(model, None, RandomPolicy(0), initial=Tying((0, 0, 2, 2, 2, 5)))
    counted = Counted()
    for step in range(3):
        with tying.no_sync() if uses_no_sync and step < 2 else nullcontext():
            my_loss(model, step).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counted.taken()


@pytest.mark.numerics
def test_gradients_are_accumulated_with_and_without_no_sync():
    ((alone, _),) = on_ranks(1, accumulate, True)
    once, thrice = on_ranks(2, accumulate, True), on_ranks(2, accumulate, False)
    for gradients, _ in once + thrice:
        torch.testing.assert_close(gradients, alone, rtol=1e-5, atol=1e-6)
    assert 3 * once[0][1] == thrice[0][1]


class Odd(nn.Module):
    """Rank 1 alone uses ``extra``, nobody ``unused``; layers can be checkpointed."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.plain = Plain(4)
        self.extra = nn.Linear(5, 5)
        self.unused = nn.Linear(2, 2)
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain.embed(x)
        for block in self.plain.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        x = self.plain.head(x)
        return x + self.extra(x) if distributed.rank() == 1 else x


def gradients_of_odd(cases: list[bool | None]) -> list[Weights]:
    found = []
    for checkpointing in cases:
        torch.manual_seed(0)
        model = Odd(checkpointing)
        DynamicTying(
            model, None, RandomPolicy(0), layers="plain.blocks", initial=Tying((0, 0, 0, 3))
        )
        distributed.BUCKET_BYTES = 1000
        my_loss(model, 0).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found


def test_gradients_missing_on_a_rank_or_made_in_parts_are_averaged():
    ranks = on_ranks(2, gradients_of_odd, [None, False, True])
    for gradients in [each for rank in ranks for each in rank]:
        assert "extra.weight" in gradients and "unused.weight" not in gradients
        torch.testing.assert_close(gradients, ranks[0][0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*ranks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def after_a_mishap() -> tuple[list[float], bool, Weights]:
    """A backward pass that fails on all ranks, and NaN on one."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=1)
    norms = []
    for step in range(6):
        loss = my_loss(model, step)
        if step == 2:
            hook = model.embed.weight.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            hook.remove()
        else:
            (loss * (float("nan") if step == 4 and dist.get_rank() else 1.0)).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            if norms[-1] == norms[-1]:
                optimizer.step()
        optimizer.zero_grad()
        tying.step(loss)
    return norms, bool(torch.isfinite(model.embed.weight).all()), weights_of(model)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_a_failed_backward_pass_and_nan_on_one_rank_do_not_split_the_ranks():
    (ours, is_finite, weights), (theirs, _, their_weights) = on_ranks(2, after_a_mishap)
    assert is_finite and str(ours) == str(theirs)
    assert [str(norm) for norm in ours].count("nan") == 1 and str(ours[3]) == "nan"
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=0)


def decisions_between_batches() -> tuple[str, tuple[int, ...], bool]:
    """What a decision between accumulated batches says; and whether the loop goes on after it."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, RandomPolicy(0), every=1, initial="none")
    with tying.no_sync():
        my_loss(model, 0).backward()
    with pytest.raises(InputError) as error:
        tying.step(0.0)
    untouched = tying.tying.owners
    my_loss(model, 1).backward()
    optimizer.step()
    return str(error.value), untouched, tying.step(0.0) is not None


def test_a_tying_that_would_change_while_gradients_accumulate_is_refused_on_every_rank():
    for said, owners, goes_on in on_ranks(2, decisions_between_batches):
        assert "while gradients accumulate" in said and "\n" not in said
        assert owners == tuple(range(6)) and goes_on


def dropped_layers() -> list[bool]:
    """Whether a weight of a layer is still held once that is tied, right after a step."""
    torch.manual_seed(0)
    model = Plain()
    tying = DynamicTying(model, None, RandomPolicy(0), initial="none")
    my_loss(model, 0).backward()
    dropped = weakref.ref(model.blocks[3].norm.weight)
    before = dropped() is not None
    tying.layers.apply(Tying((0,) * 6))
    return [before, dropped() is not None]


def test_a_layer_that_is_tied_is_freed_at_once():
    assert on_ranks(2, dropped_layers) == [[True, False]] * 2


def unequal_models() -> str:
    torch.manual_seed(dist.get_rank())
    with pytest.raises(Exception) as refused:
        DynamicTying(Plain(4 + dist.get_rank()), None)
    with pytest.raises(Exception) as other:
        DynamicTying(Plain(), None)
    return f"{refused.value}\n{other.value}"


def test_unequal_models_are_refused_on_every_rank():
    for said in on_ranks(2, unequal_models):
        structure, values = said.splitlines()
        assert "embed.weight differs between processes" in structure
        assert "seed them alike" in values


def layers_that_are_frozen() -> bool:
    """Whether a backward pass ends in which only DDP's parameters have gradients."""
    torch.manual_seed(0)
    model = Plain()
    model.blocks.requires_grad_(False)
    DynamicTying(model, torch.optim.SGD(model.head.parameters(), lr=0.1), RandomPolicy(0))
    wrapped = nn.parallel.DistributedDataParallel(model)
    my_loss(wrapped, 0).backward()
    return model.head.weight.grad is not None


def test_frozen_layers_leave_nothing_to_average():
    assert on_ranks(2, layers_that_are_frozen) == [True, True]
