"""The callback of transformers' Trainer: ties, saves, and goes on exactly where it stopped."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import FromLosses, Plainest, gpt2, llama, tokens
from tiny_trainer import (
    STEPS,
    Sequences,
    callback,
    history,
    moments,
    trainer,
    weights,
)
from tolerance import assert_close
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from layer_tying import DynamicTying, InputError, RandomPolicy, TiedLayers, Tying
from layer_tying.integrations.rewards import batch_reward
from layer_tying.integrations.trainer import FOLDER, DynamicTyingCallback
from layer_tying.saving.checkpoint import read_checkpoint


class Stream(IterableDataset):
    def __iter__(self):
        return iter([Sequences()[i] for i in range(32)] * 4)


def assert_equal(one, other):
    """To the last bit: of weights and optimizer state, stored or resumed."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


CASES = {
    "agent": ({}, {}),
    "evaluations": ({"reward": "eval_loss"}, {"eval_strategy": "steps"}),
    "random, pretrained": ({"policy": "random", "initial": "none"}, {"make": llama}),
    "budget": ({"max_independent": 2, "gradient": "owner"}, {"optim": "adafactor"}),
    "accumulation": ({}, {"optim": "sgd", "gradient_accumulation_steps": 2, "bf16": True}),
    "not transformers": ({}, {"make": Plainest}),
    "losses": ({}, {"make": llama, "gradient_accumulation_steps": 2}),
    "mixture": ({"policy": "mixture"}, {"warmup_steps": 3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_interrupted_and_resumed_equals_never_interrupted(name, tmp_path):
    options, changes = CASES[name]

    def fresh() -> DynamicTyingCallback:
        if name == "losses":
            return callback(policy=FromLosses(seed=3))
        return callback(**options, seed=3)

    whole = trainer(tmp_path / "whole", fresh(), **changes)
    whole.train()
    broken = trainer(tmp_path / "broken", fresh(), stop_at=8, **changes)
    broken.train()  # its last checkpoint is of step 5
    resumed = trainer(tmp_path / "broken", fresh(), model_seed=1, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(whole)
    assert_equal(weights(resumed), weights(whole))
    assert_equal(moments(resumed), moments(whole))
    owners = [entry["tying"] for entry in history(whole) if entry["tying"]]
    if name == "mixture":
        assert owners == [[0, 1, 0, 1, 0, 1]], "it decides nothing"
    elif name == "losses":
        assert len(owners) == 1 + STEPS // 2 // 2, "half of the run is settled"
    else:
        assert len(owners) == STEPS // 2 + 1 and len({tuple(o) for o in owners}) > 3
    kind = "tying_previous_reward" if name == "losses" else "tying_reward"
    rewards = [entry for entry in history(whole) if entry[kind] is not None]
    assert bool(rewards) == (name not in ("random, pretrained", "mixture"))


def test_the_coefficients_follow_the_schedule_at_their_own_rate(tmp_path):
    rates = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **at_hand):
            first, *_, last = at_hand["optimizer"].param_groups
            rates.append((first["lr"], last["lr"], last["weight_decay"]))

    run = trainer(tmp_path, callback(policy="mixture"), warmup_steps=3, weight_decay=0.1)
    run.add_callback(Record())
    run.train()
    assert len({first for first, *_ in rates}) > STEPS // 2
    assert [last for _, last, _ in rates] == pytest.approx([5 * first for first, *_ in rates])
    assert {decay for *_, decay in rates} == {0.0}


def test_a_scheduler_without_room_for_the_coefficients_is_refused(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    run = trainer(tmp_path, callback(policy="mixture"), **plateau)
    with pytest.raises(InputError, match="ReduceLROnPlateau has no place"):
        run.train()


@pytest.mark.numerics
@pytest.mark.parametrize(
    "options",
    [{"policy": RandomPolicy(0)}, {"policy": "mixture"}, {"residual_scaling": 1.0}],
    ids=["tied", "mixed", "scaled"],
)
def test_a_checkpoint_is_a_plain_model_for_anyone_else(tmp_path, options):
    if "residual_scaling" in options:
        options = options | {"residual_outputs": ["attn.c_proj", "mlp.c_proj"]}
    run = trainer(tmp_path, callback(**options), max_steps=10)
    run.train()
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "checkpoint-10", output_loading_info=True
    )
    assert not any(info.values())
    assert len(TiedLayers(run.model).tying.groups) < 6
    assert_close(loaded(tokens()).logits, run.model.eval()(tokens()).logits)
    run.save_model(str(tmp_path / "saved"))
    one = load_file(tmp_path / "saved" / "model.safetensors")
    other = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert_equal(one, other)


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


SCALED = {"residual_scaling": 1.0, "residual_outputs": ["attn.c_proj", "mlp.c_proj"]}


@pytest.mark.parametrize("options", [{"policy": "mixture"}, SCALED], ids=["mixed", "scaled"])
def test_what_layers_compute_with_is_not_read_back_as_what_they_store(tmp_path, options):
    run = trainer(tmp_path, callback(**options), max_steps=2)
    run.train()
    state, before = run.model.state_dict(), copied(weights(run))
    with pytest.raises(InputError, match="not what they store"):
        run.model.load_state_dict(state, strict=False)
    assert_equal(weights(run), before)
    assert not any(gpt2().load_state_dict(state))


def test_a_state_dict_of_tied_layers_is_read_back(tmp_path):
    run = trainer(tmp_path, callback(policy=RandomPolicy(0)), max_steps=2)
    run.train()
    before = copied(weights(run))
    run.model.load_state_dict(run.model.state_dict())
    assert_equal(weights(run), before)


def test_our_part_of_a_checkpoint_holds_each_weight_once(tmp_path):
    run = trainer(tmp_path, callback(policy=RandomPolicy(0)), max_steps=5)
    run.train()
    folder = tmp_path / "checkpoint-5" / FOLDER
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ""}
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == dict(run.model.named_parameters()).keys()
    state = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert state["state"] == {}
    assert run.optimizer.state_dict()["state"], "that is how it is saved, not how it is"


@pytest.mark.numerics
def test_the_best_weights_come_back_with_their_mixtures(tmp_path):
    seen = {}

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **at_hand):
            seen[state.global_step] = at_hand["model"].eval()(tokens()).logits.detach()

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 3}
    highest = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(tmp_path, callback(policy="mixture"), max_steps=9, **best, **highest)
    run.add_callback(Record())
    run.train()
    assert run.state.best_global_step == 3
    assert_close(run.model.eval()(tokens()).logits, seen[run.state.best_global_step])


