"""What learned mixtures cost: a training step of mixed layers against one of tied layers."""

from __future__ import annotations

import gc

import torch
from common import Case, adamw, gpt2, peak_of_phase
from speed_sides import Side, fastest, timed_step

from layer_tying.core.patterns import pattern
from layer_tying.core.tied_layers import TiedLayers


def measure_mixture(case: Case) -> Case:
    """Steps of `cycle` with and without mixtures, in turn, checkpointed where the case says so.

    Both models are in memory at once, so that they can take turns; peaks are those of a step.
    """
    sides = {name: _side(case) for name in ("tied", "mixed")}
    TiedLayers(*sides["mixed"]).mix()
    repeats: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(case["repeats"] + 1):
        for name, times in repeats.items():
            seconds = timed_step(*sides[name], case["length"], case["sequences"])
            if repeat:  # the first one warms up
                times.append(seconds)
    minima = {name: fastest(times) for name, times in repeats.items()}
    ratios = {part: minima["mixed"][part] / whole for part, whole in minima["tied"].items()}
    return {"seconds": minima, "mixed_of_tied": ratios, "peaks": _peaks(sides, case)}


def _side(case: Case) -> Side:
    torch.manual_seed(0)
    tying = pattern("cycle", case["layers"], case["independent"])
    model = gpt2(case["layers"], case["width"], case["heads"], case["length"], tying)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), adamw(model)


def _peaks(sides: dict[str, Side], case: Case) -> dict[str, int]:
    """The peak memory of a step of each, the models of both included."""
    peaks = {}
    for name, pair in sides.items():
        gc.collect()
        peak_of_phase()
        timed_step(*pair, case["length"], case["sequences"])
        peaks[name] = peak_of_phase()
    return peaks
