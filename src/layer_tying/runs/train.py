"""Training: the loop of Algorithm 1 on accelerate, from a configuration to a summary.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line a logged step), ``tying.jsonl`` (a
line a decision), ``checkpoints/`` and, once it has ended, ``summary.json``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from layer_tying.core import distributed
from layer_tying.errors import InputError
from layer_tying.models.build import build_model
from layer_tying.runs import setup
from layer_tying.runs.config import TrainConfig, first_difference
from layer_tying.runs.folder import RunLog
from layer_tying.runs.interrupt import stop_requests
from layer_tying.runs.resume import restore, save, start_log
from layer_tying.runs.summary import summarise
from layer_tying.runs.tasks import task_of
from layer_tying.runs.trainer import Training
from layer_tying.saving import checkpoint
from layer_tying.tasks.base import is_same_data


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to go on."""


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as configured and return the summary that is also written to the run folder.

    Args:
        config: what to train.
        resume: go on from the newest whole checkpoint in the run folder.
        overwrite: replace a run that is already in the folder.

    Raises:
        InputError: if the data, the folder or the checkpoint to go on from cannot be used.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    accelerator = _accelerator(log_with=setup.tracker(config), project_dir=config.folder)
    log = RunLog(config.folder, active=accelerator.is_main_process)
    distributed.on_rank_0(lambda: _check_shares(config))
    if resume:
        config = as_it_was(log.config(), config)
    else:
        precision = setup.resolve_precision(config, accelerator.device)
        config = replace(config, precision=distributed.from_rank_0(precision))
    training = Training(config, accelerator, log)  # reads the data: may refuse
    try:
        distributed.on_rank_0(log.hold)
        if resume:
            restore(training)
        else:
            distributed.on_rank_0(lambda: start_log(training, overwrite))
            log.config()  # is the folder in sight of every process?
        with setup.tracking(accelerator, config), stop_requests() as stop_requested:
            run(training, stop_requested)
        return summarise(training)
    finally:
        log.release()


def run(training: Training, stop_requested: Callable[[], bool]) -> None:
    """Train to the last step, or save and leave when a stop is requested."""
    training.model.train()
    training.clock.lap("prepare")
    with _progress_bar(training) as bar:
        while training.step < training.num_steps:
            training.losses.append(training.train_step())
            training.decide()
            is_last = training.step == training.num_steps
            is_due = is_last or training.step % training.eval_every == 0
            scores = training.validate() if is_due else {}
            if scores or training.step % training.config.log_every == 0:
                loss = distributed.mean(float(torch.stack(training.losses).mean()))
                training.losses.clear()
                training.log_step(loss, scores)
                _show(training, bar, loss)
            bar.update()
            must_stop = distributed.any_rank(stop_requested())
            if is_last or must_stop or training.step % training.save_every == 0:
                save(training)
            if must_stop and not is_last:
                raise Interrupted(
                    f"stopped at step {training.step} of {training.num_steps}; "
                    f"go on with the same command and --resume"
                )


def _progress_bar(training: Training) -> tqdm[Any]:
    return tqdm(
        total=training.num_steps,
        initial=training.step,
        desc=training.config.exp,
        disable=not training.accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n}/{total}{postfix}, {remaining} left",
    )


def _show(training: Training, bar: tqdm[Any], loss: float) -> None:
    bar.set_postfix_str(
        f"loss {loss:.3f}, val. perplexity {training.validation_perplexity:.2f}, "
        f"{training.layers.tying.num_independent}/{training.config.nlayers} layers",
        refresh=False,
    )


def _accelerator(**options: Any) -> Accelerator:
    """The device, and the other processes where a launcher started several."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != distributed.world_size():
        raise InputError(
            f"{launched} processes were launched, but accelerate joins none of them on "
            f"{accelerator.device.type}: launch one, or add --cpu to accelerate launch"
        )
    return accelerator


def _check_shares(config: TrainConfig) -> None:
    if config.batch_size % distributed.world_size():
        raise InputError(
            f"batch_size {config.batch_size} is that of all processes together, and not divisible "
            f"by the {distributed.world_size()} there are"
        )


def as_it_was(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """The configuration to go on with; what was measured at the start is not measured again."""
    if asked.precision == "auto":
        asked = replace(asked, precision=saved.precision)
    if difference := first_difference(saved, asked):
        raise InputError(
            f"cannot resume {saved.folder} with another configuration: {difference} "
            f"(the saved run first)"
        )
    return asked


def measured_precision(config: TrainConfig) -> str:
    """The precision that this machine's device trains the configuration in."""
    return setup.resolve_precision(config, _accelerator().device)


def evaluate_run(folder: Path, split: str, data_dir: str | None = None) -> dict[str, float]:
    """Score a run's best weights.

    Args:
        folder: the run folder.
        split: ``validation`` or ``test``.
        data_dir: where local data sets lie now, if not where they did.

    Raises:
        InputError: if the folder holds no run with a checkpoint, or the data have changed.
    """
    config = RunLog(folder).config()
    best = checkpoint.read_checkpoint(folder / "checkpoints" / "best")
    config = replace(config, data_dir=data_dir or config.data_dir)
    if config.task:  # it holds the tokenizer itself: the run that it was tuned from may be gone
        config = replace(config, source=str(folder))
    workload = task_of(config)
    if not is_same_data(best.facts["data"], workload.facts):
        raise InputError(f"cannot evaluate {folder}: the data are not those it trained on")
    model = build_model(workload.model_config, best.tying, device=_accelerator().device)
    best.load_weights(model)
    setup.choose_attention(model, config)
    with setup.autocast(config, model.device):
        return workload.scores(model, split)
