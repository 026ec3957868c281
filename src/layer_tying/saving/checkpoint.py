"""Checkpoints: unique weights and everything else that a run needs to go on exactly.

A checkpoint is a folder. ``model.safetensors`` holds each distinct weight once,
``training.safetensors`` every other tensor (optimizer state by parameter name, the policy's
networks, random states), ``state.json`` the rest, with the tying. It is written under a temporary
name, synced and renamed, so a folder with its final name is whole unless the disk lost something;
``SHA256SUMS`` tells (``sha256sum --check`` reads it too). Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layer_tying.core.gather import put
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import TyingSettings, settings_of
from layer_tying.errors import InputError
from layer_tying.events import at
from layer_tying.files import set_usual_mode
from layer_tying.saving.training_state import copied_where_shared, join_tree, split_tree

FORMAT = "layer-tying checkpoint 2"
STATE, MODEL, TRAINING = "state.json", "model.safetensors", "training.safetensors"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        tying: the tying of the saved weights.
        settings: how the layers were tied.
        config: the run's configuration, as JSON-able values.
        facts: anything else JSON-able that was saved.
    """

    folder: Path
    step: int
    tying: Tying
    settings: TyingSettings
    config: dict[str, Any]
    facts: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """Each distinct weight under its first name."""
        return load_file(self.folder / MODEL)

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into a model that has the checkpoint's tying.

        Raises:
            InputError: if the names or shapes differ.
        """
        load_tensors(model, self.weights(), self.folder)

    def training_state(self) -> Any:
        """The tree of tensors and JSON-able values that was saved with the weights."""
        state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return join_tree(state["training"], load_file(self.folder / TRAINING))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    tying: Tying,
    *,
    step: int,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    training: Any = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all, in place of one of the same name.

    Args:
        folder: its final name.
        model: whose unique parameters and persistent buffers are saved.
        tying: the model's.
        step: optimizer steps done.
        config: JSON-able values that identify the run.
        facts: more JSON-able values.
        training: a nested tree of dicts, lists, tensors and JSON-able values.
        weights: the model's, where it is sharded and they were put together.

    Raises:
        InputError: if it cannot be written (a full disk, say); what was there before is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    tensors: dict[str, Tensor] = {}
    tree = split_tree(training, tensors, "")
    if weights is None:
        weights = unique_tensors(model)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stored = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        for name, each in ((MODEL, stored), (TRAINING, copied_where_shared(tensors))):
            save_file(each, temporary / name)
            set_usual_mode(temporary / name)
        state = {
            "format": FORMAT,
            "step": step,
            "owners": list(tying.owners),
            "settings": asdict(replace(settings_of(model), owners=tying.owners)),
            "config": dict(config),
            "facts": dict(facts or {}),
            "training": tree,
        }
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        sums = "".join(_sum_line(temporary / name) for name in (STATE, MODEL, TRAINING))
        (temporary / SUMS).write_text(sums, encoding="ascii")
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the checkpoint {folder}: {error}; checkpoints before it are whole"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there is none after success


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and check that it is whole.

    Raises:
        InputError: if it is missing, torn or not a checkpoint of ours, saying which.
    """
    if not (folder / SUMS).is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no {SUMS}")
    try:
        _check_sums(folder)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(f"{folder} is not a checkpoint of this program ({FORMAT!r})")
        tying = Tying(tuple(state["owners"]))
        settings = TyingSettings.from_dict(state["settings"])
        return Checkpoint(folder, state["step"], tying, settings, state["config"], state["facts"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: {STATE} is not of this program ({error!r})") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}") from None


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole ``step-N`` checkpoint in a folder.

    Returns:
        The checkpoint, and one line for each newer one that had to be passed over.

    Raises:
        InputError: if there is none.
    """
    problems: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read_checkpoint(candidate), problems
        except InputError as error:
            problems.append(str(error))
    reason = f": {problems[0]}" if problems else ""
    raise InputError(f"{folder} holds no whole checkpoint to resume from{reason}")


def is_whole(folder: Path) -> bool:
    """Whether there is a checkpoint that can be used."""
    try:
        read_checkpoint(folder)
    except InputError:
        return False
    return True


def has_steps(folder: Path) -> bool:
    """Whether a folder holds any ``step-N`` checkpoint, whole or not."""
    return any(folder.glob("step-*"))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort by step."""
    return folder / f"step-{step:08d}"


def keep_newest(folder: Path, number: int) -> None:
    """Delete all but the newest ``step-N`` checkpoints, and what a killed save has left."""
    for old in folder.glob(".*.old"):
        name = old.name.removeprefix(".").removesuffix(".old")
        if not (folder / name).exists():  # killed between the two renames of replace_folder
            old.rename(folder / name)
    leftovers = [*folder.glob(".*.tmp"), *folder.glob(".*.old")]
    for old in sorted(folder.glob("step-*"))[:-number] + leftovers:
        shutil.rmtree(old, ignore_errors=True)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each distinct parameter, and each persistent buffer, under its first name."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def load_tensors(model: nn.Module, saved: Mapping[str, Tensor], origin: Path) -> None:
    """Copy tensors into a model that has them all, under the names that ``unique_tensors`` gives.

    Raises:
        InputError: if the names or shapes differ, naming where the tensors are from.
    """
    tensors = unique_tensors(model)
    check_fit(saved, tensors, origin)
    for name, tensor in tensors.items():
        put(tensor, saved[name])


def check_fit(saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise an InputError if saved tensors are not, by names and shapes, those of a model."""
    if saved.keys() != tensors.keys():
        odd = sorted(saved.keys() ^ tensors.keys())
        raise InputError(f"{folder} is of another model: {odd[0]} is in one of them only")
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise InputError(
                f"{folder} is of another model: {name} has shape "
                f"{tuple(saved[name].shape)} there and {tuple(tensor.shape)} here"
            )


def _check_sums(folder: Path) -> None:
    written = (folder / SUMS).read_text(encoding="ascii", errors="replace")
    for name in (STATE, MODEL, TRAINING):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is torn: {name} is missing")
        if _sum_line(folder / name) not in written.splitlines(keepends=True):
            raise InputError(f"{folder} is torn: {name} is not what was written")


def _sum_line(file: Path) -> str:
    """The line that ``sha256sum`` prints for a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"{digest.hexdigest()}  {file.name}\n"


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # only there can a folder be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename a folder into place; an older one of that name goes away after, not before."""
    at("checkpoint")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
