"""The reader of run folders: settings by their flat names, whatever group holds them."""

import json
import math

import numpy as np
import pytest

from layer_tying.runs.folder import RunFolder
from layer_tying.runs.reading import read_run


@pytest.fixture
def folder(tmp_path):
    config = {"model": {"nlayers": 2, "family": "gpt2"}, "tying": {"policy": "dqn"}, "seed": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    (tmp_path / "tying.jsonl").write_text('{"step": 0, "state": [0, 1]}\n')
    return tmp_path


def test_a_setting_is_found_in_any_group_and_outside_of_groups(folder):
    run = read_run(folder)
    assert (run.setting("nlayers"), run.setting("seed"), run.policy) == (2, 3, "dqn")
    assert run.setting("unknown") is None
    assert run.settings == {"nlayers": 2, "family": "gpt2", "policy": "dqn", "seed": 3}


@pytest.mark.parametrize(
    ("settings", "states", "expected"),
    [
        ({"policy": "none"}, [[0, 1]], True),
        ({"policy": "fixed", "owners": "0,1"}, [[0, 1]], True),
        ({"policy": "cycle", "groups": 2, "activate_at": None}, [[0, 1]], True),
        ({"policy": "none"}, [[0, 0]], False),
        ({"policy": "recorded"}, [[0, 1], [0, 1]], False),
        ({"policy": "cycle", "groups": 1, "activate_at": 0.5}, [[0, 1]], False),  # not yet
        ({"policy": "dqn", "initial": "none"}, [[0, 1]], False),  # before its first decision
        ({"policy": "mixture", "groups": 2}, [[0, 1]], False),  # as many sets as layers
    ],
)
def test_a_run_is_conventional_if_every_layer_is_independent_throughout(
    folder, settings, states, expected
):
    (folder / "config.json").write_text(json.dumps({"tying": settings}))
    lines = [json.dumps({"step": step, "state": state}) for step, state in enumerate(states)]
    (folder / "tying.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(folder).is_conventional is expected


def test_a_run_that_has_logged_nothing_yet_is_a_run(folder):
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).metrics == []


def test_an_absent_number_is_nan(folder):
    loss, missing = read_run(folder).series("loss"), read_run(folder).series("accuracy")
    assert loss[0] == 2.5 and np.isnan(loss[1]) and np.isnan(missing).all()


def test_a_line_that_is_torn_before_its_end_is_mended(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    folder.rewind(2)
    folder.metrics(step=3, coefficients={"a": [[math.nan, 1.0]]}, loss=math.inf)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[-1]) == {"step": 3, "coefficients": {"a": [[None, 1.0]]}, "loss": None}
