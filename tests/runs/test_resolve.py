"""Every default is settled once: by a rule, and without another run's folder later."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import crashed_at, lines_of, small, traces_of, trainer_of, write_text

from layer_tying.cli import main
from layer_tying.errors import InputError
from layer_tying.runs.defaults import OPEN
from layer_tying.runs.evaluate import evaluate_run
from layer_tying.runs.precision import usual_precision
from layer_tying.runs.train import train


@pytest.fixture
def here(tmp_path) -> Path:
    write_text(tmp_path)
    return tmp_path


def test_a_replay_does_not_need_the_run_that_it_replays(here):
    train(small(here, exp="source", policy="random", seed=1))
    replay = {"policy": "recorded", "source": str(here / "runs/source"), "permute": 0}
    alone, crashed = small(here, exp="alone", **replay), small(here, exp="crashed", **replay)
    summary = train(alone)
    crashed_at(crashed, 9)
    shutil.rmtree(here / "runs/source")
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(alone.folder)
    assert evaluate_run(alone.folder, "test")["loss"] == summary["test_loss"]
    assert main(["export", str(alone.folder), "--output", str(here / "export")]) == 0
    config = str(alone.folder / "config.json")
    assert main(["train", "--config", config, "--exp", "again", "--seed", "3"]) == 0
    states = [
        [line["state"] for line in lines_of(here / f"runs/{exp}/tying.jsonl")]
        for exp in ("alone", "again")
    ]
    assert states[0] == states[1]


def test_nothing_that_has_a_default_is_open_in_the_config_of_a_run(here):
    config = small(here, policy="mixture", nlayers=6, max_steps=None, epochs=1, precision="auto")
    config = config.replace(eval_every=None, save_every=None)
    resolved = trainer_of(config).config.flat()
    settled = ("max_steps", "eval_every", "save_every", "precision", "reward", "settle")
    for name in (*settled, "tyings"):
        assert resolved[name] not in OPEN, name
    assert resolved["tyings"] == ("0,1,0,1,0,1",)
    assert set(resolved["settled"]) >= {*settled}


def test_a_device_that_does_not_compute_in_bf16_is_not_asked_to(monkeypatch):
    assert usual_precision(torch.device("mps")) == "fp32"
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda has=has_it: {"avx512_bf16": has}, raising=False
        )
        assert usual_precision(torch.device("cpu")) == expected
        assert usual_precision(torch.device("cpu"), torch.float16) == "fp32"
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_it, **_: has)
        assert usual_precision(torch.device("cuda")) == expected


def test_a_trainer_goes_on_from_its_state_dict(here):
    config = small(here, policy="random", every=2, dropout=0.1)
    one, other = trainer_of(config), trainer_of(config)
    for trainer in (one, other):
        trainer.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for _ in range(5):
        one.train_step()
        one.decide()
    state = copy.deepcopy(one.state_dict())  # it refers to the tensors, as in torch
    expected = [one.train_step(), one.decide(), one.train_step()]
    other.load_state_dict(state)
    found = [other.train_step(), other.decide(), other.train_step()]
    assert found == expected
    assert other.layers.tying == one.layers.tying


@pytest.mark.parametrize(
    ("groups", "owners"), [(None, "01010101"), (3, "01201201"), (8, "01234567")]
)
def test_a_mixture_has_as_many_sets_as_it_is_asked_for(here, groups, owners):
    trainer = trainer_of(small(here, policy="mixture", nlayers=8, groups=groups))
    assert "".join(map(str, trainer.layers.tying.owners)) == owners


def test_a_named_start_has_as_many_groups_as_it_is_asked_for(here):
    trainer = trainer_of(small(here, policy="random", initial="cycle", nlayers=8, groups=3))
    assert trainer.layers.tying.owners == (0, 1, 2, 0, 1, 2, 0, 1)
    trainer = trainer_of(small(here, policy="random", initial="sandwich", nlayers=8))
    assert trainer.layers.tying.owners == (0, 1, 1, 1, 1, 1, 1, 7)


def test_a_mixture_of_one_set_or_of_more_than_there_are_layers_is_refused(here):
    with pytest.raises(InputError, match="two independent layers or more"):
        trainer_of(small(here, policy="mixture", nlayers=8, groups=1))
    with pytest.raises(InputError, match="9"):
        trainer_of(small(here, policy="mixture", nlayers=8, groups=9))
