"""Runs of sharded models: they follow a run on one process, and go on on any number of them."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from many_processes import Died, on_ranks
from small_runs import lines_of, signal_at, small, traces_of, write_text

from layer_tying import InputError, Tying
from layer_tying.runs.config import TrainConfig
from layer_tying.saving.checkpoint import read_checkpoint
from layer_tying.saving.export_run import export_run
from layer_tying.saving.load import load


def train_on_a_rank(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    from layer_tying.runs.train import train

    return train(config, resume=resume)


def train_all(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    return [train_on_a_rank(config) for config in configs]


def assert_followed(one: Path, other: Path) -> None:
    """Equal decisions, losses and scores, but for the order in which numbers were added up."""
    ours, theirs = (lines_of(run / "tying.jsonl") for run in (one, other))
    assert [line["state"] for line in ours] == [line["state"] for line in theirs]
    ours, theirs = (lines_of(run / "metrics.jsonl") for run in (one, other))
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        for name in ("validation_perplexity", "trainable_parameters", "step"):
            assert its.get(name) == (mine.get(name) and pytest.approx(mine[name], rel=1e-5))


def assert_same_best(one: Path, other: Path) -> None:
    ours, theirs = (read_checkpoint(run / "checkpoints/best") for run in (one, other))
    assert (ours.step, ours.tying) == (theirs.step, theirs.tying)
    weights = theirs.weights()
    for name, tensor in ours.weights().items():
        assert weights[name].flatten().tolist() == pytest.approx(
            tensor.flatten().tolist(), abs=1e-3
        )


CASES = [
    {"eval_batches": 3},  # an odd number, of which the processes get unequal shares
    {"family": "bert", "accumulate": 2, "reward": "perplexity", "checkpointing": True},
    {"policy": "mixture", "groups": 2},
    {"policy": "cycle", "groups": 1, "sharing": "frozen", "gradient": "owner"},
]


@pytest.mark.numerics
def test_a_sharded_run_follows_a_whole_one(tmp_path):
    write_text(tmp_path)
    configs = [
        small(tmp_path, exp=f"case-{i}", parallel="shard", max_steps=12, every=3, **case)
        for i, case in enumerate(CASES)
    ]
    whole = [config.replace(exp=f"whole-{config.logging.exp}") for config in configs]
    (alone,) = on_ranks(1, train_all, whole)
    summaries, _ = on_ranks(2, train_all, configs)
    for one, other, mine, its in zip(whole, configs, alone, summaries, strict=True):
        assert_followed(one.folder, other.folder)
        assert_same_best(one.folder, other.folder)
        assert its["test_perplexity"] == pytest.approx(mine["test_perplexity"], rel=1e-5)
        assert its["trainable_parameters_end"] == mine["trainable_parameters_end"]
        share = its["model_state_bytes_peak"] / mine["model_state_bytes_peak"]
        assert share == pytest.approx(0.5, abs=0.02)


def stop_on_rank_1(config: TrainConfig) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        signal_at("gradients", 9, signal.SIGINT)
    train_on_a_rank(config)


def assert_goes_on(folder: Path, saving: int, is_sharded: bool, resuming: list) -> None:
    """A run that is stopped after nine steps follows a whole one, however it goes on."""
    write_text(folder)
    config = small(folder, exp="whole", batch_size=4, log_every=1)
    on_ranks(1, train_on_a_rank, config)
    stopped = config.replace(exp="stopped", parallel="shard" if is_sharded else "replicate")
    for outcome in on_ranks(saving, stop_on_rank_1, stopped):
        assert "stopped at step 9 of 24" in str(outcome)
    for world, parallel in resuming:
        resumed = config.replace(exp=f"{parallel}-{world}", parallel=parallel)
        shutil.copytree(stopped.folder, resumed.folder)
        on_ranks(world, train_on_a_rank, resumed, True)
        assert_followed(config.folder, resumed.folder)
        assert_same_best(config.folder, resumed.folder)


@pytest.mark.numerics
def test_a_sharded_run_goes_on_on_one_process_and_on_others(tmp_path):
    assert_goes_on(tmp_path, 2, True, [(1, "shard"), (2, "replicate")])


@pytest.mark.numerics
def test_a_whole_run_goes_on_sharded(tmp_path):
    assert_goes_on(tmp_path, 1, False, [(2, "shard")])


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_run_on_four_processes_goes_on_on_one_two_and_four(tmp_path, is_sharded):
    ways = [(1, "shard"), (2, "shard"), (4, "shard"), (4, "replicate"), (2, "replicate")]
    assert_goes_on(tmp_path, 4, is_sharded, ways)


def test_what_a_sharded_run_trained_is_exported(tmp_path):
    write_text(tmp_path)
    config = small(tmp_path, parallel="shard", policy="cycle", groups=2)
    summary, _ = on_ranks(2, train_on_a_rank, config)
    for form in ("compact", "expanded"):
        made = export_run(config.folder, tmp_path / form, form)
        assert made.num_unique == summary["trainable_parameters_end"]
        assert made.tying == Tying((0, 1, 0))
    one, other = load(config.folder), load(tmp_path / "compact")
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.tolist() == its.tolist()


@pytest.mark.parametrize("changes", [{"compile": True}, {"optimizer": "adamw8bit"}])
def test_what_cannot_be_sharded_is_refused_in_one_line(tmp_path, changes):
    with pytest.raises(
        InputError, match=r"parallel shard does not go with .*: take parallel"
    ) as no:
        small(tmp_path, parallel="shard", **changes)
    assert "\n" not in str(no.value)


def killed_at(config: TrainConfig, event: str, number: int, resume: bool) -> None:
    signal_at(event, number, signal.SIGKILL)
    train_on_a_rank(config, resume)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_a_run_whose_processes_are_killed_ten_times_goes_on_exactly(tmp_path, parallel):
    write_text(tmp_path)
    often = {"every": 2, "save_every": 2, "log_every": 1, "eval_every": 30, "max_steps": 60}
    config = small(tmp_path, exp="whole", parallel=parallel, dropout=0.1, **often)
    on_ranks(2, train_on_a_rank, config)
    killed = config.replace(exp="killed")
    rng = random.Random(0)
    for number in range(10):
        event = rng.choice(["step", "gradients", "decided", "save", "checkpoint"])
        is_begun = (killed.folder / "config.json").exists()
        outcomes = on_ranks(2, killed_at, killed, event, rng.randint(1, 3), is_begun)
        assert any(isinstance(each, Died) for each in outcomes), (number, event, outcomes)
    assert not (killed.folder / "summary.json").exists()
    on_ranks(2, train_on_a_rank, killed, True)
    assert_followed(config.folder, killed.folder)
    whole, resumed = traces_of(config.folder), traces_of(killed.folder)
    del whole["metrics"], resumed["metrics"]  # losses are averaged before they are saved
    assert whole == resumed
