"""Run folders as data: reading them, grouping them by seed, the numbers of a run.

A run folder holds config.json, metrics.jsonl (an object a logged step), tying.jsonl (an object for
the initial tying, then one a decision) and, once the run has finished, summary.json. A killed run
may leave a torn last line, which is skipped, and has no summary: its numbers come from the metrics.
NaN is written as null, so every number may be absent; here an absent number is NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layer_tying.errors import InputError

REQUIRED_FILES = ("config.json", "metrics.jsonl", "tying.jsonl")
POLICY_NAMES = {"none": "conventional", "dqn": "dynamic"}
# What may differ between two runs of one group: the seed, where things lie, what is reported.
REPETITION_KEYS = (
    "seed", "exp", "output_dir", "data_dir", "resume", "log_every", "log_with", "save_every",
)  # fmt: skip
# What two runs must have in common before one is measured against the other.
TASK_KEYS = ("family", "dataset", "tokenizer", "nlayers", "nhead", "emsize", "bptt", "batch_size")
MAX_POINTS = 120  # of a curve: more than a small plot can show


@dataclass(frozen=True)
class Run:
    """One run folder. `summary` is None while the run is unfinished."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def policy(self) -> str:
        """The policy's name, "none" being conventional training."""
        return str(self.config.get("policy", "?"))

    @property
    def states(self) -> np.ndarray:
        """Owners, shape (1 + decisions, L): the initial tying, then one row a decision."""
        return np.array([decision["state"] for decision in self.decisions], dtype=int)

    @property
    def num_layers(self) -> int:
        """L, the number of transformer blocks."""
        return len(self.decisions[0]["state"])

    @property
    def is_dynamic(self) -> bool:
        """Whether any decision was taken after the initial tying."""
        return len(self.decisions) > 1

    def series(self, key: str) -> np.ndarray:
        """One metric over the logged steps, NaN where a line lacks it."""
        return np.array([as_number(line.get(key)) for line in self.metrics], dtype=float)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in seed, under one label."""

    label: str
    runs: list[Run]

    @property
    def title(self) -> str:
        """The label, and how many seeds there are where there are several."""
        return f"{self.label} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.label

    @property
    def num_unfinished(self) -> int:
        """How many of the runs have no summary."""
        return sum(run.summary is None for run in self.runs)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; `sd` is NaN for fewer than two values."""

    mean: float
    sd: float


def read_run(path: Path) -> Run:
    """Read a run folder; a torn last line is skipped.

    Raises InputError where the folder is not a run (naming what is missing) or a file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a run folder, as written by train")
    missing = [name for name in REQUIRED_FILES if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path}: not a run folder, it lacks {', '.join(missing)}")
    summary = path / "summary.json"
    run = Run(
        path=path,
        config=_read_object(path / "config.json"),
        metrics=_read_lines(path / "metrics.jsonl"),
        decisions=_read_lines(path / "tying.jsonl"),
        summary=_read_object(summary) if summary.is_file() else None,
    )
    _check_states(run)
    return run


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Runs that differ only in seed, together: conventional, dynamic, others as they come."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: {"none": 0, "dqn": 1}.get(run.policy, 2)):
        shared = {key: run.config[key] for key in run.config if key not in REPETITION_KEYS}
        key = json.dumps([run.num_layers, shared], sort_keys=True)
        groups.setdefault(key, []).append(run)
    members = [
        sorted(group, key=lambda run: str(run.config.get("seed", 0)).zfill(9))
        for group in groups.values()
    ]
    configs = [group[0].config for group in members]
    return [
        RunGroup(_label(config, configs), group)
        for config, group in zip(configs, members, strict=True)
    ]


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
    """Mean and spread of one of the `numbers` over seeds; unfinished ones count only if all are."""
    runs = [run for run in group.runs if run.summary is not None] or group.runs
    values = [numbers(run).get(key, math.nan) for run in runs]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return Spread(math.nan, math.nan)
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else math.nan)


def conventional_for(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The conventional runs of the same model on the same data, if the comparison has them."""

    def task(group: RunGroup) -> list[Any]:
        return [group.runs[0].config.get(key) for key in TASK_KEYS]

    candidates = (other for other in groups if other.runs[0].policy == "none")
    return next((other for other in candidates if task(other) == task(group)), None)


