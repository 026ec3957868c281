"""The checkpoints of a compression: saving all of it, and going on from the newest whole one."""

from __future__ import annotations

import json

from layer_tying.compression.healing import Healing
from layer_tying.compression.work import Work
from layer_tying.events import at
from layer_tying.runs.checkpoints import KEPT_CHECKPOINTS, newest
from layer_tying.saving import checkpoint, training_state


def save(work: Work, healing: Healing) -> None:
    """Write a checkpoint of everything that going on exactly needs."""
    at("save")
    work.clock.lap("heal")
    folder, model = work.folder.checkpoints, healing.student
    checkpoint.save_checkpoint(
        checkpoint.step_folder(folder, healing.step),
        model,
        healing.layers.tying,
        step=healing.step,
        config=json.loads(work.config.to_json()),
        training={
            "optimizer": training_state.optimizer_state_by_name(model, healing.optimizer),
            "batches": work.task.batches.state(),
            "rng": training_state.rng_state(),
            "seconds": work.clock.seconds,
        },
    )
    checkpoint.keep_newest(folder, KEPT_CHECKPOINTS)
    work.clock.lap("save")


def restore(work: Work, healing: Healing) -> None:
    """Go on from the newest whole checkpoint, exactly.

    Raises:
        InputError: if none is whole, or it is of another model.
    """
    saved = newest(work.folder.checkpoints)
    state = saved.training_state()
    healing.layers.apply(saved.tying)
    if saved.settings.mixes:
        healing.layers.mix()
    checkpoint.load_tensors(healing.student, saved.weights(), saved.folder)
    training_state.load_optimizer_state_by_name(
        healing.student, healing.optimizer, state["optimizer"]
    )
    healing.step = saved.step
    work.task.batches.restore(state["batches"])
    work.clock.seconds = dict(state["seconds"])
    training_state.set_rng_state(state["rng"])
    work.folder.rewind(saved.step)
