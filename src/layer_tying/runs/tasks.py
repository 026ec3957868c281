"""The task of a run's configuration."""

from __future__ import annotations

from pathlib import Path

from layer_tying.data.tokenizer import FOLDER
from layer_tying.runs.config import TrainConfig
from layer_tying.tasks.base import Task, build_task


def task_of(config: TrainConfig, run: Path | None = None) -> Task:
    """Read the data of a run, and make a task of them.

    Args:
        config: the run.
        run: its folder, whose tokenizer is used if it has one. Fine-tuning begins with that of the
            run that ``--from`` names.

    Raises:
        InputError: if they cannot be found or used.
    """
    if run is None and config.tying.source and config.data.task:
        run = Path(config.tying.source)
    return build_task(config.data, config.model, config.seed, run / FOLDER if run else None)
