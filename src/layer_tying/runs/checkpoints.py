"""The checkpoints of a run: saving all of a trainer, and going on from the newest whole one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from layer_tying.core import distributed
from layer_tying.errors import InputError
from layer_tying.events import at
from layer_tying.runs.config import TrainConfig, first_difference
from layer_tying.runs.folder import start_line
from layer_tying.runs.trainer import NO_BEST, Trainer
from layer_tying.saving import checkpoint
from layer_tying.tasks.base import is_same_data

KEPT_CHECKPOINTS = 2
APART = ("model", "storage")  # of the state: a checkpoint has the weights and their tying itself


def save(trainer: Trainer) -> None:
    """Write a checkpoint of everything that going on exactly needs."""
    at("save")
    trainer.clock.lap("train")
    state = trainer.state_dict()
    distributed.on_rank_0(lambda: _write(trainer, state))
    trainer.clock.lap("save")


def _write(trainer: Trainer, state: dict[str, Any]) -> None:
    folder = trainer.folder.checkpoints
    training = {name: value for name, value in state.items() if name not in APART}
    trainer.save_weights(checkpoint.step_folder(folder, trainer.step), state["model"], training)
    checkpoint.keep_newest(folder, KEPT_CHECKPOINTS)


def begin(trainer: Trainer) -> None:
    """Write the first lines of a new run, and what its model needs to be used on new data."""
    trainer.folder.rewind(-1)
    trainer.task.save(trainer.folder.path)
    trainer.folder.decision(**start_line(trainer.layers.tying))


def has_checkpoints(trainer: Trainer) -> bool:
    """Whether there is anything to go on from."""
    return checkpoint.has_steps(trainer.folder.checkpoints)


def newest(folder: Path, says_so: bool = True) -> checkpoint.Checkpoint:
    """The newest whole checkpoint in a folder; a line on stderr for each that is passed over.

    Raises:
        InputError: if none is whole.
    """
    saved, problems = checkpoint.newest_checkpoint(folder)
    for problem in problems if says_so else ():
        print(f"layer-tying: {problem}; going on from {saved.folder.name}", file=sys.stderr)
    return saved


def restore(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint, exactly.

    Raises:
        InputError: if none is whole, or it is of another run or of other data.
    """
    folder = trainer.folder.checkpoints
    saved = newest(folder, says_so=trainer.accelerator.is_main_process)
    its_config = TrainConfig.from_json(json.dumps(saved.config))
    if difference := first_difference(its_config, trainer.config):
        raise InputError(f"cannot resume: {saved.folder} is of another run: {difference}")
    if not is_same_data(saved.facts["data"], trainer.task.facts):
        raise InputError(f"cannot resume {saved.folder}: the data are not those it trained on")
    state = saved.training_state()
    if not checkpoint.is_whole(folder / "best"):
        state["best"] = NO_BEST
    trainer.load_state_dict({"model": saved.weights(), "storage": saved.tying.owners, **state})
    trainer.folder.rewind(trainer.step)
