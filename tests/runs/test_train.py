"""The loop: what it does at which step, and that it goes on exactly where it was stopped."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import (
    crashed_at,
    in_process,
    killed_at,
    lines_of,
    small,
    traces_of,
    train_until,
    trainer_of,
    write_text,
)
from tolerance import close_to

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.data.images import load_images
from layer_tying.errors import InputError
from layer_tying.runs import resolve
from layer_tying.runs.config import TrainConfig, read_config
from layer_tying.runs.evaluate import evaluate_run
from layer_tying.runs.folder import RunFolder
from layer_tying.runs.optimization import learning_rate
from layer_tying.runs.train import train
from layer_tying.runs.trainer import Trainer
from layer_tying.saving.checkpoint import newest_checkpoint

# Of a summary, what two equal runs need not have in common.
NOT_REPEATABLE = {
    *("seconds", "seconds_per_step", "decision_overhead", "peak_memory_bytes"),
    *("dataset", "config_hash"),  # the text lies in another folder
}
SUMMARY_KEYS = {
    *("policy", "family", "dataset", "seed", "steps", "tokens"),
    *("validation_perplexity", "test_perplexity", "bits_per_byte", "num_layers"),
    *("independent_layers_mean", "independent_layers_end"),
    *("trainable_parameters_mean", "trainable_parameters_end", "conventional_parameters"),
    *("model_state_bytes_mean", "model_state_bytes_peak", "peak_memory_bytes"),
    *("seconds_per_step", "decision_overhead", "config_hash", "versions", "hardware"),
}


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """What a run leaves that nothing happened to: its traces and its summary, made once."""
    done: dict[str, tuple[dict, dict]] = {}

    def run(**changes) -> tuple[dict, dict]:
        key = str(sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("left-alone")
            write_text(folder)
            config = small(folder, **changes)
            summary = train(config)
            done[key] = traces_of(config.folder), summary
        return done[key]

    return run


# Going on exactly

MIDDLE = ("step", 17)  # five steps after a checkpoint
CASES = {
    "none-gpt2": ({"policy": "none"}, MIDDLE),
    "random-gpt2": ({"policy": "random"}, MIDDLE),
    "dqn-gpt2": ({}, MIDDLE),
    "dqn-bert": ({"family": "bert"}, MIDDLE),
    "none-bert": ({"family": "bert", "policy": "none"}, MIDDLE),
    "random-bert": ({"family": "bert", "policy": "random"}, MIDDLE),
    "dropout": ({"dropout": 0.3}, MIDDLE),
    "owner-fresh-llama": (
        {"family": "llama", "gradient": "owner", "optimizer_state": "fresh"},
        MIDDLE,
    ),
    "from-none": ({"initial": "none", "accumulate": 2, "checkpointing": True}, MIDDLE),
    "steps-out-of-step": ({"save_every": 5, "log_every": 7, "eval_every": 9, "every": 3}, MIDDLE),
    "best-is-long-ago": ({"policy": "none", "lr": 3.0, "warmup": 0.9, "clip": 1e6}, MIDDLE),
    "between-decision-and-its-line": ({}, ("decided", 4)),
    "before-the-first-checkpoint": ({}, ("step", 4)),
    "in-the-first-save": ({}, ("checkpoint", 1)),
    "in-a-later-save": ({}, ("checkpoint", 4)),
    "while-the-best-is-saved": ({}, ("checkpoint", 5)),
    "after-the-last-step": ({}, ("summary", 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_exactly(tmp_path, text, left_alone, name):
    """The killed run and one left alone have every number in common, to the last bit."""
    changes, (event, number) = CASES[name]
    traces, summary = left_alone(**changes)
    config = small(tmp_path, **changes)
    killed_at(config, event, number)
    assert not (config.folder / "summary.json").exists()
    resumed = train(config, resume=True)
    assert traces_of(config.folder) == traces
    assert {key: resumed[key] for key in resumed if key not in NOT_REPEATABLE} == {
        key: summary[key] for key in summary if key not in NOT_REPEATABLE
    }


def test_what_is_compared_is_not_empty(tmp_path, text):
    config = small(tmp_path)
    train(config)
    traces = traces_of(config.folder)
    assert [line["step"] for line in traces["metrics"]] == [4, 8, 12, 16, 20, 24]
    assert [line["step"] for line in traces["decisions"]] == [0, 1, 6, 11, 16, 21]
    assert traces["checkpoints"] == ["best", "step-00000018", "step-00000024"]
    assert len(traces["step-00000024/model.safetensors"]) > 10
    assert any("exp_avg_sq" in name for name in traces["step-00000024/training.safetensors"])
    assert train(config.replace(exp="other-seed", seed=1))
    assert traces_of(tmp_path / "runs/other-seed") != traces


def test_a_run_killed_twice_goes_on_exactly(tmp_path, text, left_alone):
    config = small(tmp_path)
    killed_at(config, "step", 9)
    killed_at(config, "step", 9, resume=True)
    train(config, resume=True)
    assert traces_of(config.folder) == left_alone()[0]


@pytest.mark.parametrize(
    ("instant", "stopped_at"),
    [
        (("step", 10, signal.SIGINT), 10),
        (("reward", 1, signal.SIGTERM), 1),
        (("validate", 1, signal.SIGINT), 8),
        (("save", 1, signal.SIGINT), 7),
    ],
)
def test_a_request_to_stop_saves_and_the_run_goes_on_exactly(
    tmp_path, text, left_alone, instant, stopped_at
):
    config = small(tmp_path)
    assert in_process(train_until, config, *instant) == 130
    assert not (config.folder / "summary.json").exists()
    saved, problems = newest_checkpoint(config.folder / "checkpoints")
    assert (saved.step, problems) == (stopped_at, [])
    train(config, resume=True)
    assert traces_of(config.folder) == left_alone()[0]


def test_a_request_to_stop_that_comes_with_the_last_step_ends_the_run(tmp_path, text):
    config = small(tmp_path)
    assert in_process(train_until, config, "step", 24, signal.SIGINT) == 0
    assert json.loads((config.folder / "summary.json").read_text())["steps"] == 24


def test_a_torn_checkpoint_is_passed_over(tmp_path, text, left_alone, capsys):
    expected, _ = left_alone()
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    weights = config.folder / "checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    train(config, resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "layer-tying:" in line]
    assert len(said) == 1
    assert "step-00000012 is torn: model.safetensors" in said[0]
    assert "going on from step-00000006" in said[0]
    assert traces_of(config.folder) == expected


def test_without_a_whole_checkpoint_a_run_does_not_go_on(tmp_path, text):
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    for file in (config.folder / "checkpoints").glob("step-*/state.json"):
        file.unlink()
    with pytest.raises(InputError, match=r"no whole checkpoint.*state\.json is missing"):
        train(config, resume=True)


def test_a_torn_best_checkpoint_is_made_anew(tmp_path, text):
    """From the validations that are still to come, though none is as good as what was lost."""
    config = small(tmp_path, policy="none", lr=3.0, warmup=0.9, clip=1e6)
    killed_at(config, *MIDDLE)
    (config.folder / "checkpoints/best/model.safetensors").write_bytes(b"")
    assert train(config, resume=True)["best_step"] in (16, 24)


def test_resuming_a_finished_run_changes_nothing(tmp_path, text):
    config = small(tmp_path)
    first = train(config)
    before = traces_of(config.folder)
    again = train(config, resume=True)
    assert traces_of(config.folder) == before
    assert again["test_perplexity"] == first["test_perplexity"]
    assert again["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    "changes", [{"lr": 0.1}, {"policy": "none"}, {"max_steps": 30}, {"seed": 5}, {"nlayers": 4}]
)
def test_a_run_does_not_go_on_as_another(tmp_path, text, changes):
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    before = traces_of(config.folder)
    name = next(iter(changes))
    with pytest.raises(InputError, match=f"another configuration: {name} is ") as caught:
        train(config.replace(**changes), resume=True)
    assert "\n" not in str(caught.value)
    assert traces_of(config.folder) == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path, text):
    config, other = small(tmp_path), small(tmp_path, exp="other", lr=0.1)
    killed_at(config, *MIDDLE)
    killed_at(other, *MIDDLE)
    for folder in (config.folder / "checkpoints").glob("step-*"):
        for file in folder.iterdir():
            file.write_bytes((other.folder / "checkpoints" / folder.name / file.name).read_bytes())
    with pytest.raises(InputError, match=r"step-00000012.*lr is "):
        train(config, resume=True)


def test_a_run_does_not_go_on_with_other_data(tmp_path, text):
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    text.write_text(text.read_text().replace("cat", "cow"))
    with pytest.raises(InputError, match="the data are not those it trained on"):
        train(config, resume=True)
    with pytest.raises(InputError, match="the data are not those it trained on"):
        evaluate_run(config.folder, "test")


def test_the_same_data_may_lie_elsewhere(tmp_path, text):
    config = small(tmp_path, policy="none", max_steps=4)
    summary = train(config)
    moved = text.rename(text.with_name("renamed.txt"))
    elsewhere = config.replace(dataset=str(moved))
    (config.folder / "config.json").write_text(elsewhere.to_json())
    scores = evaluate_run(config.folder, "test")
    assert scores["perplexity"] == pytest.approx(summary["test_perplexity"])


def test_a_run_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    images = load_images("digits")
    config = small(tmp_path, family="vit", dataset="digits", policy="none", max_steps=4)
    train(config)
    other = replace(images, x_test=255 - images.x_test)
    monkeypatch.setattr("layer_tying.tasks.base.load_images", lambda *_: other)
    with pytest.raises(InputError, match="the data are not those it trained on"):
        evaluate_run(config.folder, "test")


def test_a_run_may_be_moved_and_report_differently(tmp_path, text, left_alone):
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    moved = config.replace(exp="moved", log_every=100, save_every=100)
    config.folder.rename(moved.folder)
    train(moved, resume=True)
    final = "step-00000024/model.safetensors"
    assert traces_of(moved.folder)[final] == left_alone()[0][final]


def test_a_run_goes_on_in_the_precision_that_was_settled(tmp_path, text, monkeypatch):
    config = small(tmp_path, precision="auto")
    monkeypatch.setattr(resolve, "usual_precision", lambda _: "bf16")
    crashed_at(config, 9)
    monkeypatch.setattr(resolve, "usual_precision", lambda _: "fp32")
    train(config, resume=True)
    assert read_config(config.folder).optimization.precision == "bf16"


# The run folder


def test_a_run_is_not_overwritten_unless_told(tmp_path, text):
    config = small(tmp_path)
    train(config)
    before = traces_of(config.folder)
    with pytest.raises(InputError, match=r"holds a run: .*--resume.*--overwrite"):
        train(config)
    assert traces_of(config.folder) == before
    (config.folder / "notes.txt").write_text("mine")
    train(config.replace(exp="run/inner"))
    train(config.replace(max_steps=8), overwrite=True)
    assert lines_of(config.folder / "metrics.jsonl")[-1]["step"] == 8
    assert (config.folder / "checkpoints/step-00000008").exists()
    assert not (config.folder / "checkpoints/step-00000024").exists()
    assert (config.folder / "notes.txt").read_text() == "mine"
    assert (config.folder / "inner/summary.json").exists(), "another run, in a folder inside"


def test_two_processes_do_not_train_in_one_folder(tmp_path, text):
    config = small(tmp_path)
    log = RunFolder(config.folder)
    log.hold()
    assert in_process(refused, config) == 0
    log.release()
    train(config)


def refused(config: TrainConfig) -> None:
    try:
        train(config)
    except InputError as error:
        sys.exit("another run is in progress" not in str(error))
    sys.exit(2)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, text):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*/runs/run: Not a directory"):
        train(small(tmp_path))


def test_refused_data_leave_no_folder(tmp_path, text):
    with pytest.raises(InputError, match="shorter than one sequence"):
        train(small(tmp_path, bptt=20_000))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("torn", [b'{"step": 16, "tok\x00\xff', b"1", b"{}", b"null\n"])
def test_torn_lines_are_rewritten_on_resume(tmp_path, text, left_alone, torn):
    config = small(tmp_path)
    killed_at(config, *MIDDLE)
    for name in ("metrics.jsonl", "tying.jsonl"):
        with (config.folder / name).open("ab") as stream:
            stream.write(torn)
    train(config, resume=True)
    assert traces_of(config.folder) == left_alone()[0]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="mlflow is not installed"):
        train(small(tmp_path, log_with="mlflow"))


def test_a_tracker_gets_what_is_logged(tmp_path, text):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small(tmp_path, log_with="tensorboard")
    train(config)
    events = reader.EventAccumulator(str(next(config.folder.rglob("events.out.*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 16, 20, 24]
    lines = lines_of(config.folder / "metrics.jsonl")
    assert events.Scalars("loss")[-1].value == pytest.approx(lines[-1]["loss"])


# What is trained


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, text, family):
    """The stream hands out the same examples in the same order, four at a time or eight."""
    changes = {"family": family, "objective": "causal", "policy": "none", "clip": 0.05}
    two = trainer_of(small(tmp_path, batch_size=4, accumulate=2, **changes))
    one = trainer_of(small(tmp_path, batch_size=8, accumulate=1, **changes))
    for step in range(5):
        losses = [float(trainer.train_step()) for trainer in (two, one)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), step
    assert two.tally.tokens == one.tally.tokens == 5 * 8 * 16
    for mine, other in zip(two.model.parameters(), one.model.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.numerics
def test_a_step_is_one_of_adamw_on_the_clipped_gradient(tmp_path, text):
    config = small(tmp_path, policy="none", clip=0.01, warmup=0.5, weight_decay=0.3, lr=1e-3)
    trainer, other = trainer_of(config), trainer_of(config)
    model = other.model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    for step in range(3):
        trainer.train_step()
        inputs, labels = map(torch.from_numpy, next(other.task.batches))
        logits = model(input_ids=inputs).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels.flatten()).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert norm > 0.01
        for p in model.parameters():
            p.grad *= 0.01 / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 12
        optimizer.step()
        optimizer.zero_grad()
    for mine, its in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


def test_the_learning_rate_rises_and_falls(tmp_path):
    config = small(tmp_path, lr=0.8, warmup=0.1, final_lr=0.25, max_steps=40, every=5)
    rates = [learning_rate(config.optimization, step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert rates[22] == pytest.approx(0.8 * (1 + 0.25) / 2)  # half way down
    expected = 0.8 * (0.25 + 0.75 * (1 + math.cos(math.pi * 9 / 36)) / 2)
    assert rates[13] == pytest.approx(expected)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.2 < rates[39] < 0.21
    constant = config.replace(warmup=0.0, final_lr=1.0)
    assert {learning_rate(constant.optimization, step, 40) for step in range(40)} == {0.8}


def test_decisions_come_after_the_first_step_and_every_kth_after_it(tmp_path, text):
    config = small(tmp_path, every=7)
    train(config)
    first, *decisions = lines_of(config.folder / "tying.jsonl")
    assert first == {"step": 0, "action": None, "state": [0] * 3, "reward": None, "epsilon": None}
    assert [line["step"] for line in decisions] == [1, 8, 15, 22]
    for index, line in enumerate(decisions):
        assert line["epsilon"] == pytest.approx(0.95**index)
        assert tuple(line["state"]) == Tying.from_action(line["action"]).owners
        assert -8 < line["reward"] < -3  # nats a token
        assert [len(row) for row in line["q"]] == [1, 2, 3]
    counts = {line["step"]: line["independent_layers"] for line in lines_of_metrics(config)}
    states = {line["step"]: len(set(line["state"])) for line in decisions}
    for step, count in counts.items():
        assert count == states[max(s for s in states if s <= step)]


def lines_of_metrics(config: TrainConfig) -> list[dict]:
    return lines_of(config.folder / "metrics.jsonl")


def test_a_static_pattern_decides_nothing(tmp_path, text):
    config = small(tmp_path, policy="cycle", groups=2)
    summary = train(config)
    (only,) = lines_of(config.folder / "tying.jsonl")
    assert only["state"] == [0, 1, 0]
    assert summary["independent_layers_mean"] == summary["independent_layers_end"] == 2
    assert summary["decision_overhead"] == 0


def test_the_reward_is_minus_the_perplexity_of_a_fresh_batch_without_dropout(tmp_path, text):
    config = small(tmp_path, dropout=0.5)
    trainer = trainer_of(config)
    literal = trainer_of(config.replace(reward="perplexity"))
    batch = next(trainer_of(config).task.reward_batches)
    trainer.model.eval()
    with torch.no_grad():
        expected = float(trainer.task.loss(trainer.model, batch))
    trainer.model.train()
    assert trainer.reward() == pytest.approx(-expected, abs=1e-6)
    assert literal.reward() == pytest.approx(-math.exp(expected), rel=1e-5)
    assert trainer.model.training
    assert all(p.grad is None for p in trainer.model.parameters())


def test_storage_is_what_the_tying_says_after_every_step(tmp_path, text):
    trainer = trainer_of(small(tmp_path, policy="random", every=1, max_steps=20))
    trainer.folder.checkpoints.mkdir(parents=True)
    seen = set()
    for _ in range(20):
        trainer.train_step()
        trainer.decide()
        trainer.layers.verify()
        tying = TiedLayers(trainer.model).tying  # read off the storage
        assert tying == trainer.layers.tying
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters()}
        assert {id(p) for p in trainer.optimizer.state} <= {id(p) for p in held}
        seen.add(tying)
    assert len(seen) > 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_recomputing_activations_changes_no_number(tmp_path, text, family):
    config = small(tmp_path, family=family, gradient="owner", max_steps=8, dropout=0.1)
    train(config)
    train(config.replace(exp="recomputed", checkpointing=True))
    found, expected = (traces_of(tmp_path / "runs" / name) for name in ("recomputed", "run"))
    assert len(found["metrics"]) == 2
    for one, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert found["decisions"][0] == expected["decisions"][0]


def test_bf16_trains_and_keeps_weights_in_single_precision(tmp_path, text):
    single = train(small(tmp_path))
    half = train(small(tmp_path, exp="half", precision="bf16"))
    assert half["validation_perplexity"] != single["validation_perplexity"]
    assert half["validation_loss"] == pytest.approx(single["validation_loss"], abs=0.2)
    weights = newest_checkpoint(tmp_path / "runs/half/checkpoints")[0]
    model = trainer_of(small(tmp_path)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert weights.step == 24
    for split in ("validation", "test"):
        scores = evaluate_run(tmp_path / "runs/half", split)
        assert scores["perplexity"] == close_to(half[f"{split}_perplexity"])


def test_images(tmp_path):
    pytest.importorskip("sklearn")
    config = small(tmp_path, family="vit", dataset="digits", lr=0.003, batch_size=32)
    summary = train(config)
    scores = evaluate_run(config.folder, "test")
    assert summary["accuracy"] == summary["test_accuracy"] == scores["accuracy"]
    assert summary["tokens"] == 24 * 32
    assert 0 < lines_of_metrics(config)[-1]["validation_accuracy"] <= 1
    assert "bits_per_byte" not in summary
    killed = config.replace(exp="killed")
    killed_at(killed, *MIDDLE)
    train(killed, resume=True)
    assert traces_of(killed.folder) == traces_of(config.folder)


@pytest.mark.slow
def test_compiled_layers_train_alike(tmp_path, text):
    expected = train(small(tmp_path))
    found = train(small(tmp_path, exp="compiled", compile=True))
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-3)
    assert found["owners_end"] == expected["owners_end"]


# What is reported


def test_the_summary(tmp_path, text):
    config = small(tmp_path, policy="random", max_steps=24, eval_batches=None)
    summary = train(config)
    assert json.loads((config.folder / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY_KEYS
    metrics = lines_of_metrics(config)
    states = [line["state"] for line in lines_of(config.folder / "tying.jsonl")]

    # Independent layers at every step, from the decisions: the one after step s counts from s + 1,
    # but it is taken before step s is counted as done.
    independent = [len(set(states[(step - 1 + 4) // 5])) for step in range(1, 25)]
    model = trainer_of(config.replace(policy="none")).model
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert summary["conventional_parameters"] == total
    assert summary["trainable_parameters_end"] == total - (3 - len(set(states[-1]))) * block
    assert summary["independent_layers_end"] == len(set(states[-1]))
    assert metrics[-1]["independent_layers"] == len(set(states[-1]))
    assert summary["independent_layers_mean"] == pytest.approx(sum(independent) / 24)
    assert summary["trainable_parameters_mean"] == pytest.approx(
        total - block * (3 - sum(independent) / 24)
    )
    assert summary["tokens"] == 24 * 4 * 16
    assert summary["num_layers"] == 3
    assert summary["steps"] == summary["best_step"] == 24
    assert (summary["policy"], summary["family"], summary["seed"]) == ("random", "gpt2", 0)

    # Single precision: a weight, its gradient and two moments are four times four bytes.
    mean, peak = summary["model_state_bytes_mean"], summary["model_state_bytes_peak"]
    assert mean == pytest.approx(16 * summary["trainable_parameters_mean"], rel=0.01)
    assert mean <= peak <= 16.1 * total
    assert peak <= summary["peak_memory_bytes"]
    assert 0 < summary["seconds_per_step"] < 1
    assert 0 < summary["decision_overhead"] < 1

    assert summary["validation_perplexity"] == pytest.approx(math.exp(summary["validation_loss"]))
    assert summary["validation_perplexity"] == metrics[-1]["validation_perplexity"]
    # Of bytes, a token is a byte.
    assert summary["bits_per_byte"] == pytest.approx(summary["test_loss"] / math.log(2))
    assert summary["versions"]["torch"] == torch.__version__
    assert "device" in summary["hardware"]
    other = trainer_of(config.replace(lr=0.5))
    assert len(summary["config_hash"]) >= 16
    assert other.config.digest != summary["config_hash"]


@pytest.mark.numerics
def test_evaluation_agrees_with_the_summary(tmp_path, text):
    config = small(tmp_path, family="bert")
    summary = train(config)
    for split in ("validation", "test"):
        scores = evaluate_run(config.folder, split)
        assert scores["perplexity"] == close_to(summary[f"{split}_perplexity"])


@pytest.mark.numerics
def test_the_best_weights_are_scored_not_the_last(tmp_path, text):
    """A learning rate that spoils what was learned: the first validation is the best."""
    config = small(tmp_path, policy="none", lr=3.0, warmup=0.9, eval_every=1, clip=1e6)
    summary = train(config)
    metrics = lines_of_metrics(config)
    perplexities = {line["step"]: line["validation_perplexity"] for line in metrics}
    best = min(perplexities, key=lambda step: perplexities[step])
    assert best < 24
    assert summary["best_step"] == best
    assert summary["validation_perplexity"] < perplexities[24]
    assert evaluate_run(config.folder, "test")["perplexity"] == close_to(summary["test_perplexity"])


def test_a_run_that_diverges_still_ends(tmp_path, text, monkeypatch):
    """From the second step on every loss is not a number: rewards are events, scores are null."""
    config = small(tmp_path)
    step = Trainer.train_step

    def spoiled(self):
        loss = step(self)
        with torch.no_grad():
            next(self.model.parameters()).fill_(math.nan)
        return loss

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    train(config)
    decisions = lines_of(config.folder / "tying.jsonl")[1:]
    assert all(line["reward"] is None for line in decisions)
    assert all("the reward was" in line["event"] for line in decisions)
    assert decisions[-1]["epsilon"] == pytest.approx(0.95**4), "exploration still decays"
    assert lines_of_metrics(config)[-1]["loss"] is None
    assert lines_of_metrics(config)[-1]["validation_perplexity"] is None
    written = (config.folder / "summary.json").read_text()
    assert json.loads(written)["test_perplexity"] is None
    assert "NaN" not in written
    assert "Infinity" not in written


def test_k_is_compared_with_the_steps_of_the_epochs(tmp_path, text):
    config = small(tmp_path, max_steps=None, epochs=1, every=200, bptt=32)
    with pytest.raises(InputError, match="every 200 is more than the 49 steps"):
        train(config)
    train(config.replace(policy="none", eval_batches=1))


def test_epochs_are_passes_over_the_text(tmp_path, text):
    config = small(tmp_path, max_steps=None, epochs=2, accumulate=3, policy="none")
    trainer = trainer_of(config)
    num_examples = (len(trainer.task.corpus.train.tokens) - 1) // 16
    assert trainer.num_steps == 2 * math.ceil(num_examples / 4) // 3
