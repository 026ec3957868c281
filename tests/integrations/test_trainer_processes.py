"""The callback on several processes: follows one, and goes on on another number of them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import on_ranks
from tiny_models import FromLosses, gpt2
from tiny_trainer import callback, history, moments, trainer, weights

from layer_tying import DynamicTyingCallback, InputError
from layer_tying.core import distributed
from layer_tying.policies.base import Policy

GLOBAL_BATCH = 4
Outcome = tuple[list[dict], dict[str, torch.Tensor], dict]


def run_trainer(
    folder: Path,
    stop_at: int | None,
    resume: bool,
    policy: str | Policy,
    accumulate: int,
    **changes: Any,
) -> Outcome:
    logging.disable(logging.WARNING)  # that random states are of another number of processes
    shares = distributed.world_size() * accumulate
    run = trainer(
        folder,
        callback(policy=policy),
        **{"make": gpt2, "stop_at": stop_at, "ddp_backend": "gloo"} | changes,
        per_device_train_batch_size=GLOBAL_BATCH // shares,
        gradient_accumulation_steps=accumulate,
    )
    run.train(resume_from_checkpoint=resume or None)
    state = {name: dict(each) for name, each in moments(run).items()}
    return history(run), {n: p.clone() for n, p in weights(run).items()}, state


def on_one(folder: Path, policy: str | Policy = "dqn", accumulate: int = 1) -> Outcome:
    (outcome,) = on_ranks(1, run_trainer, folder, None, False, policy, accumulate)
    return outcome


def assert_followed(ranks: list[Outcome], one: Outcome) -> None:
    for log, their_weights, their_moments in ranks:
        assert [e["tying"] for e in log] == [e["tying"] for e in one[0]]
        assert [e["step"] for e in log] == [e["step"] for e in one[0]], "all is logged once"
        for ours, theirs in zip(one[0], log, strict=True):
            for key in ("loss", "tying_reward", "tying_previous_reward"):
                assert theirs[key] == (ours[key] and pytest.approx(ours[key], rel=2e-4))
        torch.testing.assert_close(their_weights, one[1], rtol=1e-2, atol=2e-3)
        torch.testing.assert_close((their_weights, their_moments), ranks[0][1:], rtol=0, atol=0)


@pytest.mark.numerics
@pytest.mark.parametrize(("policy", "accumulate"), [("dqn", 1), (FromLosses(), 2), ("mixture", 2)])
def test_the_trainer_on_two_processes_follows_one(tmp_path, policy, accumulate):
    one = on_one(tmp_path / "one", policy, accumulate)
    ranks = on_ranks(2, run_trainer, tmp_path / "two", None, False, policy, accumulate)
    assert_followed(ranks, one)


def run_200_transitions(folder: Path) -> Outcome:
    """In float64 and slowly, or what rounding changes would grow from step to step."""
    rare = {"max_steps": 400, "save_steps": 400, "eval_steps": 400, "learning_rate": 1e-3}
    return run_trainer(folder, None, False, "random", 1, make=lambda: gpt2().double(), **rare)


@pytest.mark.slow
@pytest.mark.numerics
def test_the_trainer_follows_through_200_transitions(tmp_path):
    (one,) = on_ranks(1, run_200_transitions, tmp_path / "one")
    assert len([entry for entry in one[0] if entry["tying"]]) == 1 + 200
    for world in (2, 4):
        assert_followed(on_ranks(world, run_200_transitions, tmp_path / str(world)), one)


@pytest.mark.numerics
def test_the_trainer_goes_on_on_another_number_of_processes(tmp_path):
    one = on_one(tmp_path / "one")
    stopped = tmp_path / "stopped"
    on_ranks(2, run_trainer, stopped, 7, False, "dqn", 1)
    for world in (1, 2):
        again = tmp_path / f"on-{world}"
        shutil.copytree(stopped, again)
        assert_followed(on_ranks(world, run_trainer, again, None, True, "dqn", 1), one)


def added_late(folder: Path) -> str:
    first = callback()
    run = trainer(folder, first)
    run.callback_handler.callbacks = [
        each for each in run.callback_handler.callbacks if each is not first
    ]
    del run.model._ddp_params_and_buffers_to_ignore
    run.add_callback(DynamicTyingCallback())
    with pytest.raises(InputError) as refused:
        run.train()
    return str(refused.value)


def test_a_callback_that_is_added_after_the_trainer_was_made_is_refused(tmp_path):
    for said in on_ranks(2, added_late, tmp_path):
        assert "callbacks=[...]" in said
