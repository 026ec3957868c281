"""What a compression by the command is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from layer_tying.compression import source
from layer_tying.compression.outcome import OutcomeOf
from layer_tying.compression.sensitivity import number_of_groups
from layer_tying.compression.settings import CompressConfig
from layer_tying.core.find import find_layers
from layer_tying.data.tokenizer import Tokenizer
from layer_tying.runs.folder import RunFolder
from layer_tying.runs.precision import autocast
from layer_tying.runs.statistics import Stopwatch
from layer_tying.saving.export import DTYPES
from layer_tying.saving.export_run import tokenizer_of
from layer_tying.tasks.base import Task


@dataclass(frozen=True)
class Work:
    """A compression: what it is made of, and where it is written.

    Attributes:
        config: what was asked for, every default settled.
        folder: OUTPUT/run.
        teacher: the untouched model, on the device; its layers share nothing.
        size: how many parameters it had, where layers shared some already.
        task: its data.
        outcome_of: what a model makes of a batch of them.
        num_groups: as many groups of layers as are within the budget.
        tokenizer: of the text, if it is text.
        clock: where the time goes.
    """

    config: CompressConfig
    folder: RunFolder
    teacher: PreTrainedModel
    size: int
    task: Task
    outcome_of: OutcomeOf
    num_groups: int
    tokenizer: Tokenizer | None
    clock: Stopwatch

    def scores(self, model: Any, split: str, most: int | None = None) -> dict[str, float]:
        """What a model reaches on a split."""
        with autocast(self.config.optimization.precision, model.device, model.dtype):
            return self.task.scores(model, split, most)

    def probes(self) -> list[Any]:
        """The first batches, which training will start with as well."""
        position = self.task.batches.state()
        batches = [next(self.task.batches) for _ in range(self.config.search.probes)]
        self.task.batches.restore(position)
        return batches


def work_of(config: CompressConfig, folder: RunFolder, teacher: PreTrainedModel, size: int) -> Work:
    """Read the data, and check that there is a tying within the budget.

    Raises:
        InputError: if the data cannot be used, or no tying is within the budget.
    """
    kind = source.kind_of(teacher)
    tokenizer = tokenizer_of(config.source) if kind.reads_text else None
    dtype = DTYPES[config.export_dtype] if config.export_dtype else None
    num_groups = number_of_groups(config.budget, config.healing, find_layers(teacher), dtype)
    task = kind.task(config, teacher, tokenizer)
    clock = Stopwatch(teacher.device)
    return Work(config, folder, teacher, size, task, kind.outcome_of, num_groups, tokenizer, clock)
