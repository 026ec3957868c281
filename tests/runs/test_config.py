"""What a run is: valid values make the round trip, every other is refused in one line."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.errors import InputError
from layer_tying.models.config import FAMILIES
from layer_tying.runs.config import FREE, SETTINGS, TrainConfig, first_difference, read_config
from layer_tying.runs.defaults import as_saved, settle, with_changes
from layer_tying.runs.resolve import usual_settings
from layer_tying.runs.tying_config import POLICIES, TyingConfig, takes_groups

COUNT = st.integers(1, 10_000)
SHARE = st.floats(0, 1)
POSITIVE = st.floats(0, 1e6, exclude_min=True)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1)
VALID = st.fixed_dictionaries(
    {
        "policy": st.sampled_from([name for name in POLICIES if name not in ("fixed", "recorded")]),
        "family": st.sampled_from(sorted(FAMILIES)),
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
).filter(lambda values: values.get("groups") is None or takes_groups(values["policy"], ""))


def test_a_value_of_another_type_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"tyings is of type tuple, got \['0,0'\]"):
        TyingConfig(tyings=["0,0"])


@given(VALID)
def test_json_round_trip(values):
    config = TrainConfig.from_flat(**values)
    text = config.to_json()
    assert TrainConfig.from_json(text) == config
    groups = json.loads(text)
    assert groups["format"] == 3
    assert groups["model"]["nlayers"] == values["nlayers"]
    flat = config.flat()
    assert {name: flat[name] for name in values} == values


def test_settings_that_are_no_more_are_left_out_of_older_runs():
    config = TrainConfig.from_flat(settled=("settle",))
    older = json.loads(config.to_json())
    older["tying"] |= {"inherit": "first", "layer_price": None, "shared_init": "plain"}
    older["settled"] = ["shared_init", "settle", "inherit"]
    assert TrainConfig.from_json(json.dumps(older)) == config
    older["tying"]["shared_init"] = "scaled"
    with pytest.raises(InputError, match="shared_init 'scaled' is of an older version"):
        TrainConfig.from_json(json.dumps(older))


def usual(**settings) -> dict:
    config = TrainConfig.from_flat(**settings)
    return settle(config, **usual_settings(config)).flat()


def test_the_default_is_a_mixture_on_data_that_are_always_there():
    config = usual()
    assert (config["policy"], config["dataset"]) == ("mixture", "pydocs")
    assert config["residual_scaling"] == 1.0
    assert TrainConfig().folder == Path("runs/run")


def test_nothing_is_scaled_that_is_not_drawn():
    assert usual(policy="mixture", task="rte", source="a-run")["residual_scaling"] == 0.0


def test_the_papers_agent_is_the_papers():
    config = usual(policy="dqn")
    assert (config["reward"], config["settle"]) == ("log-perplexity", 0.0)
    assert config["residual_scaling"] == 0.0


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
    ({"optimizer_state": "half"}, "'half'"),
    ({"initial": "some"}, "'some'"),
    ({"reward": "loss"}, "'loss'"),
    ({"precision": "fp16"}, "'fp16'"),
    ({"log_with": "paper"}, "'paper'"),
    ({"emsize": 30, "nhead": 4}, "30"),
    ({"emsize": 6, "nhead": 2, "family": "llama"}, "6"),
    ({"every": 11, "max_steps": 10, "policy": "dqn"}, "11"),
    ({"policy": "fixed"}, "--owners"),
    ({"policy": "none", "owners": "0,0"}, "--owners"),
    ({"owners": "0,0", "policy": "fixed", "source": "runs/a"}, "--from"),
    ({"policy": "recorded"}, "--from"),
    ({"source": "runs/a"}, "mixture"),
    ({"budget_bytes": 0}, "0"),
    ({"sharing": "frozen", "budget_layers": 2}, "a budget"),
    *[({"policy": name, "groups": 3}, name) for name in ("dqn", "random", "none", "all", "repeat")],
    ({"policy": "dqn", "groups": 3, "initial": "all"}, "from all"),
    ({"policy": "cycle", "groups": 3, "initial": "sequence"}, "--initial"),
    *[({"init_std": value}, str(value)) for value in (0.0, math.inf, math.nan)],
    ({"permute": 0}, "mixture"),
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
        TrainConfig.from_flat(**values)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert next(iter(values)) in message.replace("-", "_")


def test_choices_are_listed():
    with pytest.raises(InputError, match=r"cycle-reverse.*got 'dqm'"):
        TrainConfig.from_flat(policy="dqm")


def test_the_usual_data_set_is_one_that_the_family_reads():
    assert usual(family="vit")["dataset"] == "digits"
    assert usual(family="vit", dataset="cifar10")["dataset"] == "cifar10"
    assert usual(task="rte", policy="none", source="runs/a")["dataset"] == "rte"


def test_a_pattern_decides_nothing_so_that_k_does_not_matter():
    assert TrainConfig.from_flat(policy="none", every=50, max_steps=10).tying.every == 50


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", '{"color": 1}', '{"nlayers": 4}'),
        TrainConfig().to_json().replace('"nlayers": 8', '"nlayers": "many"'),
        TrainConfig().to_json().replace('"lr": 0.003', '"lr": null'),
        TrainConfig().to_json().replace('"lr"', '"rate"'),
    ],
)
def test_other_json_is_not_a_configuration(text):
    with pytest.raises(InputError, match="not a run's configuration"):
        TrainConfig.from_json(text)


def test_a_folder_of_another_format_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(TrainConfig().to_json().replace(": 3", ": 1", 1))
    with pytest.raises(InputError, match=r"config\.json: .*format 1; this program reads format 3"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", sorted({*SETTINGS} - {"settled"}))
def test_every_setting_but_places_and_reporting_makes_another_experiment(name):
    other = {
        **{"data_dir": "elsewhere", "output_dir": "elsewhere", "exp": "elsewhere"},
        **{"log_every": 3, "log_with": "mlflow", "save_every": 3},
        **{"policy": "random", "groups": 2, "family": "bert", "dataset": "ptb"},
        **{"tokenizer": "bpe:300", "objective": "causal"},
        **{
            "gradient": "owner",
            "optimizer_state": "fresh",
            "initial": "none",
            "reward": "perplexity",
        },
        **{"precision": "bf16", "checkpointing": True, "compile": True, "max_steps": 500},
        **{"dropout": 0.1, "warmup": 0.1, "final_lr": 0.2, "nhead": 2, "weight_decay": 0.2},
        **{"eval_every": 7, "eval_batches": 7, "seed": 1},
        **{"optimizer": "adamw8bit", "settle": 0.25, "tyings": ("0,0",)},
        **{"budget_layers": 2, "budget_parameters": 2, "budget_bytes": 2, "export_dtype": "bf16"},
        "residual_scaling": 0.5,
        "parallel": "shard",
        "untied": "*norm*",
    }
    base = TrainConfig()
    pairs = {  # of settings that need others
        "owners": ({"policy": "fixed", "owners": "0,0,2"}, "0,1,1"),
        "source": ({"policy": "fixed", "source": "runs/a"}, "runs/b"),
        "permute": ({"policy": "recorded", "source": "runs/a"}, 0),
        "activate_at": ({"policy": "all"}, 0.5),
        "sharing": ({"policy": "dqn"}, "frozen"),
        "task": ({"task": "rte", "source": "runs/a", "dataset": "glue"}, "cola"),
    }
    if name in pairs:
        settings, value = pairs[name]
        base = TrainConfig.from_flat(**settings)
        changed = base.replace(**{name: value})
    else:
        default = base.flat()[name]
        changed = base.replace(**{name: other.get(name, default and default * 2)})
    ours, theirs = base.flat()[name], changed.flat()[name]
    assert ours != theirs
    assert first_difference(base, base) is None
    difference = first_difference(base, changed)
    if name in FREE:
        assert difference is None
        assert base.digest == changed.digest
    else:
        assert difference == f"{name} is {ours!r} in one and {theirs!r} in the other"
        assert base.digest != changed.digest


# Settings that were left open


SETTLED = settle(TrainConfig.from_flat(lr=0.1), settle=0.5, max_steps=100, save_every=10)


def test_what_was_left_open_is_noted_and_can_be_opened_again():
    assert SETTLED.settled == ("settle", "max_steps", "save_every")
    assert SETTLED.open_again() == TrainConfig.from_flat(lr=0.1)
    assert settle(SETTLED, settle=0.3, lr=0.2) == SETTLED
    assert TrainConfig.from_json(SETTLED.to_json()) == SETTLED


def test_a_run_goes_on_with_what_was_settled_and_is_refused_what_was_not():
    assert as_saved(SETTLED, TrainConfig.from_flat(lr=0.1)) == SETTLED
    assert first_difference(as_saved(SETTLED, TrainConfig()), SETTLED) == (
        "lr is 0.003 in one and 0.1 in the other"
    )
    explicit = as_saved(SETTLED, TrainConfig.from_flat(lr=0.1, settle=0.4))
    assert "settle is 0.4" in str(first_difference(explicit, SETTLED))


def test_changes_to_a_saved_configuration_settle_anew_what_was_left_open():
    assert with_changes(SETTLED, exp="again").flat() == SETTLED.flat() | {"exp": "again"}
    changed = with_changes(SETTLED, policy="dqn")
    assert changed == TrainConfig.from_flat(lr=0.1, policy="dqn")


def test_what_came_from_another_run_stays_unless_it_is_another_one():
    replay = TrainConfig.from_flat(policy="recorded", source="runs/a")
    replay = settle(replay, tyings=("0,0", "0,1"), settle=0.0)
    kept = with_changes(replay, seed=3)
    assert (kept.tying.tyings, kept.tying.settle) == (("0,0", "0,1"), None)
    assert with_changes(replay, source="runs/b").tying.tyings == ()


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"format": 3, "model": []}', b"[1", b"{}"])
def test_a_damaged_configuration_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: ") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
