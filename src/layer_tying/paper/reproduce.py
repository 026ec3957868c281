"""Trains rows of the paper: each in a process of its own, after the row that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layer_tying.errors import InputError
from layer_tying.paper.rows import runs_first
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.processes import Ended, Job, train_all


def as_asked(row: TrainConfig, data_dir: str | None, max_steps: int | None) -> TrainConfig:
    """The row on data that lie elsewhere, or cut short to try it out."""
    changes: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    if max_steps is not None:
        every = min(row.tying.every, max(1, max_steps // 4))  # some decisions, however short it is
        changes |= {"max_steps": max_steps, "eval_every": max_steps, "every": every}
    return row.replace(**changes)


def jobs_of(rows: Mapping[str, TrainConfig], names: Sequence[str]) -> list[Job]:
    """A job for each named row, after the row that it starts from.

    Raises:
        InputError: if a name is not that of a row.
    """
    if unknown := [name for name in names if name not in rows]:
        raise InputError(f"unknown recipe {unknown[0]!r}: see layer-tying recipe --list")
    jobs = []
    for name in names:
        first = runs_first(rows[name])
        jobs.append(Job(rows[name], name, after=(first,) if first else ()))
    return jobs


def train_rows(
    jobs: Sequence[Job], processes: int, logs: Path, on_end: Callable[[Job, Ended], None]
) -> dict[str, Ended]:
    """Train the rows, one thread each: finished ones are left alone, stopped ones go on.

    Args:
        jobs: as ``jobs_of`` makes them.
        processes: how many rows train at a time.
        logs: a folder for the output of each row.
        on_end: called with each row that ends, also with one that failed.

    Raises:
        InputError: before any of them starts, if the run of a row is there with other settings.
        KeyboardInterrupt: on Ctrl-C, once the rows in progress have saved.
    """
    return train_all(
        jobs, processes, threads=1, on_end=on_end, resume=True, logs=logs, keep_going=True
    )
