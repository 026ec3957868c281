"""Saving a run in progress, and going on exactly."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from layer_tying.core import distributed
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig, first_difference
from layer_tying.runs.folder import start_line
from layer_tying.runs.statistics import Tally
from layer_tying.runs.trainer import Training
from layer_tying.saving import checkpoint
from layer_tying.tasks.base import is_same_data

KEPT_CHECKPOINTS = 2


def start_log(training: Training, overwrite: bool) -> None:
    """Make the run folder.

    Raises:
        InputError: if it cannot be made, or holds a run that may not be overwritten.
    """
    training.log.start(training.config, overwrite)
    _begin_log(training)


def _begin_log(training: Training) -> None:
    training.log.rewind(-1)
    training.workload.save(training.log.folder)
    training.log.decision(**start_line(training.layers.tying))


def save(training: Training) -> None:
    """Write a checkpoint of everything that going on exactly needs."""
    training.clock.lap("train")
    training.tally.seconds = training.clock.seconds
    rng = distributed.gather(checkpoint.rng_state())
    state = {
        "losses": [distributed.mean(float(loss)) for loss in training.losses],
        "tying": training.tying.state_dict() if training.tying else None,
    }
    distributed.on_rank_0(lambda: _write_checkpoint(training, rng, state))
    training.clock.lap("save")


def _write_checkpoint(training: Training, rng: list[dict[str, Any]], state: dict[str, Any]) -> None:
    checkpoint.save_checkpoint(
        checkpoint.step_folder(training.log.checkpoints, training.step),
        training.model,
        training.storage.tying,
        step=training.step,
        config=asdict(training.config),
        facts=training.facts(),
        training={
            "moments": checkpoint.moments_by_name(training.model, training.optimizer),
            "batches": training.workload.batches.state(),
            "reward_batches": training.workload.reward_batches.state(),
            "rng": rng,
            "tally": asdict(training.tally),
            **state,
            "best": training.best,
            "validation_perplexity": training.validation_perplexity,
        },
    )
    checkpoint.keep_newest(training.log.checkpoints, KEPT_CHECKPOINTS)


def restore(training: Training) -> None:
    """Go on from the newest whole checkpoint, exactly; without any, from the start."""
    if not checkpoint.has_steps(training.log.checkpoints):
        distributed.on_rank_0(lambda: _begin_log(training))
        return
    saved, problems = checkpoint.newest_checkpoint(training.log.checkpoints)
    for problem in problems if training.accelerator.is_main_process else ():
        print(f"layer-tying: {problem}; going on from {saved.folder.name}", file=sys.stderr)
    its_config = TrainConfig.from_json(json.dumps(saved.config))
    if difference := first_difference(its_config, training.config):
        raise InputError(f"cannot resume: {saved.folder} is of another run: {difference}")
    if not is_same_data(saved.facts["data"], training.workload.facts):
        raise InputError(f"cannot resume {saved.folder}: the data are not those it trained on")
    state = saved.training_state()
    training.storage.apply(saved.tying)
    saved.load_weights(training.model)
    training.layers.apply(Tying(tuple(saved.facts["owners"])))
    checkpoint.load_moments_by_name(training.model, training.optimizer, state["moments"])
    if training.tying:
        training.tying.load_state_dict(state["tying"])
    training.layers.verify()
    training.workload.batches.restore(state["batches"])
    training.workload.reward_batches.restore(state["reward_batches"])
    training.tally = Tally(**state["tally"])
    training.clock.seconds = dict(training.tally.seconds)
    device = training.accelerator.device
    training.losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
    if checkpoint.is_whole(training.log.checkpoints / "best"):
        training.best = state["best"]
    training.validation_perplexity = state["validation_perplexity"]
    training.log.rewind(training.step)
    if distributed.rank() < len(state["rng"]):
        checkpoint.set_rng_state(state["rng"][distributed.rank()])
