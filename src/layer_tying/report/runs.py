"""Runs as a report shows them: grouped by seed and averaged, with the numbers of each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layer_tying.runs.reading import Run, as_number

# What may differ between two runs of one group: the seed, where things lie, what is reported.
REPETITION_KEYS = (
    "seed", "exp", "output_dir", "data_dir", "log_every", "log_with", "save_every", "settled",
)  # fmt: skip
TITLE_KEYS = ("family", "dataset", "nlayers")  # named in a label without the setting's name
# What two runs must have in common before one is measured against the other.
TASK_KEYS = (
    "family", "dataset", "tokenizer", "objective", "task", "nlayers", "nhead", "emsize", "bptt",
    "batch_size", "accumulate", "precision",
)  # fmt: skip
MOST_TOLD = 4  # settings in a label
MAX_POINTS = 120  # of a curve: more than a small plot can show


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in seed, under one label."""

    label: str
    runs: list[Run]

    @property
    def title(self) -> str:
        """The label, and how many seeds there are where there are several runs."""
        num_runs = len(self.runs)
        if num_runs == 1:
            return self.label
        num_seeds = len({run.setting("seed", 0) for run in self.runs})
        if num_seeds == num_runs:
            return f"{self.label} ({num_seeds} seeds)"
        return f"{self.label} ({num_runs} runs of {num_seeds} seed{'s' * (num_seeds > 1)})"

    @property
    def shown(self) -> list[Run]:
        """The runs that count: those that have ended; all, if none has."""
        return [run for run in self.runs if run.summary is not None] or self.runs

    @property
    def num_unfinished(self) -> int:
        """How many of the runs have no summary."""
        return sum(run.summary is None for run in self.runs)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; `sd` is NaN for fewer than two values."""

    mean: float
    sd: float


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Runs that differ only in seed, together; conventional ones first, others as they come."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.is_conventional):
        shared = {key: run.settings[key] for key in run.settings if key not in REPETITION_KEYS}
        key = json.dumps([run.num_layers, shared], sort_keys=True)
        groups.setdefault(key, []).append(run)
    members = [
        sorted(group, key=lambda run: str(run.setting("seed", 0)).zfill(9))
        for group in groups.values()
    ]
    firsts = [group[0] for group in members]
    labels = [_label(run, firsts) for run in firsts]
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [index for index, each in enumerate(labels) if each == label]
        for index, place in zip(alike, places([firsts[i] for i in alike]), strict=True):
            labels[index] = f"{label} · {place}"
    return [RunGroup(label, group) for label, group in zip(labels, members, strict=True)]


def places(runs: Sequence[Run]) -> list[str]:
    """Where runs lie, from the folder that all of them are in."""
    paths = [os.path.abspath(run.path) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def numbers(run: Run) -> dict[str, float]:
    """The numbers of a run under their names in summary.json; an absent key is unknown.

    An unfinished run counts as far as it got: validation is the last one measured, means run over
    the logged steps.
    """
    found = run.summary if run.summary is not None else _numbers_so_far(run)
    known = {key: as_number(value) for key, value in found.items()}
    known["share_of_conventional"] = known.get("trainable_parameters_mean", math.nan) / (
        known.get("conventional_parameters", 0.0) or math.nan
    )
    return known


def spread(group: RunGroup, key: str) -> Spread:
    """Mean and spread of one of the `numbers` over seeds; NaN if one of them has no such number.

    Unfinished runs count only if all are.
    """
    values = [numbers(run).get(key, math.nan) for run in group.shown]
    if not all(map(math.isfinite, values)):
        return Spread(math.nan, math.nan)
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else math.nan)


def conventional_for(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The conventional runs of the same model on the same data, if the comparison has them.

    Of several, the ones whose settings differ least.
    """
    ours = group.runs[0]

    def differing(other: RunGroup) -> set[str]:
        theirs = other.runs[0]
        keys = (ours.settings.keys() | theirs.settings.keys()) - set(REPETITION_KEYS)
        return {key for key in keys if ours.setting(key) != theirs.setting(key)}

    candidates = [
        other
        for other in groups
        if other.runs[0].is_conventional and differing(other).isdisjoint(TASK_KEYS)
    ]
    return min(candidates, key=lambda other: len(differing(other)), default=None)


def counted(run: Run) -> str:
    """What the run's "tokens" are: of images and of GLUE, a batch is so many of these."""
    if run.setting("family") == "vit":
        return "images"
    return "examples" if run.setting("task") else "tokens"


