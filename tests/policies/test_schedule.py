"""What one run takes from another, or does at a set time: decisions replayed, the last tying, late.

A replayed run is compared with the one it replays: all that the two compute has to be the same.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ready_policies import ready
from small_runs import crashed_at, lines_of, small, traces_of, write_text

from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.policies.simple import Schedule
from layer_tying.runs.train import train


@st.composite
def tyings(draw, num_layers: int | None = None) -> Tying:
    depth = num_layers or draw(st.integers(1, 8))
    return Tying.from_action([draw(st.integers(0, i)) for i in range(depth)])


@given(tyings(), st.randoms())
def test_a_permutation_moves_layers_with_whom_they_share(tying, random):
    places = random.sample(range(tying.num_layers), tying.num_layers)
    moved = tying.permuted(places)
    for i in range(tying.num_layers):
        for j in range(tying.num_layers):
            together = tying.owners[i] == tying.owners[j]
            assert (moved.owners[places[i]] == moved.owners[places[j]]) == together
    assert moved.permuted(np.argsort(places).tolist()) == tying


def test_a_permutation_worked_out_by_hand():
    # 0 and 2 share; they move to 3 and 1. Layer 1 moves to 0, layer 3 to 2.
    assert Tying((0, 1, 0, 3)).permuted([3, 0, 1, 2]) == Tying((0, 1, 2, 1))


@given(st.lists(tyings(4), min_size=1, max_size=5), st.integers(0, 7))
def test_a_schedule_takes_its_tyings_in_turn_and_keeps_the_last(settled, interruption):
    schedule, taken = ready(Schedule(settled), 4), []
    for decision in range(8):
        if decision == interruption:
            state = json.loads(json.dumps(schedule.state_dict()))
            schedule = ready(Schedule(settled), 4)
            schedule.load_state_dict(state)
        action = schedule.act(Tying.all_tied(4))
        taken.append(Tying.from_action(action))
        schedule.observe(Tying.all_tied(4), action, None, taken[-1])
    assert taken == settled[:8] + [settled[-1]] * (8 - len(settled))
    assert schedule.reward is None
    assert schedule.statistics() == {}


def test_a_schedule_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one tying"):
        Schedule([])


# Runs

RECORDED = {"policy": "random", "nlayers": 4, "seed": 3, "every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a text, and a run to replay."""
    folder = tmp_path_factory.mktemp("schedule")
    write_text(folder)
    train(small(folder, exp="source", **RECORDED))
    return folder


def replay(folder, **changes):
    """A run of the same model that takes something from the one in the folder."""
    settings = RECORDED | {"policy": "recorded", "source": str(folder / "runs/source")} | changes
    return small(folder, **settings)


def states_of(folder, exp):
    return [(line["step"], line["state"]) for line in lines_of(folder / f"runs/{exp}/tying.jsonl")]


def test_a_replayed_run_computes_what_the_recorded_one_did(folder):
    train(replay(folder, exp="replayed"))
    assert len({str(state) for _, state in states_of(folder, "source")}) > 2, "nothing to replay"
    assert states_of(folder, "replayed") == states_of(folder, "source")
    ours, theirs = traces_of(folder / "runs/replayed"), traces_of(folder / "runs/source")
    assert ours["metrics"] == theirs["metrics"]
    last = "step-00000024/model.safetensors"
    assert ours[last] == theirs[last]


def test_a_permuted_replay_ties_moved_layers_at_the_same_steps(folder):
    train(replay(folder, exp="permuted", permute=0))
    places = np.random.default_rng(0).permutation(4).tolist()
    assert places != [0, 1, 2, 3]
    moved = [
        (step, list(Tying(tuple(state)).permuted(places).owners))
        for step, state in states_of(folder, "source")
    ]
    assert states_of(folder, "permuted") == moved
    assert moved != states_of(folder, "source")


def test_a_crashed_replay_goes_on_exactly(folder):
    left_alone, crashed = replay(folder, exp="alone", permute=2), replay(folder, permute=2)
    train(left_alone)
    crashed_at(crashed, 17)
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(left_alone.folder)


def test_the_last_tying_of_a_run_from_the_start(folder):
    summary = train(replay(folder, exp="fixed", policy="fixed"))
    assert states_of(folder, "fixed") == [(0, states_of(folder, "source")[-1][1])]
    assert summary["independent_layers_mean"] == summary["independent_layers_end"]


def test_a_run_without_a_summary_has_its_last_whole_line(folder, tmp_path):
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("config.json", "metrics.jsonl", "tying.jsonl"):
        text = (folder / "runs/source" / name).read_text(encoding="utf-8")
        (torn / name).write_text(text[:-9] if name == "tying.jsonl" else text, encoding="utf-8")
    train(replay(folder, exp="from-torn", policy="fixed", source=str(torn)))
    assert states_of(folder, "from-torn") == [(0, states_of(folder, "source")[-2][1])]


def test_a_pattern_is_activated_at_its_share_of_the_run(folder):
    late = {"policy": "cycle", "groups": 2, "source": None, "every": 3}
    train(replay(folder, exp="late", activate_at=0.5, **late))
    free, tied = [0, 1, 2, 3], [0, 1, 0, 1]
    # 24 steps: the first decision after half of them is after step 13.
    steps = [0, 1, 4, 7, 10, 13, 16, 19, 22]
    expected = [(step, tied if step > 12 else free) for step in steps]
    assert states_of(folder, "late") == expected
    layers = [line["independent_layers"] for line in lines_of(folder / "runs/late/metrics.jsonl")]
    assert layers == [4, 4, 4, 2, 2, 2]
    train(replay(folder, exp="at-once", activate_at=0.0, **late))
    assert states_of(folder, "at-once")[:2] == [(0, free), (1, tied)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "no-such-run"}, "no-such-run holds no run"),
        ({"nlayers": 3}, "nlayers is 3 here, but 4 in"),
        ({"every": 5}, "every is 5 here, but 4 in"),
        ({"policy": "fixed", "nlayers": 3}, "nlayers is 3 here, but 4 in"),
        ({"policy": "all", "source": None, "activate_at": 0.95}, "0.95 comes after the last"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, changes, said):
    config = replay(folder, exp="refused", **changes)
    with pytest.raises(InputError, match=said) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not config.folder.exists()


def test_a_run_without_decisions_cannot_be_replayed(folder):
    train(replay(folder, exp="static", policy="all", source=None, max_steps=4, every=4))
    with pytest.raises(InputError, match="no decisions to replay: its policy is all"):
        train(replay(folder, exp="refused", source=str(folder / "runs/static")))
