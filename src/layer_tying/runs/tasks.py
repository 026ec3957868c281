"""The task of a run's configuration."""

from __future__ import annotations

from pathlib import Path

from layer_tying.data.config import DataConfig
from layer_tying.data.tokenizer import FOLDER
from layer_tying.models.config import ModelConfig
from layer_tying.runs.config import TrainConfig
from layer_tying.tasks.base import Task, build_task


def task_of(config: TrainConfig) -> Task:
    """Read the data of a run, and make a task of them.

    Raises:
        InputError: if they cannot be found or used.
    """
    model = ModelConfig(config.family, config.nlayers, config.nhead, config.emsize, config.dropout)
    data = DataConfig(
        config.dataset,
        config.data_dir,
        config.tokenizer,
        config.objective,  # type: ignore[arg-type]
        config.bptt,
        config.batch_size,
        config.eval_batch_size,
        config.task,
    )
    tokenizer_folder = Path(config.source) / FOLDER if config.source else None
    return build_task(data, model, config.seed, tokenizer_folder)
