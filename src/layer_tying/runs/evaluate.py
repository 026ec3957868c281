"""Scores the best weights of a run that is on disk."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from layer_tying.errors import InputError
from layer_tying.runs.config import read_config
from layer_tying.runs.devices import make_accelerator
from layer_tying.runs.precision import autocast, choose_attention
from layer_tying.runs.tasks import task_of
from layer_tying.saving import checkpoint
from layer_tying.saving.load import load
from layer_tying.tasks.base import is_same_data


def evaluate_run(folder: Path, split: str, data_dir: str | None = None) -> dict[str, float]:
    """Score a run's best weights.

    Args:
        folder: the run folder.
        split: ``validation`` or ``test``.
        data_dir: where local data sets lie now, if not where they did.

    Raises:
        InputError: if the folder holds no run with a checkpoint, or the data have changed.
    """
    config = read_config(folder)
    best = checkpoint.read_checkpoint(folder / "checkpoints" / "best")
    if data_dir:
        config = config.replace(data_dir=data_dir)
    task = task_of(config, folder)
    if not is_same_data(best.facts["data"], task.facts):
        raise InputError(f"cannot evaluate {folder}: the data are not those it trained on")
    model = load(folder).to(make_accelerator().device)
    assert isinstance(model, PreTrainedModel)  # as all that runs train
    precision = config.optimization.precision
    choose_attention(model, precision, config.data.bptt)
    with autocast(precision, model.device):
        return task.scores(model, split)
