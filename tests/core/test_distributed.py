"""Many processes: gradients, values and decisions that ranks agree on."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from tiny_models import Plain, gpt2, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layer_tying import DynamicTying, InputError, RandomPolicy, TiedLayers, Tying
from layer_tying.core import distributed

TENSORS = [
    *(((3, 5), torch.float32), ((1000, 400), torch.float32), ((7,), torch.float32)),
    *(((2, 2), torch.bfloat16), ((600, 500), torch.float64), ((4,), torch.float32)),
]


def gradients_of_a_rank(rank: int) -> list[torch.Tensor | None]:
    """One is on rank 1 only, one is not contiguous, and the last is nowhere."""
    rng = torch.Generator().manual_seed(rank)
    gradients: list[torch.Tensor | None] = [
        torch.randn(shape[::-1], generator=rng).to(dtype).T
        if i == 4
        else torch.randn(shape, generator=rng).to(dtype)
        for i, (shape, dtype) in enumerate(TENSORS)
    ]
    gradients[5] = None
    return gradients if rank == 1 else [*gradients[:2], None, *gradients[3:]]


def average_on_a_rank(bucket_bytes: int) -> list[torch.Tensor | None]:
    distributed.BUCKET_BYTES = bucket_bytes
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in TENSORS]
    for parameter, gradient in zip(parameters, gradients_of_a_rank(dist.get_rank()), strict=True):
        parameter.grad = gradient
    distributed.average_gradients([*parameters, parameters[0]])  # a shared one is sent once
    return [p.grad for p in parameters]


@pytest.mark.parametrize("bucket_bytes", [100, 1_000_000])
def test_gradients_become_their_mean_whatever_the_buckets(bucket_bytes):
    ranks = on_ranks(2, average_on_a_rank, bucket_bytes)
    ours, theirs = gradients_of_a_rank(0), gradients_of_a_rank(1)
    for i, (one, other) in enumerate(zip(*ranks, strict=True)):
        if ours[i] is None and theirs[i] is None:
            assert one is None and other is None, "no rank had a gradient"
            continue
        zero = torch.zeros(())
        wanted = ((ours[i] if ours[i] is not None else zero) + theirs[i]) / 2
        tolerance = 1e-2 if wanted.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(one, wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(one, other), "ranks differ"


def agree_on_a_rank() -> dict[str, object]:
    rank = dist.get_rank()
    letters = "abcde"
    return {
        "rank": (distributed.rank(), distributed.world_size()),
        "gathered": distributed.gather_dealt([c.upper() for c in distributed.dealt(letters)]),
        "mean": distributed.mean(rank + 0.5),
        "any": [distributed.any_rank(rank == 2), distributed.any_rank(False)],
        "from_rank_0": distributed.from_rank_0(f"rank {rank}"),
    }


def test_ranks_agree_on_values():
    ranks = on_ranks(3, agree_on_a_rank)
    assert [values.pop("rank") for values in ranks] == [(0, 3), (1, 3), (2, 3)]
    wanted = {
        "gathered": list("ABCDE"),
        "mean": 1.5,
        "any": [True, False],
        "from_rank_0": "rank 0",
    }
    assert ranks == [wanted] * 3


def test_one_process_has_nothing_to_agree_on():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    distributed.average_gradients([parameter])
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert distributed.gather_dealt(distributed.dealt("abc")) == list("abc")
    assert (distributed.mean(2.5), distributed.any_rank(True), distributed.from_rank_0("x")) == (
        2.5,
        1,
        "x",
    )
    distributed.check_in_sync(nn.Linear(2, 2), "do this")
    with pytest.raises(InputError, match="full"):
        distributed.on_rank_0(refuse)


def refuse() -> None:
    raise InputError("the disk is full")


def refuse_on_rank_0() -> list[str]:
    done = []
    distributed.on_rank_0(lambda: done.append("once"))
    distributed.on_rank_0(refuse)
    return done


def test_what_rank_0_cannot_do_is_refused_on_all_ranks():
    ranks = on_ranks(2, refuse_on_rank_0)
    assert [type(error) for error in ranks] == [InputError] * 2
    assert {str(error) for error in ranks} == {"the disk is full"}


def a_users_loop(is_in_sync: bool, steps: int) -> tuple[list[int], list[list[float]]]:
    """Data of its own and an agent of its own on each rank: rank 0's decides."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, "dqn", every=2, seed=rank)
    seen = []
    for step in range(steps):
        with nullcontext() if is_in_sync else tying.no_sync():
            loss_of(model, seed=10 * step + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if decision := tying.step(reward=lambda: float(rank)):
            assert decision.reward == 0.5, "the mean of the ranks' rewards"
            seen.append(decision.state)
    return seen, [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.numerics
def test_in_a_users_own_loop_ranks_stay_equal_to_the_bit():
    (ours, our_weights), (theirs, their_weights) = on_ranks(2, a_users_loop, True, 12)
    assert ours == theirs and len(set(ours)) > 2, "it decided the same, and not always the same"
    assert our_weights == their_weights


def test_a_loop_that_averages_nothing_is_stopped_at_the_first_decision():
    ranks = on_ranks(2, a_users_loop, False, 2)
    for error in ranks:
        assert isinstance(error, InputError)
        assert "embed.weight differs between processes" in str(error)
        assert "average_gradients" in str(error)


def wrapped_in_ddp() -> tuple[str, str]:
    """A wrapped model is refused; and one that was wrapped before is found out when it runs."""
    torch.manual_seed(0)
    model = Plain()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(InputError) as refused:
        DynamicTying(wrapped, None, "dqn")
    DynamicTying(model, None, RandomPolicy(0), initial="none")
    with pytest.raises(InputError) as found_out:
        wrapped(torch.randn(2, 4, 8))
    return str(refused.value), str(found_out.value)


def test_a_model_wrapped_in_ddp_before_is_refused():
    for refused, found_out in on_ranks(2, wrapped_in_ddp):
        assert "make DynamicTying with the bare model first, then wrap it" in refused
        assert "make DynamicTying first, then wrap that same model" in found_out


def traffic_on_a_rank(tyings: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Bytes handed to all_reduce in a step, and bytes of trainable parameters, at each tying."""
    sent = 0
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        nonlocal sent
        sent += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    torch.manual_seed(0)
    model = gpt2()
    layers = TiedLayers(model)
    counts = []
    for owners in tyings:
        layers.apply(Tying(owners))
        model.zero_grad()
        loss_of(model).backward()
        sent = 0
        distributed.average_gradients(model.parameters())
        counts.append((sent, sum(p.nbytes for p in model.parameters())))
    return counts


def test_traffic_is_proportional_to_independent_layers():
    tyings = [(0,) * 6, (0, 1, 0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 3, 4, 5)]
    for counts in on_ranks(2, traffic_on_a_rank, tyings):
        for sent, held in counts:
            assert held <= sent <= 1.01 * held  # a byte a tensor says who has a gradient
