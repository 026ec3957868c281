"""What a run takes from another run (``--from``): its last tying, its decisions, its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from layer_tying.core.find import find_layers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.runs.config import SHAPE, TrainConfig
from layer_tying.runs.folder import RunLog
from layer_tying.runs.reading import Run, read_run
from layer_tying.saving.checkpoint import Checkpoint, read_checkpoint, unique_tensors


def final_tying(config: TrainConfig) -> Tying:
    """The tying that the other run ended with, or has reached so far.

    Raises:
        InputError: if there is no such run, or its depth is another.
    """
    run = _source(config, ("nlayers",))
    owners = (run.summary or {}).get("owners_end") or run.decisions[-1]["state"]
    return Tying(tuple(owners))


def recorded_tyings(config: TrainConfig) -> list[Tying]:
    """The tying that the other run started from, then one for each of its decisions.

    With ``config.permute`` they are of permuted layers: layer i has moved to ``places[i]``.

    Raises:
        InputError: if there is no such run, its depth is another, it decided at other steps or not
            at all.
    """
    run = _source(config, ("nlayers", "every"))
    if not run.is_dynamic:
        raise InputError(f"{run.path} has no decisions to replay: its policy is {run.policy}")
    tyings = [Tying(tuple(line["state"])) for line in run.decisions]
    if config.permute is None:
        return tyings
    places = np.random.default_rng(config.permute).permutation(run.num_layers).tolist()
    return [tying.permuted(places) for tying in tyings]


def settings_behind(config: TrainConfig) -> list[TrainConfig]:
    """The settings of a run, of the run whose tyings it uses, of the run behind that, and so on."""
    behind = [config]
    while behind[-1].policy in ("fixed", "recorded") and (source := behind[-1].source):
        behind.append(RunLog(Path(source)).config())
    return behind


def best_checkpoint(config: TrainConfig) -> Checkpoint:
    """The weights of the other run that were best on validation, with their tying.

    Raises:
        InputError: if there is no such run, or its model is of another shape.
    """
    return read_checkpoint(_source(config, SHAPE).path / "checkpoints" / "best")


def load_backbone(best: Checkpoint, model: PreTrainedModel) -> None:
    """Copy a language model's weights into a classifier of its shape, whatever its tying.

    Every layer gets the weights that it used there. The classifier's head stays as it is.

    Raises:
        InputError: if a weight is missing, or of another shape.
    """
    saved = best.weights()
    layers = find_layers(model).names
    owner_of = {layer: layers[best.tying.owners[i]] for i, layer in enumerate(layers)}
    heads = (f"{model.base_model_prefix}.pooler.",)  # BERT's masked model has none
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            if not name.startswith(f"{model.base_model_prefix}.") or name.startswith(heads):
                continue
            layer = next((each for each in layers if name.startswith(f"{each}.")), "")
            there = saved.get(owner_of.get(layer, "") + name.removeprefix(layer))
            if there is None or there.shape != tensor.shape:
                raise InputError(f"{best.folder} is of another model: its {name} does not fit")
            tensor.copy_(there)


def _source(config: TrainConfig, settings: tuple[str, ...]) -> Run:
    """The other run, which has these settings in common with this one."""
    assert config.source is not None  # the configuration saw to it
    run = read_run(Path(config.source))
    for name in settings:
        theirs, ours = run.setting(name), getattr(config, name)
        if theirs != ours:
            raise InputError(f"{name} is {ours!r} here, but {theirs!r} in {run.path}")
    return run
