"""Figures from the rows of the benchmark: the best runs of each method, ratios, the front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import spearmanr

from layer_tying.core.patterns import pattern

Row = dict[str, Any]
Groups = dict[str, list[Row]]  # method -> its runs at its best learning rate
SCHEMES = ("sequence", "cycle", "cycle-reverse", "sandwich")
FIXED = {m: [f"{name}-{m}" for name in SCHEMES] for m in (2, 3, 4)}
FIXED[4].append("middle-loop-4")


def best_rate(rows: Sequence[Row], text: str, regime: str, method: str) -> float:
    """The learning rate with the lowest validation perplexity of the first seed."""
    mine = [r for r in of(rows, text, regime) if r["method"] == method]
    first = min(r["seed"] for r in mine)
    tried = [r for r in mine if r["seed"] == first]
    return min(tried, key=lambda r: r["validation_perplexity"])["lr"]


def of(rows: Sequence[Row], text: str, regime: str) -> list[Row]:
    return [r for r in rows if (r["set"], r["regime"]) == (text, regime)]


def at_best_rate(rows: Sequence[Row], text: str, regime: str) -> Groups:
    """Each method's runs at its best learning rate."""
    mine = of(rows, text, regime)
    best = {
        name: best_rate(rows, text, regime, name)
        for name in dict.fromkeys(r["method"] for r in mine)
    }
    return {
        name: [r for r in mine if r["method"] == name and r["lr"] == rate]
        for name, rate in best.items()
    }


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(r[name] for r in rows)


def ratio(groups: Groups, one: str, other: str) -> float | None:
    """The ratio of two methods' mean test perplexities, over the seeds that both have."""
    seeds = common_seeds(groups, one, other)
    if not seeds:
        return None
    ours, theirs = (
        statistics.fmean(r["test_perplexity"] for r in groups[name] if r["seed"] in seeds)
        for name in (one, other)
    )
    return ours / theirs


def common_seeds(groups: Groups, one: str, other: str) -> set[int]:
    ours, theirs = ({r["seed"] for r in groups.get(name, [])} for name in (one, other))
    return ours & theirs


def best_fixed(groups: Groups, m: int) -> str | None:
    """The fixed pattern of m independent layers that is hardest to beat for the bandit."""
    shares = {name: ratio(groups, f"bandit-{m}", name) for name in FIXED[m]}
    known = {name: share for name, share in shares.items() if share}
    return max(known, key=lambda name: known[name]) if known else None


def points_of(groups: Groups, size: str) -> dict[str, tuple[float, float]]:
    return {n: (mean(rows, size), mean(rows, "test_perplexity")) for n, rows in groups.items()}


def front_of(points: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The Pareto front: the points that no other point equals or beats in both coordinates."""
    return {
        name: point
        for name, point in points.items()
        if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points.values())
    }


def rank_correlation(groups: Groups) -> str:
    """Spearman's, between the bandit's estimates of fixed patterns and their perplexities."""
    if "bandit-3" not in groups:
        return ""
    predicted, measured = [], []
    for name, rows in groups.items():
        kind, _, number = name.rpartition("-")
        if kind in ("sequence", "sandwich") and number.isdecimal():
            owners = pattern(kind, 12, int(number)).independent_layers
            worths = [r["worth"] for r in groups["bandit-3"]]
            predicted.append(statistics.fmean(sum(w[i] for i in owners) for w in worths))
            measured.append(-math.log(mean(rows, "test_perplexity")))
    if len(predicted) < 4:
        return ""
    correlation = spearmanr(predicted, measured)[0]
    return f"{correlation:.2f} ({len(predicted)})"
