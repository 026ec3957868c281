"""Runs on many processes: they follow a run on one, stop together, and go on on any number."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_processes import Died, free_port, on_ranks
from small_runs import lines_of, signal_at, small, traces_of, write_text
from tiny_models import Plain, loss_of

from layer_tying import DynamicTying, InputError, RandomPolicy, TiedLayers, Tying
from layer_tying.runs.config import TrainConfig


def train_on_a_rank(config: TrainConfig, resume: bool = False) -> tuple[dict[str, Any], list]:
    """The summary, and the weights at the end."""
    from layer_tying.runs import train

    weights = []
    summarise = train.summarise

    def noting_weights(training):
        weights.extend(p.flatten().tolist() for p in training.model.parameters())
        return summarise(training)

    train.summarise = noting_weights  # type: ignore[assignment]
    return train.train(config, resume=resume), weights


def assert_followed(one: Path, other: Path) -> None:
    """Equal losses, states and scores, but for the order in which numbers were added up."""
    for name, tolerances in (
        ("metrics.jsonl", {"loss": {"abs": 1e-5}, "validation_perplexity": {"rel": 1e-5}}),
        ("tying.jsonl", {"reward": {"rel": 1e-5}}),
    ):
        ours, theirs = lines_of(one / name), lines_of(other / name)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert [line.get("state") for line in ours] == [line.get("state") for line in theirs]
        for key, tolerance in tolerances.items():
            pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if a.get(key)]
            assert pairs and all(a == pytest.approx(b, **tolerance) for a, b in pairs)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "changes",
    [{}, {"family": "bert", "accumulate": 2, "reward": "perplexity"}],
    ids=["gpt2", "bert"],  # masks are not equally many in all rows
)
def test_two_processes_with_half_the_batch_each_follow_one_with_all_of_it(tmp_path, changes):
    write_text(tmp_path)
    config = small(tmp_path, nlayers=4, max_steps=30, every=3, log_every=1, **changes)
    runs = [config.replace(exp=f"on-{world}") for world in (1, 2)]
    ((_, whole),) = on_ranks(1, train_on_a_rank, runs[0])
    (summary, ours), (_, theirs) = on_ranks(2, train_on_a_rank, runs[1])
    assert_followed(runs[0].folder, runs[1].folder)
    states = [line["state"] for line in lines_of(runs[1].folder / "tying.jsonl")]
    assert len(states) == 11 and len({str(state) for state in states}) > 5
    assert ours == theirs, "weights differ between ranks"
    for mine, its in zip(ours, whole, strict=True):
        assert mine == pytest.approx(its, abs=1e-3)
    assert summary["steps"] == 30


def test_a_run_stops_on_all_ranks_when_one_is_told_to_and_goes_on_on_any_number(tmp_path):
    write_text(tmp_path)
    config = small(tmp_path, exp="whole", log_every=1)
    on_ranks(2, train_on_a_rank, config)
    stopped = config.replace(exp="stopped")
    for outcome in on_ranks(2, stop_on_rank_1, stopped):
        assert "stopped at step 9 of 24" in str(outcome)
    for world in (1, 2, 4):
        resumed = config.replace(exp=f"resumed-on-{world}")
        shutil.copytree(stopped.folder, resumed.folder)
        ranks = on_ranks(world, train_on_a_rank, resumed, True)
        assert all(weights == ranks[0][1] for _, weights in ranks)
        assert_followed(config.folder, resumed.folder)


def stop_on_rank_1(config: TrainConfig) -> None:
    if dist.get_rank() == 1:
        signal_at("gradients", 9, signal.SIGINT)
    train_on_a_rank(config)


def test_each_rank_has_dropout_of_its_own_and_goes_on_with_it(tmp_path):
    write_text(tmp_path)
    config = small(tmp_path, exp="whole", dropout=0.3)
    on_ranks(2, train_on_a_rank, config)
    stopped = config.replace(exp="stopped")
    on_ranks(2, stop_on_rank_1, stopped)
    on_ranks(2, train_on_a_rank, stopped, True)
    assert_followed(config.folder, stopped.folder)
    whole, resumed = traces_of(config.folder), traces_of(stopped.folder)
    del whole["metrics"], resumed["metrics"]  # losses are averaged before they are saved
    assert whole == resumed
    states = [
        value
        for name, value in whole["step-00000024/training.safetensors"].items()
        if name.startswith("/rng/") and name.endswith("/cpu")
    ]
    assert len(states) == 2 and states[0] != states[1]


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    write_text(tmp_path)
    for error in on_ranks(2, train_on_a_rank, small(tmp_path, batch_size=5)):
        assert isinstance(error, InputError)
        assert "batch_size 5 is that of all processes" in str(error) and "by the 2" in str(error)


def die_on_rank_1(config: TrainConfig) -> None:
    if dist.get_rank() == 1:
        signal_at("gradients", 9, signal.SIGKILL)
    train_on_a_rank(config)


def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path):
    write_text(tmp_path)
    error, died = on_ranks(2, die_on_rank_1, small(tmp_path))
    assert isinstance(died, Died)
    assert isinstance(error, InputError) and "process 0 lost another one" in str(error)


def many_transitions(number: int) -> list[tuple[int, int, int]]:
    """Live tensors, their bytes and the optimizer's states, before and after."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, every=1, policy=RandomPolicy(0))
    layers = tying.layers
    assert isinstance(layers, TiedLayers)
    counts, changes = [], 0
    for step in range(number + 1):
        loss_of(model, seed=step + dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % number == 0:  # the same tying each time it is counted
            layers.apply(Tying((0, 0, 2, 2, 0, 0)))
            counts.append(count_tensors(optimizer))
        before = tying.tying
        tying.step(reward=lambda: 0.0)
        changes += tying.tying != before
    layers.verify()
    assert changes > 0.9 * number
    return counts


def count_tensors(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    gc.collect()
    live = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return len(live), sum(t.nbytes for t in live), len(optimizer.state)


def test_memory_does_not_grow_over_transitions():
    for before, after in on_ranks(2, many_transitions, 50):
        assert before == after


TRAINER = """
import sys, pathlib
sys.path.append(sys.argv[1])
from tiny_trainer import callback, trainer
trainer(pathlib.Path(sys.argv[2]), callback(), per_device_train_batch_size=2).train()
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
        "--main_process_port",
    ],
}


def launch(launcher: str, program: list[str]) -> subprocess.CompletedProcess[str]:
    module, *options = LAUNCHERS[launcher]
    command = [sys.executable, "-m", module, *options, str(free_port()), *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_runs_under_a_launcher(tmp_path, launcher, parallel):
    text = write_text(tmp_path)
    flags = ["--nlayers=3", "--nhead=2", "--emsize=16", "--bptt=16", "--batch-size=4"]
    flags += ["--max-steps=6", "--every=2", f"--dataset={text}", f"--output-dir={tmp_path}"]
    flags += [f"--parallel={parallel}", "--policy=dqn"]
    ended = launch(launcher, ["-m", "layer_tying", "train", *flags])
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1, "rank 0 only says how it went"
    steps = [line["step"] for line in lines_of(tmp_path / "run" / "tying.jsonl")]
    assert steps == [0, 1, 3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_runs_under_a_launcher(tmp_path, launcher):
    script = tmp_path / "script.py"
    script.write_text(TRAINER)
    out = tmp_path / "out"
    ended = launch(launcher, [str(script), str(Path(__file__).parents[1]), str(out)])
    assert ended.returncode == 0, ended.stderr
    log = json.loads((out / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    owners = [entry["tying"] for entry in log if "tying" in entry]
    assert len(owners) == 1 + 5 and len({str(each) for each in owners}) > 2
    assert (out / "checkpoint-10" / "layer_tying" / "model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_says_which_rank_died(tmp_path):
    write_text(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib; sys.path += [sys.argv[1], sys.argv[1] + '/core']\n"
        "import torch.distributed as dist, test_many_processes as tests\n"
        "dist.init_process_group('gloo')\n"
        "tests.die_on_rank_1(tests.small(pathlib.Path(sys.argv[2])))\n"
    )
    ended = launch("torchrun", [str(script), str(Path(__file__).parents[1]), str(tmp_path)])
    assert ended.returncode != 0
    assert "process 0 lost another one" in ended.stderr
    assert "failed (exitcode: -9) local_rank: 1" in ended.stderr


def wrapped_in_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Plain()
    model.blocks[1] = FullyShardedDataParallel(model.blocks[1], device_id=torch.device("cpu"))
    TiedLayers(model)


def test_a_model_in_fsdp1_is_refused():
    (outcome,) = on_ranks(1, wrapped_in_fsdp1)
    assert isinstance(outcome, InputError) and "wrapped in FullyShardedDataParallel" in str(outcome)