@pytest.mark.numerics
def test_the_best_weights_come_back_with_their_tying(tmp_path):
    seen = {}

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **at_hand):
            model = at_hand["model"].eval()
            seen[state.global_step] = (TiedLayers(model).tying, model(tokens()).logits.detach())

    ours = callback(policy=RandomPolicy(1), every=1)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, ours, max_steps=9, lr_scheduler_type="constant", **best)
    run.args.learning_rate = 0.3  # it gets worse, so that the best is not the last
    run.add_callback(Record())
    run.train()
    step = run.state.best_global_step
    tying, logits = seen[step]
    assert step < 9 and tying != seen[9][0]
    assert ours.dynamic.tying == TiedLayers(run.model).tying == tying
    assert_close(run.model.eval()(tokens()).logits, logits)


def test_a_model_that_comes_tied_is_resumed_too(tmp_path):
    def make():
        model = gpt2()
        TiedLayers(model).apply(Tying((0, 0, 0, 3, 3, 3)))
        return model

    def fresh():
        return callback(initial="keep", policy=RandomPolicy(0), every=3)

    whole = trainer(tmp_path / "whole", fresh(), make=make)
    whole.train()
    trainer(tmp_path / "broken", fresh(), make=make, stop_at=6).train()
    resumed = trainer(tmp_path / "broken", fresh(), make=make, model_seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert history(whole)[0]["tying"] == [0, 0, 0, 3, 3, 3]
    assert history(resumed) == history(whole)
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("policy", ["random", "mixture"])
def test_training_once_more_goes_on_from_what_there_is(tmp_path, policy):
    ours = callback(policy=policy)
    run = trainer(tmp_path, ours)
    run.train()
    tying, before = ours.dynamic.tying, {n: w.clone() for n, w in weights(run).items()}
    assert tying.num_independent > 1
    run.args.learning_rate = 0.0
    run.args.max_steps = 1
    run.train()
    first = next(e["tying"] for e in run.state.log_history if "tying" in e)
    assert first == list(tying.owners), "its layers are not tied down once more"
    assert before.keys() == weights(run).keys()


def test_a_pretrained_model_is_not_changed_before_the_first_decision(tmp_path):
    ours = callback(initial="none", every=100)
    run = trainer(tmp_path, ours, make=gpt2, max_steps=1)
    before = run.model.eval()(tokens()).logits

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **at_hand):
            assert torch.equal(at_hand["model"].eval()(tokens()).logits, before)
            assert ours.dynamic.tying == Tying.independent(6)

    run.add_callback(Look())
    run.train()


