"""Settings that were left open: their usual values, and which of them were settled. No torch."""

from __future__ import annotations

from typing import Any

from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig, first_difference

OPEN: tuple[object, ...] = (None, "", "auto", ())  # what a setting is that was left open
# What decides which tyings are taken from the run that --from names.
SOURCE = ("policy", "source", "permute", "task", "nlayers", "every")


def settle(config: TrainConfig, **usual: Any) -> TrainConfig:
    """Give the settings that are still open their usual values, and note which these were."""
    asked = config.flat()
    open_ones = {name: value for name, value in usual.items() if asked[name] in OPEN}
    return config.replace(**(open_ones | {"settled": (*config.settled, *open_ones)}))


def as_saved(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """What was asked for, with its open settings as they were settled when the run began."""
    values = saved.flat()
    asked = settle(asked.open_again(), **{name: values[name] for name in saved.settled})
    return settle(asked, save_every=values["save_every"])


def to_go_on_with(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """The configuration of a saved run that goes on, if it is the one that was asked for.

    Raises:
        InputError: if they are different experiments.
    """
    config = as_saved(saved, asked)
    if difference := first_difference(saved, config):
        raise InputError(
            f"cannot resume {asked.folder} with another configuration: {difference} "
            f"(the saved run first)"
        )
    return config


def with_changes(saved: TrainConfig, **changes: Any) -> TrainConfig:
    """A saved configuration with some settings changed.

    What its run had settled is kept where the changes leave it the experiment that it was, and is
    settled again where they do not; but what came from another run is kept as long as that is the
    same run, used in the same way.
    """
    opened = saved.open_again()
    asked = opened.replace(**changes)
    if first_difference(opened, asked) is None:
        return as_saved(saved, asked)
    before, after = saved.flat(), asked.flat()
    is_same_source = saved.tying.source and all(before[name] == after[name] for name in SOURCE)
    if is_same_source and "tyings" in saved.settled:
        return settle(asked, tyings=before["tyings"])
    return asked
