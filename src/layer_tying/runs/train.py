"""Training: the loop of Algorithm 1 on accelerate, from a configuration to a summary.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line a logged step), ``tying.jsonl`` (a
line a decision), ``checkpoints/`` and, once it has ended, ``summary.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layer_tying.core import distributed
from layer_tying.errors import InputError
from layer_tying.runs import checkpoints
from layer_tying.runs.config import TrainConfig, read_config
from layer_tying.runs.defaults import to_go_on_with
from layer_tying.runs.devices import check_shares, make_accelerator
from layer_tying.runs.folder import RunFolder
from layer_tying.runs.interrupt import stop_requests
from layer_tying.runs.resolve import resolve
from layer_tying.runs.statistics import progress_bar
from layer_tying.runs.summary import summarise
from layer_tying.runs.tasks import task_of
from layer_tying.runs.tracking import check_installed, tracking
from layer_tying.runs.trainer import Trainer


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to go on."""


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as configured and return the summary that is also written to the run folder.

    Args:
        config: what to train; what it leaves open is settled by ``resolve``.
        resume: go on from the newest whole checkpoint in the run folder.
        overwrite: replace a run that is already in the folder.

    Raises:
        InputError: if the data, the folder or the checkpoint to go on from cannot be used.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    tracker = config.logging.log_with
    check_installed(tracker)
    accelerator = make_accelerator(log_with=tracker, project_dir=config.folder)
    distributed.on_rank_0(lambda: check_shares(config.data.batch_size))
    if resume:
        config = to_go_on_with(read_config(config.folder), config)
        task = task_of(config, config.folder)
    else:
        config, task = resolve(config, accelerator.device)  # reads the data: may refuse
    folder = RunFolder(config.folder, active=accelerator.is_main_process)
    trainer = Trainer(config, task, accelerator, folder)
    try:
        distributed.on_rank_0(folder.hold)
        _begin_or_go_on(trainer, resume, overwrite)
        with tracking(accelerator, tracker, config.flat()), stop_requests() as stop_requested:
            run(trainer, stop_requested)
        return summarise(trainer)
    finally:
        folder.release()


def _begin_or_go_on(trainer: Trainer, resume: bool, overwrite: bool) -> None:
    if resume and checkpoints.has_checkpoints(trainer):
        checkpoints.restore(trainer)
        return
    config = trainer.config
    source = Path(config.tying.source) if config.tying.source else None
    if source and source.resolve() == config.folder.resolve():
        raise InputError(f"{source} is what this run starts from: name another one with --exp")
    pretrained = source if config.data.task else None
    if pretrained:
        trainer.load_pretrained(pretrained)  # which may be refused: before anything is replaced
    if not resume:
        distributed.on_rank_0(lambda: trainer.folder.start(config, overwrite))
        read_config(config.folder)  # is the folder in sight of every process?
    distributed.on_rank_0(lambda: checkpoints.begin(trainer))
    if pretrained:
        checkpoints.save(trainer)  # from here on the other run is not needed


def run(trainer: Trainer, stop_requested: Callable[[], bool]) -> None:
    """Train to the last step, or save and leave when a stop is requested."""
    trainer.model.train()
    trainer.clock.lap("prepare")
    evaluation, logging = trainer.config.evaluation, trainer.config.logging
    assert evaluation.eval_every and logging.save_every, "the defaults are not settled"
    name, is_shown = trainer.config.logging.exp, trainer.accelerator.is_main_process
    with progress_bar(name, trainer.step, trainer.num_steps, is_shown) as bar:
        while trainer.step < trainer.num_steps:
            trainer.train_step()
            trainer.decide()
            is_last = trainer.step == trainer.num_steps
            is_due = is_last or trainer.step % evaluation.eval_every == 0
            scores = trainer.validate() if is_due else {}
            if scores or trainer.step % logging.log_every == 0:
                _show(trainer, bar, trainer.log_step(scores))
            bar.update()
            must_stop = distributed.any_rank(stop_requested())
            if is_last or must_stop or trainer.step % logging.save_every == 0:
                checkpoints.save(trainer)
            if must_stop and not is_last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {trainer.num_steps}; "
                    f"go on with the same command and --resume"
                )


def _show(trainer: Trainer, bar: tqdm[Any], loss: float) -> None:
    tying, validated = trainer.layers.tying, trainer.validation_perplexity
    parts = [f"loss {loss:.3f}", f"{tying.num_independent}/{tying.num_layers} layers"]
    if validated is not None:
        parts.insert(1, f"val. perplexity {validated:.2f}")
    bar.set_postfix_str(", ".join(parts), refresh=False)