def test_the_reward_is_a_batchs_loss_and_draws_no_random_number_of_the_trainings(
    tmp_path, monkeypatch
):
    ours = callback()
    run = trainer(tmp_path, ours, make=gpt2, max_steps=1)
    run.train()
    loader = run.get_train_dataloader()
    collate = loader.collate_fn
    loader.collate_fn = lambda examples: (random.random(), np.random.rand(), collate(examples))[-1]
    state, model = torch.get_rng_state(), run.model.eval()
    others = random.getstate(), str(np.random.get_state())
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's too"))
    rewards = [batch_reward(run.args, run.state, model, loader) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), str(np.random.get_state())) == others
    assert rewards[0] == rewards[1] and not model.training
    run.state.global_step = 2
    assert batch_reward(run.args, run.state, model, loader) != rewards[0], "another batch"
    losses = torch.stack(
        [
            model(s["input_ids"][None], labels=s["labels"][None]).loss
            for s in (Sequences()[i] for i in range(32))
        ]
    )
    assert losses.min() <= -rewards[0] <= losses.max()


def test_later_rewards_are_learned_from_once(tmp_path):
    ours = callback(reward="eval_loss", every=4)
    run = trainer(tmp_path, ours, eval_strategy="steps", eval_steps=2, max_steps=9)
    run.train()
    rewards = [(e["step"], e["tying_reward"]) for e in history(run) if e["tying_reward"]]
    losses = {e["step"]: e["eval_loss"] for e in history(run) if e["eval_loss"]}
    assert rewards == [(step, -losses[step]) for step in (2, 6, 9)], "decisions: 1, 5 and 9"
    assert set(losses) > {2, 6, 9}


# What cannot be


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({}, {"train_dataset": Stream()}, "take reward='eval_loss'"),
        ({"reward": "eval_loss"}, {}, r"set args\.eval_strategy"),
        ({"max_independent": 2, "initial": "none"}, {}, "over the budget of 2"),
        ({"layers": "nowhere"}, {}, "no module 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused_when_training_starts(options, changes, says, tmp_path):
    with pytest.raises(InputError, match=says):
        trainer(tmp_path, callback(**options), **changes).train()


def test_a_stream_is_fine_with_evaluations(tmp_path):
    ours = callback(reward="eval_loss")
    changes = {"train_dataset": Stream(), "eval_strategy": "steps", "max_steps": 6}
    run = trainer(tmp_path, ours, **changes)
    run.train()
    assert any(entry["tying_reward"] for entry in history(run))


@pytest.mark.parametrize(
    ("name", "says"), [("n_gpu", "2 GPUs in one process"), ("world_size", "callbacks=")]
)
def test_what_wraps_the_model_unasked_is_refused(tmp_path, monkeypatch, name, says):
    run = trainer(tmp_path, callback())
    monkeypatch.setattr(TrainingArguments, name, 2)
    with pytest.raises(InputError, match=says):
        callback().on_train_begin(
            run.args, run.state, run.control, train_dataloader=None, model=run.model, optimizer=None
        )


def test_an_unknown_reward_is_refused():
    with pytest.raises(InputError, match="'batch' or 'eval_loss', got 'loss'"):
        DynamicTyingCallback(reward="loss")


def test_a_checkpoint_without_our_part_or_of_another_run_is_refused(tmp_path):
    trainer(tmp_path / "a", callback(), max_steps=5).train()
    trainer(tmp_path / "b", callback(), max_steps=5).train()
    shutil.copytree(tmp_path / "a" / "checkpoint-5", tmp_path / "moved")
    elsewhere = trainer(tmp_path / "b", callback())
    with pytest.raises(InputError, match=r"name the checkpoint's folder in args\.resume_from"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "moved"))
    named = trainer(tmp_path / "b", callback(), resume_from_checkpoint=str(tmp_path / "moved"))
    named.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert named.state.global_step == STEPS
    shutil.rmtree(tmp_path / "a" / "checkpoint-5" / FOLDER)
    with pytest.raises(InputError, match="resumed at step 5 has tied layers"):
        trainer(tmp_path / "a", callback()).train(resume_from_checkpoint=True)


def test_a_conventional_run_is_tied_from_where_it_is_resumed(tmp_path):
    torch.manual_seed(0)
    data = {"train_dataset": Sequences(), "eval_dataset": Sequences()}
    args = trainer(tmp_path, callback(), max_steps=5).args
    Trainer(gpt2(), args, **data).train()
    ours = callback(initial="none")
    run = trainer(tmp_path, ours, make=gpt2)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    assert isinstance(ours.dynamic, DynamicTying)


