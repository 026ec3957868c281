"""Rows of the benchmark, one a run, and figures from them: what counts, ratios, gate, front."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS
from quality_settings import SETTINGS, Setting

Run = tuple[str, str, float, int]
Row = dict[str, Any]
Groups = dict[str, list[Row]]  # method -> its runs at its best learning rate
TIMES = RESULTS / "quality-times.json"
GATE = 0.95  # depth pays where L layers have at most this share of the figure of k layers
NAMES = ("setting", "method", "lr", "seed")  # what tells runs apart
FIGURES = (
    *("validation_perplexity", "test_perplexity", "test_accuracy", "bits_per_byte", "best_step"),
    *("steps", "tokens", "independent_layers_mean", "trainable_parameters_mean"),
    *("trainable_parameters_end", "model_state_bytes_mean", "peak_memory_bytes"),
    *("seconds_per_step", "decision_overhead", "versions"),
)


def row_of(run: Run, folder: Path) -> Row:
    """A run's figures, with all that it takes to make them again."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    row: Row = dict(zip(NAMES, run, strict=True))
    row |= {name: summary[name] for name in FIGURES if name in summary}
    row |= {name: summary[name] for name in summary if name.startswith("test_accuracy_k")}
    row["hardware"] = summary["hardware"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [line for line in map(json.loads, lines) if "validation_perplexity" in line]
    row["curve"] = [[x["step"], x["seconds"], x["validation_perplexity"]] for x in scored]
    return row


def best_rate(rows: Sequence[Row], setting: str, method: str) -> float | None:
    """The learning rate with the lowest validation perplexity.

    That is a mean over the seeds of the rate that is best with the first one, for all rates that
    have these seeds: one seed may like a rate with which others diverge.
    """
    found: dict[float, dict[int, float]] = {}
    for r in rows:
        if (r["setting"], r["method"]) == (setting, method):
            found.setdefault(r["lr"], {})[r["seed"]] = r["validation_perplexity"]
    if not found:
        return None
    first = min(seed for seeds in found.values() for seed in seeds)
    start = min(found, key=lambda lr: found[lr].get(first, math.inf))
    alike = [lr for lr in found if found[lr].keys() >= found[start].keys()]
    return min(alike, key=lambda lr: sum(found[lr][seed] for seed in found[start]))


def at_best_rate(rows: Sequence[Row], setting: str) -> Groups:
    """Each method's runs at its best learning rate, in the order of the methods."""
    mine = [r for r in rows if r["setting"] == setting]
    groups: Groups = {}
    for method in dict.fromkeys(r["method"] for r in mine):
        rate = best_rate(mine, setting, method)
        groups[method] = [r for r in mine if (r["method"], r["lr"]) == (method, rate)]
    return groups


def settings_of(rows: Sequence[Row]) -> dict[str, tuple[Setting, Groups]]:
    """The settings that have been run, with their groups."""
    run = {r["setting"] for r in rows}
    return {
        name: (setting, at_best_rate(rows, name))
        for name, setting in SETTINGS.items()
        if name in run
    }


def figure(row: Row, setting: Setting) -> float:
    """What is compared, the lower the better: test perplexity, or the test error."""
    return 1 - row["test_accuracy"] if setting.accuracy else row["test_perplexity"]


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(r[name] for r in rows)


def mean_figure(rows: Sequence[Row], setting: Setting) -> float:
    return statistics.fmean(figure(r, setting) for r in rows)


def common_seeds(groups: Groups, *methods: str) -> set[int]:
    """The seeds that all of these methods have: those that are compared."""
    return set.intersection(*({r["seed"] for r in groups.get(m, [])} for m in methods))


def ratio(groups: Groups, setting: Setting, one: str, other: str) -> float | None:
    """The ratio of two methods' mean figures, over the seeds that both have."""
    seeds = common_seeds(groups, one, other)
    if not seeds:
        return None
    above, below = (
        mean_figure([r for r in groups[method] if r["seed"] in seeds], setting)
        for method in (one, other)
    )
    return above / below


def gate(groups: Groups, setting: Setting) -> float | None:
    """The figure of L layers by that of k layers; depth pays where it is at most `GATE`."""
    return ratio(groups, setting, setting.deep, setting.rival)


def gap_closed(groups: Groups, setting: Setting, method: str) -> float | None:
    """(plain-k - x) / (plain-k - plain-L), over the seeds that all three have."""
    three = (method, setting.rival, setting.deep)
    seeds = common_seeds(groups, *three)
    if not seeds:
        return None
    ours, rival, deep = (
        mean_figure([r for r in groups[each] if r["seed"] in seeds], setting) for each in three
    )
    return (rival - ours) / (rival - deep) if rival != deep else None


def best_fixed(groups: Groups, setting: Setting) -> str | None:
    """The best fixed pattern of k groups with scaled uses."""
    end = f"-{setting.sets[0]}, 1/n"
    names = [name for name in groups if name.endswith(end)]
    return min(names, key=lambda name: mean_figure(groups[name], setting), default=None)


def with_step_seconds(rows: Sequence[Row]) -> list[Row]:
    """Rows with the seconds of a step that were measured in turns, of the methods that have any."""
    times = json.loads(TIMES.read_text(encoding="utf-8"))["seconds"] if TIMES.exists() else {}
    return [
        {**row, "step_seconds": times.get(row["setting"], {}).get(row["method"])} for row in rows
    ]


def step_seconds(rows: Sequence[Row]) -> float | None:
    """Seconds of a method's training step, where they were measured in turns with others'."""
    return rows[0].get("step_seconds") if rows else None


def steps_to(row: Row, perplexity: float) -> int | None:
    """Steps of a run until its validation perplexity was at most so much, or None."""
    return next((step for step, _, reached in row["curve"] if reached <= perplexity), None)


def front_of(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The Pareto front: the points that no other point equals or beats in both coordinates."""
    return {
        name: point
        for name, point in points.items()
        if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points.values())
    }
