"""Rows of several seeds: means, spread, and shares of the conventional run's figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeGuard

Summary = dict[str, Any]
QUALITY = ("test_perplexity", "accuracy", "masked_accuracy")  # shown with their spread


def over_seeds(entries: Iterable[Mapping[str, Any]]) -> dict[str, Summary]:
    """A summary for each row: means over its seeds, and ``{key}_deviation``.

    ``seeds`` is their number, and ``by_seed`` holds the summary of each. A figure that one of the
    seeds lacks, as after a run that diverged, is None.
    """
    found: dict[str, dict[int, Summary]] = {}
    for entry in entries:
        found.setdefault(entry["row"], {})[entry["seed"]] = entry["summary"]
    return {row: _mean(by_seed) for row, by_seed in found.items()}


def compared(
    rows: Mapping[str, Summary], prefix: str, names: Mapping[str, str]
) -> list[tuple[str, Summary, Summary]]:
    """The rows of a comparison that were run, each with its label and the conventional run.

    Args:
        rows: those of ``over_seeds``.
        prefix: what the names of the comparison's rows begin with.
        names: how they end -> label.
    """
    conventional = rows.get(f"{prefix}-conventional", {})
    return [
        (label, rows[f"{prefix}-{name}"], conventional)
        for name, label in names.items()
        if f"{prefix}-{name}" in rows
    ]


def share(row: Summary, conventional: Summary, key: str) -> float | None:
    """A figure divided by the conventional run's, both as means over the seeds that both have.

    None if they have no seed in common, or if one of those lacks the figure.
    """
    ours, theirs = row.get("by_seed", {}), conventional.get("by_seed", {})
    pairs = [(ours[seed].get(key), theirs[seed].get(key)) for seed in ours.keys() & theirs.keys()]
    if not pairs or not all(is_number(value) for pair in pairs for value in pair):
        return None
    total, conventional_total = map(sum, zip(*pairs, strict=True))
    return total / conventional_total


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(by_seed: Mapping[int, Summary]) -> Summary:
    summaries = list(by_seed.values())
    merged: Summary = {**summaries[0], "seeds": len(summaries), "by_seed": by_seed}
    if len(summaries) == 1:
        return merged
    for key in dict.fromkeys(chain(*summaries)):
        values = [summary[key] for summary in summaries if is_number(summary.get(key))]
        if len(values) == len(summaries):
            merged[key] = statistics.fmean(values)
            if key in QUALITY:
                merged[f"{key}_deviation"] = statistics.stdev(values)
        elif values:
            merged[key] = None
    return merged
