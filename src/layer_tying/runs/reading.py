"""The one reader of run folders: a folder's files as data, without torch.

A run folder holds ``config.json``, ``metrics.jsonl`` (one object for each logged step),
``tying.jsonl`` (one object for the initial tying, then one for each decision) and, once the run has
finished, ``summary.json``. A killed run may leave a torn last line, which is skipped, and has no
summary. NaN is written as null, so any number may be absent; here an absent number is NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from layer_tying.errors import InputError
from layer_tying.runs.config import RETIRED
from layer_tying.runs.tying_config import DECIDING

REQUIRED_FILES = ("config.json", "tying.jsonl")  # the first line of metrics comes after some steps


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
        """The policy's name; "none" is conventional training."""
        return str(self.setting("policy", "?"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration by flat names, whatever group a setting belongs to."""
        return flat_settings(self.config)

    def setting(self, name: str, default: Any = None) -> Any:
        """One setting by its flat name, such as ``"nlayers"``; the default where it is absent."""
        return self.settings.get(name, default)

    @cached_property
    def states(self) -> np.ndarray:
        """Owners, shape (1 + decisions, L): the initial tying, then one row for each decision."""
        return np.array([decision["state"] for decision in self.decisions], dtype=int)

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.decisions[0]["state"])

    @property
    def is_dynamic(self) -> bool:
        """Whether any decision was taken after the initial tying."""
        return len(self.decisions) > 1

    @property
    def is_conventional(self) -> bool:
        """Whether every layer is independent from the start to the end."""
        may_tie = self.policy in DECIDING or self.setting("activate_at") is not None
        is_tied = self.decisions[0]["state"] != list(range(self.num_layers))
        return not (may_tie or is_tied or self.is_dynamic)

    def series(self, key: str) -> np.ndarray:
        """One metric over the logged steps, NaN where a line lacks it."""
        return np.array([as_number(line.get(key)) for line in self.metrics], dtype=float)


def has_ended(folder: Path) -> bool:
    """Whether there is a run in a folder, and it has ended."""
    return (folder / "summary.json").is_file()


def read_run(path: Path) -> Run:
    """Read a run folder; a torn last line is skipped.

    Raises:
        InputError: if the folder is not a run (naming what is missing), or a file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a run folder, as written by train")
    missing = [name for name in REQUIRED_FILES if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path}: not a run folder, it lacks {', '.join(missing)}")
    metrics, summary = path / "metrics.jsonl", path / "summary.json"
    run = Run(
        path=path,
        config=_read_object(path / "config.json"),
        metrics=_read_lines(metrics) if metrics.is_file() else [],
        decisions=_read_lines(path / "tying.jsonl"),
        summary=_read_object(summary) if summary.is_file() else None,
    )
    _check_states(run)
    return run


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their flat names, whatever group of a configuration they belong to.

    Those that are no more are left out, so that older runs are told apart by what counts.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in RETIRED}


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
