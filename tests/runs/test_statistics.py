"""Sums over the steps of a run, and its time by activity."""

import json
import time
from dataclasses import asdict

import torch

from layer_tying.runs.memory import ModelState
from layer_tying.runs.statistics import Stopwatch, Tally

SMALL = ModelState(
    num_trainable=10, parameter_bytes=40, gradient_bytes=40, optimizer_state_bytes=80
)
LARGE = ModelState(
    num_trainable=30, parameter_bytes=120, gradient_bytes=120, optimizer_state_bytes=240
)


def test_means_and_peaks_over_steps():
    tally = Tally()
    for state, layers in ((SMALL, 1), (LARGE, 3), (SMALL, 2), (SMALL, 2)):
        tally.add_step(64, layers, state)
    tally.peak_memory_bytes = 999
    assert (tally.steps, tally.tokens) == (4, 256)
    assert tally.means() == {
        "independent_layers_mean": 2.0,
        "trainable_parameters_mean": 15.0,
        "model_state_bytes_mean": (160 * 3 + 480) / 4,
        "model_state_bytes_peak": 480,
        "peak_memory_bytes": 999,
    }


def test_a_tally_goes_on_after_json():
    tally = Tally(seconds={"train": 1.5})
    tally.add_step(64, 2, LARGE)
    again = Tally(**json.loads(json.dumps(asdict(tally))))
    assert again == tally
    again.add_step(64, 1, SMALL)
    assert (again.steps, again.model_state_bytes_peak) == (2, 480)


def test_no_step_is_no_division_by_zero():
    assert Tally().means()["independent_layers_mean"] == 0


def test_a_lap_goes_to_the_activity_that_it_ends(monkeypatch):
    times = iter([1.0, 4.0, 5.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Stopwatch(torch.device("cpu"))
    for activity in ("train", "decide", "train"):
        clock.lap(activity)
    assert clock.seconds == {"train": 5.0, "decide": 1.0}
    assert clock.total == 6.0