def curve(group: RunGroup, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A metric over tokens: tokens, mean over seeds and standard deviation (NaN for one run).

    Covers the tokens that every seed has reached, in at most MAX_POINTS points, each a mean of
    the values around it. Unfinished runs count only if all are, runs without the metric never.
    Empty arrays if there are no others.
    """
    points = []
    for run in group.shown:
        tokens, values = run.series("tokens"), run.series(key)
        known = np.isfinite(tokens) & np.isfinite(values)
        if known.any():
            points.append((tokens[known], values[known]))
    if not points:
        return np.empty(0), np.empty(0), np.empty(0)
    tokens, stacked = _on_common_tokens(points)
    several = len(points) > 1
    sd = stacked.std(axis=0, ddof=1) if several else np.full(len(tokens), math.nan)
    return tokens, stacked.mean(axis=0), sd


def _numbers_so_far(run: Run) -> dict[str, float]:
    """What summary.json would say, from the lines of an unfinished run."""

    def known(key: str) -> np.ndarray:
        values = run.series(key)
        return values[np.isfinite(values)]

    def last(key: str) -> float:
        return float(known(key)[-1]) if len(known(key)) else math.nan

    def mean(key: str) -> float:
        return float(known(key).mean()) if len(known(key)) else math.nan

    def peak(key: str) -> float:
        return float(known(key).max()) if len(known(key)) else math.nan

    # Of intervals with a validation, seconds are those of the validation, too.
    times = np.diff(run.series("seconds")) / np.maximum(np.diff(run.series("step")), 1)
    return {
        "steps": last("step"),
        "tokens": last("tokens"),
        "validation_perplexity": last("validation_perplexity"),
        "num_layers": run.num_layers,
        "independent_layers_mean": mean("independent_layers"),
        "independent_layers_end": last("independent_layers"),
        "trainable_parameters_mean": mean("trainable_parameters"),
        "trainable_parameters_end": last("trainable_parameters"),
        "model_state_bytes_mean": mean("model_state_bytes"),
        "model_state_bytes_peak": peak("model_state_bytes"),
        "peak_memory_bytes": peak("peak_memory_bytes"),
        "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
    }


def _label(run: Run, runs: Sequence[Run]) -> str:
    """The policy, and as much of the configuration as tells this group from the others."""
    same_policy = [other for other in runs if other.policy == run.policy]

    def differs(key: str, among: Sequence[Run]) -> bool:
        return len({json.dumps(other.setting(key)) for other in among}) > 1

    telling = [
        _short(run.setting(key)) + (" layers" if key == "nlayers" else "")
        for key in TITLE_KEYS
        if differs(key, runs)
    ]
    telling += [
        f"{key}={_short(value)}"
        for key, value in run.settings.items()
        if key not in (*REPETITION_KEYS, *TITLE_KEYS, "tyings") and differs(key, same_policy)
    ]
    if len(telling) > MOST_TOLD:
        telling = [run.path.name]
    policy = "conventional" if run.is_conventional else run.policy
    return " · ".join([policy, *telling])


def _short(value: object) -> str:
    """A value as a label shows it: of a path its last part, of anything long its beginning."""
    text = str(value).rstrip("/").rpartition("/")[2]
    return text if len(text) <= 24 else f"{text[:23]}…"


def _on_common_tokens(
    points: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Common token counts (n,) and each run's values there (runs, n), or means around them."""
    first = points[0][0]
    if len(first) <= MAX_POINTS and all(np.array_equal(first, tokens) for tokens, _ in points):
        return first, np.stack([values for _, values in points])
    start = max(tokens[0] for tokens, _ in points)
    end = max(start, min(tokens[-1] for tokens, _ in points))
    edges = np.linspace(start, end, min(MAX_POINTS, *(len(tokens) for tokens, _ in points)) + 1)
    counts = np.stack([np.histogram(tokens, edges)[0] for tokens, _ in points])
    sums = np.stack([np.histogram(tokens, edges, weights=values)[0] for tokens, values in points])
    places = np.stack([np.histogram(tokens, edges, weights=tokens)[0] for tokens, _ in points])
    full = (counts > 0).all(axis=0)
    means = [total[:, full] / counts[:, full] for total in (places, sums)]
    return means[0].mean(axis=0), means[1]
