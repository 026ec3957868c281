"""What a run is: valid values make the round trip, every other is refused in one line."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.errors import InputError
from layer_tying.runs.config import FAMILIES, POLICIES, TrainConfig, first_difference

COUNT = st.integers(1, 10_000)
SHARE = st.floats(0, 1)
POSITIVE = st.floats(0, 1e6, exclude_min=True)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1)
VALID = st.fixed_dictionaries(
    {
        "policy": st.sampled_from([name for name in POLICIES if name not in ("fixed", "recorded")]),
        "family": st.sampled_from(FAMILIES),
        "dataset": NAME,
        "nlayers": st.integers(2, 64),
        "nhead": st.just(4),
        "emsize": st.integers(1, 256).map(lambda n: 8 * n),
        "exp": NAME,
    },
    optional={
        **dict.fromkeys(("bptt", "batch_size", "eval_batch_size", "accumulate", "epochs"), COUNT),
        **dict.fromkeys(("eval_every", "eval_batches", "save_every"), st.none() | COUNT),
        **dict.fromkeys(("dropout", "warmup", "final_lr"), SHARE),
        **dict.fromkeys(("lr", "clip"), POSITIVE),
        "weight_decay": st.floats(0, 1e6),
        "seed": st.integers(0, 2**32 - 1),
        "every": st.integers(1, 100),
        "max_steps": st.integers(100, 10**9),
        "groups": st.none() | COUNT,
        "data_dir": st.none() | NAME,
        "gradient": st.sampled_from(["sum", "owner"]),
        "checkpointing": st.booleans(),
    },
)


@given(VALID)
def test_json_round_trip(values):
    config = TrainConfig(**values)
    text = config.to_json()
    assert TrainConfig.from_json(text) == config
    assert json.loads(text) == asdict(config)
    assert {name: getattr(config, name) for name in values} == values


def test_the_default_is_our_agent_on_data_that_are_always_there():
    config = TrainConfig()
    assert (config.policy, config.dataset, config.initial) == ("bandit", "pydocs", "sandwich")
    assert (config.reward, config.settle, config.shared_init) == ("training-loss", 0.5, "damped")
    assert config.folder == Path("runs/run")


@pytest.mark.parametrize("settings", [{"sharing": "frozen"}, {"task": "rte", "source": "a-run"}])
def test_nothing_is_damped_that_is_not_drawn_and_shared(settings):
    assert TrainConfig(**settings).shared_init == "plain"


def test_weights_are_drawn_as_in_the_run_whose_tyings_are_used():
    assert TrainConfig(policy="recorded", source="a-run").shared_init == ""
    assert TrainConfig(policy="fixed", owners="0,0,0,3").shared_init == "plain"


def test_the_papers_agent_is_the_papers():
    config = TrainConfig(policy="dqn")
    assert (config.initial, config.reward) == ("all", "log-perplexity")
    assert (config.settle, config.shared_init) == (0.0, "plain")


REFUSED = [
    *[({name: 0}, "0") for name in ("nhead", "emsize", "bptt", "batch_size", "eval_batch_size")],
    *[({name: -3}, "-3") for name in ("accumulate", "epochs", "max_steps", "every", "log_every")],
    *[({name: 0}, "0") for name in ("eval_every", "eval_batches", "save_every", "groups")],
    ({"nlayers": 1}, "1"),
    ({"every": 0}, "0"),
    ({"seed": -1}, "-1"),
    ({"seed": 2**64}, str(2**64)),
    ({"weight_decay": -0.5}, "-0.5"),
    ({"weight_decay": math.inf}, "inf"),
    ({"weight_decay": math.nan}, "nan"),
    *[({"lr": value}, str(value)) for value in (0.0, -0.001, math.nan, math.inf)],
    *[({"clip": value}, str(value)) for value in (0.0, -1.0, math.nan)],
    *[({name: 1.5}, "1.5") for name in ("dropout", "warmup", "final_lr")],
    *[({name: -0.1}, "-0.1") for name in ("dropout", "warmup", "final_lr")],
    ({"dropout": math.nan}, "nan"),
    ({"policy": "dqm"}, "'dqm'"),
    ({"family": "gpt3"}, "'gpt3'"),
    ({"objective": "both"}, "'both'"),
    ({"gradient": "mean"}, "'mean'"),
    ({"moments": "half"}, "'half'"),
    ({"initial": "some"}, "'some'"),
    ({"reward": "loss"}, "'loss'"),
    ({"precision": "fp16"}, "'fp16'"),
    ({"log_with": "paper"}, "'paper'"),
    ({"emsize": 30, "nhead": 4}, "30"),
    ({"emsize": 6, "nhead": 2, "family": "llama"}, "6"),
    ({"every": 11, "max_steps": 10}, "11"),
    ({"policy": "fixed"}, "--owners"),
    ({"policy": "none", "owners": "0,0"}, "--owners"),
    ({"owners": "0,0", "policy": "fixed", "source": "runs/a"}, "--from"),
    ({"policy": "recorded"}, "--from"),
    ({"source": "runs/a"}, "bandit"),
    ({"budget_bytes": 0}, "0"),
    ({"sharing": "frozen", "budget_layers": 2}, "a budget"),
    ({"shared_init": "damped", "sharing": "frozen"}, "frozen"),
    ({"shared_init": "damped", "policy": "dqn", "initial": "frozen"}, "frozen"),
    ({"shared_init": "damped", "task": "sst2", "source": "a-run"}, "task"),
    ({"permute": 0}, "bandit"),
    ({"permute": -1, "policy": "recorded", "source": "runs/a"}, "-1"),
    *[({"activate_at": value, "policy": "all"}, str(value)) for value in (-0.1, 1.0, math.nan)],
    *[({"activate_at": 0.5, "policy": policy}, policy) for policy in ("none", "dqn", "random")],
    ({"activate_at": 0.5, "policy": "recorded", "source": "runs/a"}, "recorded"),
    ({"every": 11, "max_steps": 10, "policy": "all", "activate_at": 0.5}, "11"),
    ({"sharing": "some"}, "'some'"),
    ({"task": "wnli", "source": "runs/a"}, "'wnli'"),
    ({"task": "rte"}, "--from"),
    ({"task": "rte", "source": "runs/a", "family": "vit"}, "vit"),
    ({"exp": ""}, "''"),
    ({"exp": "/run"}, "'/run'"),
    ({"exp": "../run"}, "'../run'"),
    ({"exp": "."}, "'.'"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=str)
def test_what_is_out_of_range_is_refused_in_one_line(values, said):
    with pytest.raises(InputError) as caught:
        TrainConfig(**values)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert next(iter(values)) in message.replace("-", "_")


def test_choices_are_listed():
    with pytest.raises(InputError, match=r"cycle-reverse.*got 'dqm'"):
        TrainConfig(policy="dqm")


def test_the_usual_data_set_is_one_that_the_family_reads():
    assert TrainConfig(family="vit").dataset == "digits"
    assert TrainConfig(family="vit", dataset="cifar10").dataset == "cifar10"
    assert TrainConfig(task="rte", policy="none", source="runs/a").dataset == "rte"


def test_a_pattern_decides_nothing_so_that_k_does_not_matter():
    assert TrainConfig(policy="none", every=50, max_steps=10).every == 50


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"color": 1}', '{"nlayers": "many"}', '{"lr": null}'],
)
def test_other_json_is_not_a_configuration(text):
    with pytest.raises(InputError, match="not a run's configuration"):
        TrainConfig.from_json(text)


FREE = {
    **{"data_dir": "elsewhere", "output_dir": "elsewhere", "exp": "elsewhere"},
    **{"log_every": 3, "log_with": "mlflow", "save_every": 3},
}


@pytest.mark.parametrize("each", fields(TrainConfig), ids=lambda each: each.name)
def test_every_setting_but_places_and_reporting_makes_another_experiment(each):
    other = {
        **FREE,
        **{"policy": "random", "groups": 2, "family": "bert", "dataset": "ptb"},
        **{"tokenizer": "bpe:300", "objective": "causal", "data_dir": "elsewhere"},
        **{"gradient": "owner", "moments": "fresh", "initial": "none", "reward": "perplexity"},
        **{"precision": "bf16", "checkpointing": True, "compile": True, "max_steps": 500},
        **{"dropout": 0.1, "warmup": 0.1, "final_lr": 0.2, "nhead": 2, "weight_decay": 0.2},
        **{"eval_every": 7, "eval_batches": 7, "seed": 1},
        **{"optimizer": "adamw8bit", "settle": 0.25, "shared_init": "plain"},
        **{"budget_layers": 2, "budget_parameters": 2, "budget_bytes": 2, "export_dtype": "bf16"},
    }
    base = TrainConfig()
    pairs = {  # of settings that need others
        "owners": ({"policy": "fixed", "owners": "0,0,2"}, "0,1,1"),
        "source": ({"policy": "fixed", "source": "runs/a"}, "runs/b"),
        "permute": ({"policy": "recorded", "source": "runs/a"}, 0),
        "activate_at": ({"policy": "all"}, 0.5),
        "layer_price": ({"policy": "bandit"}, 0.5),
        "sharing": ({"shared_init": "plain"}, "frozen"),
        "task": ({"task": "rte", "source": "runs/a", "dataset": "glue"}, "cola"),
    }
    if each.name in pairs:
        settings, value = pairs[each.name]
        base = TrainConfig(**settings)
        changed = replace(base, **{each.name: value})
    else:
        default = getattr(base, each.name)
        changed = replace(base, **{each.name: other.get(each.name, default and default * 2)})
    assert getattr(changed, each.name) != getattr(base, each.name)
    assert first_difference(base, base) is None
    difference = first_difference(base, changed)
    if each.name in FREE:
        assert difference is None
    else:
        ours, theirs = getattr(base, each.name), getattr(changed, each.name)
        assert difference == f"{each.name} is {ours!r} in one and {theirs!r} in the other"
