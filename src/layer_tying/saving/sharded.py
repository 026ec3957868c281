"""Checkpoints of sharded models: each process writes its rows, and any number of them reads.

A checkpoint is a folder of ``torch.distributed.checkpoint`` with a ``state.json`` in it: the tying,
and what else a run goes on from. It is written under a temporary name and renamed, so a folder with
its final name is whole. Weights and optimizer state go by the names of parameters, each distinct
one once.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from layer_tying.core.distributed import on_rank_0, world_size
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.saving.checkpoint import replace_folder, unique_tensors
from layer_tying.saving.export import one_line
from layer_tying.saving.training_state import (
    SCALARS,
    at_home,
    join_tree,
    optimizer_state_by_name,
    split_tree,
)

STATE = "state.json"
MODEL, OPTIMIZER, TRAINING = "model/", "optimizer/", "training"  # how the tensors' names begin


def save_sharded(folder: str | Path, layers: TiedLayers, training: Any = None) -> None:
    """Write a checkpoint, whole or not at all; every process calls it.

    Args:
        folder: its final name, which all processes see; an older one of that name is replaced.
        layers: those of the model, sharded or not; its weights are saved, and the state of the
            optimizers that are kept in step.
        training: what else a run goes on from, equal on all processes: a tree of dicts, lists,
            tensors and JSON-able values, such as ``DynamicTying.state_dict()``.

    Raises:
        InputError: on all processes, if it cannot be written, or the optimizer's state is more than
            tensors and JSON-able values.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    tensors: dict[str, Tensor] = {}
    tree = split_tree(training, tensors, TRAINING)
    tensors |= _weights(layers)
    settings = {}
    for name, value in _optimizer_state(layers).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, SCALARS):
            settings[name] = value
        else:
            raise InputError(
                f"cannot save the optimizer's {name.removeprefix(OPTIMIZER)} of type "
                f"{type(value).__name__}: sharded checkpoints hold its tensors, numbers and texts"
            )
    state = {"owners": list(layers.tying.owners), "training": tree, "optimizer": settings}
    on_rank_0(partial(_start, temporary))
    try:
        with _alone_without_a_word():
            save(dict(tensors), checkpoint_id=temporary, no_dist=world_size() == 1)
    except (OSError, CheckpointException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot write the checkpoint {folder}: {reason}") from None
    on_rank_0(partial(_finish, temporary, folder, json.dumps(state)))


def load_sharded(folder: str | Path, layers: TiedLayers) -> Any:
    """Tie the layers as they were saved, and load weights and optimizer state.

    Every process calls it, and there may be any number of them.

    Args:
        folder: what ``save_sharded`` wrote.
        layers: those of a model of the same shape, sharded or not, and its optimizers. Where it is
            tied in several parts, the others are tied as they were saved already.

    Returns:
        What was saved as ``training``.

    Raises:
        InputError: if there is no whole checkpoint, or it is of another model; then nothing has
            changed, unless a file of weights turns out to be damaged.
    """
    folder = Path(folder)
    try:
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tying = Tying(tuple(saved["owners"]))
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # torch's reader raises whatever a damaged file leads to
        raise InputError(f"{folder} is not a whole checkpoint: {one_line(error)}") from None
    facts = {n: each for n, each in stored.items() if isinstance(each, TensorStorageMetadata)}
    _check_fit(folder, facts, layers, tying)
    layers.apply(tying)
    training = {n: _empty(each) for n, each in facts.items() if n.startswith(TRAINING)}
    states = _empty_optimizer_state(layers, facts)
    wanted = {**training, **states, **_weights(layers)}
    with _alone_without_a_word():
        try:
            load(wanted, checkpoint_id=folder, no_dist=world_size() == 1)
        except CheckpointException as error:
            raise InputError(f"{folder} is damaged: {one_line(error)}") from None
    _set_optimizer_state(layers, {**states, **saved["optimizer"]})
    return join_tree(saved["training"], training)


@contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """torch warns of a checkpoint that one process saves or loads; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _weights(layers: TiedLayers) -> dict[str, Tensor]:
    tensors = unique_tensors(layers.stack.model)
    return {f"{MODEL}{name}": each.detach() for name, each in tensors.items()}


def _optimizer_state(layers: TiedLayers) -> dict[str, Any]:
    """Each value of it by the names of its parameter and of the value."""
    return {
        f"{OPTIMIZER}{name}/{key}": value
        for optimizer in layers.optimizers
        for name, state in optimizer_state_by_name(layers.stack.model, optimizer).items()
        for key, value in state.items()
    }


def _start(temporary: Path) -> None:
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write a checkpoint: {error}") from None


def _finish(temporary: Path, folder: Path, state: str) -> None:
    try:
        (temporary / STATE).write_text(state, encoding="utf-8")
        replace_folder(temporary, folder)
    except OSError as error:
        raise InputError(f"cannot write the checkpoint {folder}: {error}") from None


def _check_fit(
    folder: Path, facts: Mapping[str, TensorStorageMetadata], layers: TiedLayers, tying: Tying
) -> None:
    """Check that what was saved is what the model holds once it is tied so."""
    layers.rules.check(tying)
    model, stack = layers.stack.model, layers.stack
    shapes = {f"{MODEL}{n}": p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    shapes |= {f"{MODEL}{n}": b.shape for n, b in model.named_buffers()}
    for name, each in facts.items():
        if name.startswith(MODEL) and shapes.get(name) != each.size:
            ours = tuple(shapes[name]) if name in shapes else "no such weight"
            raise InputError(
                f"{folder} is of another model: {name.removeprefix(MODEL)} has shape "
                f"{tuple(each.size)} there, and there is {ours} here"
            )
    names = [
        {f"{layer}.{n}" for n in slots}
        for layer, slots in zip(stack.names, stack.slots, strict=True)
    ]
    owned = set().union(*(names[owner] for owner in tying.independent_layers))
    elsewhere = unique_tensors(model).keys() - set().union(*names)
    for name in sorted(owned | elsewhere):
        if f"{MODEL}{name}" not in facts:
            raise InputError(f"{folder} is of another model: it has no {name}")
    for name in sorted(n.removeprefix(MODEL) for n in facts if n.startswith(MODEL)):
        if name not in owned | elsewhere:
            raise InputError(
                f"{folder} is tied otherwise outside of these layers: it has {name} of its own "
                f"there, and not here: tie every part as it was first"
            )


def _empty(facts: TensorStorageMetadata) -> Tensor:
    return torch.empty(facts.size, dtype=facts.properties.dtype)


def _empty_optimizer_state(
    layers: TiedLayers, facts: Mapping[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    """What is of a parameter's shape is sharded as it is; step counts are not."""
    parameters = dict(layers.stack.model.named_parameters())
    states = {}
    for full_name, each in facts.items():
        if full_name.startswith(OPTIMIZER):
            name, _, key = full_name.removeprefix(OPTIMIZER).rpartition("/")
            is_like = each.size == parameters[name].shape and key != "step"
            dtype = each.properties.dtype
            states[full_name] = (
                torch.zeros_like(parameters[name].detach(), dtype=dtype)
                if is_like
                else _empty(each)
            )
    return states


def _set_optimizer_state(layers: TiedLayers, values: Mapping[str, Any]) -> None:
    parameters = dict(layers.stack.model.named_parameters())
    for optimizer in layers.optimizers:
        optimizer.state.clear()
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        for full_name, value in values.items():
            name, _, key = full_name.removeprefix(OPTIMIZER).rpartition("/")
            if (parameter := parameters[name]) in groups:
                state = optimizer.state.setdefault(parameter, {})
                state[key] = at_home(key, value, parameter, groups[parameter])