def curve(group: RunGroup, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A metric over tokens: tokens, mean over seeds and standard deviation (NaN for one run).

    Covers the tokens that every seed has reached, in at most MAX_POINTS points, each a mean of
    the values around it. Empty arrays where a run lacks the metric.
    """
    points = []
    for run in group.runs:
        tokens, values = run.series("tokens"), run.series(key)
        known = np.isfinite(tokens) & np.isfinite(values)
        points.append((tokens[known], values[known]))
    if any(len(tokens) == 0 for tokens, _ in points):
        return np.empty(0), np.empty(0), np.empty(0)
    tokens, stacked = _on_common_tokens(points)
    several = len(points) > 1
    sd = stacked.std(axis=0, ddof=1) if several else np.full(len(tokens), math.nan)
    return tokens, stacked.mean(axis=0), sd


def as_number(value: object) -> float:
    """The value as a float; NaN for null and for anything that is not a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):  # torn when the run was killed
                break
            raise InputError(f"{path}: line {number} is not JSON; the file is damaged") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {number} is not a JSON object; the file is damaged")
        objects.append(value)
    return objects


def _check_states(run: Run) -> None:
    """Refuse owners that are no tying and matrices that are no triangle: none can be drawn."""
    path = run.path / "tying.jsonl"
    if not run.decisions:
        raise InputError(f"{path}: holds no tying yet; wait until the run has started")
    first = run.decisions[0].get("state")
    depth = len(first) if isinstance(first, list) else 0
    for number, line in enumerate(run.decisions, start=1):
        state, q = line.get("state"), line.get("q")
        if not isinstance(state, list) or len(state) != depth or depth == 0:
            raise InputError(f"{path}: line {number} has no state of as many layers as the first")
        if not all(
            isinstance(each, int) and 0 <= each <= layer for layer, each in enumerate(state)
        ):
            raise InputError(f"{path}: line {number} names an owner above its layer: {state}")
        if q is not None and not (
            isinstance(q, list)
            and all(isinstance(row, list) for row in q)
            and [len(row) for row in q] == list(range(1, depth + 1))
        ):
            raise InputError(f"{path}: line {number} has a q without rows of 1 to {depth} values")


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

    steps, seconds = run.series("step"), run.series("seconds")
    many = len(steps) > 1 and steps[-1] > steps[0]
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
        "seconds_per_step": (
            float((seconds[-1] - seconds[0]) / (steps[-1] - steps[0])) if many else math.nan
        ),
    }


def _label(config: dict[str, Any], configs: Sequence[dict[str, Any]]) -> str:
    """The policy, and as much of the configuration as tells this group from the others."""
    same_policy = [other for other in configs if other.get("policy") == config.get("policy")]
    telling = [
        _short(config.get(key)) + (" layers" if key == "nlayers" else "")
        for key in ("family", "dataset", "nlayers")
        if len({json.dumps(other.get(key)) for other in configs}) > 1
    ]
    telling += [
        f"{key}={_short(value)}"
        for key, value in config.items()
        if key not in (*REPETITION_KEYS, "family", "dataset", "nlayers")
        and len({json.dumps(other.get(key)) for other in same_policy}) > 1
    ]
    policy = str(config.get("policy", "?"))
    return " · ".join([POLICY_NAMES.get(policy, policy), *telling])


def _short(value: object) -> str:
    """A value as a label shows it: of a path its last part, of anything long its beginning."""
    text = str(value).rstrip("/").rpartition("/")[2]
    return text if len(text) <= 24 else f"{text[:23]}…"


def _on_common_tokens(
    points: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Common token counts (n,) and each run's values there (runs, n)."""
    first = points[0][0]
    if len(first) <= MAX_POINTS and all(np.array_equal(first, tokens) for tokens, _ in points):
        return first, np.stack([values for _, values in points])
    start = max(tokens[0] for tokens, _ in points)
    end = max(start, min(tokens[-1] for tokens, _ in points))
    edges = np.linspace(start, end, min(MAX_POINTS, *(len(tokens) for tokens, _ in points)) + 1)
    counts = np.stack([np.histogram(tokens, edges)[0] for tokens, _ in points])
    sums = np.stack([np.histogram(tokens, edges, weights=values)[0] for tokens, values in points])
    full = (counts > 0).all(axis=0)
    return ((edges[:-1] + edges[1:]) / 2)[full], sums[:, full] / counts[:, full]