def test_the_best_of_a_conventional_run_does_not_count_once_it_is_tied(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 3}
    data = {"train_dataset": Sequences(), "eval_dataset": Sequences()}
    args = trainer(tmp_path, callback(), max_steps=6, **best).args
    args.metric_for_best_model, args.greater_is_better = "eval_loss", True  # the first is the best
    Trainer(gpt2(), args, **data).train()
    ours = callback(policy=RandomPolicy(0), initial="none")
    run = trainer(tmp_path, ours, make=gpt2, **best, metric_for_best_model="eval_loss")
    run.args.greater_is_better = True
    run.train(resume_from_checkpoint=True)
    assert run.state.best_global_step > 6
    assert TiedLayers(run.model).tying == ours.dynamic.tying


def test_a_reward_from_batches_needs_the_models_loss(tmp_path):
    made = trainer(tmp_path, callback())
    data = [{"input_ids": Sequences()[number]["input_ids"]} for number in range(32)]
    with pytest.raises(InputError, match="take reward='eval_loss'"):
        batch_reward(made.args, made.state, made.model, made.get_test_dataloader(data))


@pytest.mark.parametrize("policy", [FromLosses(), "random", "mixture"])
def test_evaluations_are_no_reward_for_policies_that_do_not_learn_from_them(policy):
    with pytest.raises(InputError, match="reward='eval_loss' is for policies that learn"):
        DynamicTyingCallback(policy, reward="eval_loss")


def test_an_evaluation_after_training_is_not_a_reward(tmp_path):
    run = trainer(tmp_path, callback(reward="eval_loss", every=4), eval_strategy="steps")
    run.train()
    before = len(history(run))
    assert "test_loss" in run.evaluate(run.eval_dataset, metric_key_prefix="test")
    assert len([e for e in history(run)[before:] if e["tying_reward"] is not None]) == 0


def test_of_several_evaluation_sets_the_first_is_the_reward(tmp_path):
    run = trainer(tmp_path, callback(reward="eval_loss", every=4), eval_strategy="steps")
    run.eval_dataset = {"one": run.eval_dataset, "other": run.eval_dataset}
    run.train()
    losses = {e["step"]: e["eval_one_loss"] for e in run.state.log_history if "eval_one_loss" in e}
    rewards = {e["step"]: e["tying_reward"] for e in history(run) if e["tying_reward"] is not None}
    assert rewards and all(-losses[step] == reward for step, reward in rewards.items())


def test_a_policy_that_learns_from_training_losses_needs_the_models(tmp_path):
    run = trainer(tmp_path, callback(policy=FromLosses()), label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        run.train()


def test_a_model_made_anew_is_tied_anew(tmp_path):
    """As in a search for hyperparameters, which calls model_init for each trial."""

    def make():
        return gpt2()

    ours = callback(policy="mixture")
    torch.manual_seed(0)
    run = Trainer(
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[]),
        model_init=make,
        train_dataset=Sequences(),
        callbacks=[ours],
    )
    found = []
    for _ in range(2):
        run.train()
        layers = ours.dynamic.layers
        found.append(
            (layers.tying, layers.settings, sum(p.numel() for p in run.model.parameters()))
        )
    assert found[0] == found[1]
    assert found[0][0].num_independent == 2 and found[0][1].residual_scaling == 1.0


class AsInASearch(TrainerCallback):
    """The Trainer says so in a search for hyperparameters."""

    def on_train_begin(self, args, state, control, **at_hand):
        state.is_hyper_param_search = True


def test_each_trial_of_a_search_has_its_own_state(tmp_path):
    """Of two trials with checkpoints of equal names, both load their best weights."""
    owners, best = [], []
    for number in range(2):
        ours = callback(policy=RandomPolicy(number), every=2)
        options = {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        run = trainer(tmp_path, ours, load_best_model_at_end=True, **options)
        run.callback_handler.callbacks.insert(0, AsInASearch())
        run._get_output_dir = lambda trial=None, number=number: str(tmp_path / f"run-{number}")
        run.train()
        best.append(Path(run.state.best_model_checkpoint))
        assert best[-1].parent.name == f"run-{number}"
        owners.append(read_checkpoint(best[-1] / FOLDER).tying)
        assert ours.dynamic.tying == owners[-1]
    assert best[0].name == best[1].name and owners[0] != owners[1]
    assert not [*tmp_path.glob("checkpoint-*")]


def test_a_checkpoint_of_training_once_more_is_resumed_elsewhere(tmp_path):
    once = trainer(tmp_path, callback(policy="mixture"), save_steps=4)
    once.train()
    once.args.max_steps = 8
    once.train()
    elsewhere = trainer(tmp_path, callback(policy="mixture"), model_seed=1, max_steps=8)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal(weights(elsewhere), weights(once))
