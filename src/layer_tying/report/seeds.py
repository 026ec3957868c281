"""Rows of several seeds: means, spread, and the conventional run that each is compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

Summary = dict[str, Any]
QUALITY = ("test_perplexity", "accuracy", "masked_accuracy")  # shown with their spread


def over_seeds(entries: Iterable[Mapping[str, Any]]) -> dict[str, Summary]:
    """A summary for each row: means over its seeds, and ``{key}_deviation``.

    ``seeds`` is their number, and ``by_seed`` holds the summary of each.
    """
    found: dict[str, dict[int, Summary]] = {}
    for entry in entries:
        found.setdefault(entry["row"], {})[entry["seed"]] = entry["summary"]
    return {row: _mean(by_seed) for row, by_seed in found.items()}


def compared(
    rows: Mapping[str, Summary], prefix: str, names: Mapping[str, str]
) -> list[tuple[str, Summary, Summary]]:
    """The rows of a comparison that were run, each with its label and the conventional run.

    That is the mean over the seeds of the row, where the conventional side has run them, too: rows
    of one seed are not compared with a mean over three.

    Args:
        rows: those of ``over_seeds``.
        prefix: what the names of the comparison's rows begin with.
        names: how they end -> label.
    """
    conventional = rows.get(f"{prefix}-conventional", {})
    found = []
    for name, label in names.items():
        if row := rows.get(f"{prefix}-{name}"):
            same = {s: x for s, x in conventional.get("by_seed", {}).items() if s in row["by_seed"]}
            found.append((label, row, _mean(same) if same else conventional))
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(by_seed: Mapping[int, Summary]) -> Summary:
    summaries = list(by_seed.values())
    merged: Summary = {**summaries[0], "seeds": len(summaries), "by_seed": by_seed}
    for key in summaries[0]:
        values = [x[key] for x in summaries if is_number(x.get(key))]
        if len(values) == len(summaries) > 1:
            merged[key] = statistics.fmean(values)
            if key in QUALITY:
                merged[f"{key}_deviation"] = statistics.stdev(values)
    return merged
