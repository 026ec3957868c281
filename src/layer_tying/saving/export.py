"""Exports: a folder that any loader reads, and one that holds each weight once.

- *Expanded*: a plain transformers folder. Each layer has a copy of the weights it uses, so that
  ``from_pretrained`` loads it with no trace of this library.
- *Compact*: ``compact.safetensors`` holds each distinct weight once, under the first of its names.
  Its metadata hold two JSON objects: ``layer_tying`` says for each other name which stored one it
  stands for, ``layer_tying_settings`` how the layers were tied (``TyingSettings``). The file is not
  called ``model.safetensors`` because ``from_pretrained`` would load that, and leave every tied
  layer random.

A sharded model is exported by all processes together: its weights are gathered one at a time, and
rank 0 keeps and writes them.

``load.py`` opens compact exports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core.distributed import is_sharded, on_rank_0, rank
from layer_tying.core.find import COMPILED, is_mixture
from layer_tying.core.gather import whole_on_rank_0
from layer_tying.core.parts import modules_of, parts_of, stack_of
from layer_tying.core.residual_scale import residual_modules
from layer_tying.core.tying_settings import TyingSettings, settings_of
from layer_tying.core.weight_access import mixed_or_scaled, tying_in_use, weights_as_read
from layer_tying.errors import InputError
from layer_tying.files import set_usual_mode
from layer_tying.saving.int8 import with_scales

COMPACT = "compact.safetensors"
PLAIN = ("model.safetensors", "model.safetensors.index.json")  # those of transformers
METADATA, SETTINGS = "layer_tying", "layer_tying_settings"
DTYPES = {  # by the names that a config has for them
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def export_expanded(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that transformers loads as any model of its class, with equal logits.

    Args:
        model: a model of transformers, its layers tied or not; where it is sharded, every process
            calls this.
        folder: where to write; an export of the same format there is replaced.
        dtype: of the stored weights; the model's own by default.

    Raises:
        InputError: if it is another model, or the folder cannot be written or holds an export of
            the other format.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is not a model of transformers, so there is no plain folder "
            f"for it: use the compact format"
        )
    if dtype == torch.int8:
        raise InputError(
            "int8 is a type of compact exports only, as from_pretrained knows no scales: take the "
            "compact format (--format compact), or another type (--export-dtype bf16)"
        )
    refuse_other_contents(Path(folder), COMPACT)
    declared = model.all_tied_weights_keys  # embeddings and head: transformers stores them once
    stored, aliases = _stored_and_aliases(model, dtype)
    as_read = _as_read(model, dtype)

    def write() -> None:
        for name, stored_name in aliases.items():
            tensor = stored[stored_name]
            stored[name] = tensor if name in declared else tensor.to("cpu", copy=True)
        plain = {n: tensor for n, tensor in stored.items() if not is_mixture(n, stored)} | as_read
        was = model.config.dtype
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder, state_dict=plain, max_shard_size="1000GB")
            set_usual_mode(Path(folder) / PLAIN[0])
            _saved_config(model, dtype).save_pretrained(folder)
        except (OSError, SafetensorError, ValueError) as error:  # or an odd generation_config
            raise _unwritable(folder, error) from None
        finally:
            model.config.dtype = was

    _once(model, write)


def export_compact(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write each distinct weight once, with the map of who uses which.

    What is shared is read off the model itself: layers, embeddings and head, parts of layers.

    Args:
        model: any module; of a model of transformers the configuration is written as well. Where
            it is sharded, every process calls this.
        folder: where to write; an export of the same format there is replaced.
        dtype: of the stored weights; the model's own by default. With ``torch.int8``, matrices are
            stored as 8-bit integers and scales (see ``int8.py``), and loaded in float32.

    Raises:
        InputError: if the folder cannot be written or holds the weights of a model in another
            format, tensors share memory in another way than by being the same parameter, or a
            module is still mixed or scaled by an earlier tying that covered more of the model.
    """
    _check_recorded(model)
    refuse_other_contents(Path(folder), *PLAIN)
    stored, aliases = _stored_and_aliases(model, dtype)
    metadata = {METADATA: json.dumps(aliases), SETTINGS: _settings_now(model).to_json()}

    def write() -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(stored, Path(folder) / COMPACT, metadata)
            set_usual_mode(Path(folder) / COMPACT)
            if isinstance(model, PreTrainedModel):
                _saved_config(model, dtype).save_pretrained(folder)
                if model.can_generate() and model.generation_config is not None:
                    model.generation_config.save_pretrained(folder)
        except RuntimeError as error:
            raise InputError(f"cannot store each weight once: {one_line(error)}") from None
        except (OSError, SafetensorError, ValueError) as error:  # or an odd generation_config
            raise _unwritable(folder, error) from None

    _once(model, write)


def refuse_other_contents(folder: Path, *files: str) -> None:
    """Check that an export may be written into a folder.

    Args:
        folder: it need not exist.
        files: the weights of a model in the other format. A folder holds one model: which of two a
            reader takes depends on the reader.

    Raises:
        InputError: if there is one of these files or a model in several files, or the folder is
            that of a run.
    """
    if (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} holds a run, which an export would damage: name another folder")
    shards = PLAIN[1]  # which are never ours
    if found := [name for name in (shards, *files) if (folder / name).exists()]:
        raise InputError(
            f"{folder} holds {found[0]}, of a model that this export would not replace: name "
            f"another folder, or remove that model"
        )


def _once(model: nn.Module, write: Callable[[], None]) -> None:
    """Write what this process has; of a sharded model, rank 0 has it and the others wait."""
    if any(map(is_sharded, model.parameters())):
        on_rank_0(write)
    else:
        write()


def _settings_now(model: nn.Module) -> TyingSettings:
    """The settings of a model's tying, with the tying that its parameters show.

    Where the layers cannot be found (they were not tied by us), no tying is given.
    """
    settings = settings_of(model)

    def with_owners(part: TyingSettings) -> TyingSettings:
        return replace(part, owners=tying_in_use(stack_of(model, part)).owners)

    try:
        return replace(with_owners(settings), others=tuple(map(with_owners, settings.others)))
    except InputError:
        return settings


def _as_read(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What layers compute with where that is not what is stored; of a sharded model, on rank 0."""
    if not (changed := mixed_or_scaled(model)):
        return {}
    stacks = [stack_of(model, part) for part in parts_of(model) or [TyingSettings()]]
    blocks = [block for stack in stacks for block in stack.blocks]
    _check_among(changed, {module for block in blocks for module in block.modules()})
    is_kept = rank() == 0 or not any(map(is_sharded, model.parameters()))
    return {
        _plain(name): weight.to("cpu", dtype or weight.dtype, copy=True).contiguous()
        for stack in stacks
        for name, weight in weights_as_read(stack)
        if is_kept
    }


def _check_recorded(model: nn.Module) -> None:
    """Check that the settings say of each module that is mixed or scaled that it is."""
    if changed := mixed_or_scaled(model):
        recorded: set[nn.Module] = set()
        for part in parts_of(model):
            stack = stack_of(model, part)
            if part.mixes:
                recorded |= modules_of(stack)
            if part.residual_scaling:
                recorded.update(*residual_modules(stack, part.residual_outputs))
        _check_among(changed, recorded)


def _check_among(changed: Mapping[str, nn.Module], known: Collection[nn.Module]) -> None:
    for name, module in changed.items():
        if module not in known:
            raise InputError(
                f"{name} is mixed or scaled by an earlier tying of more of the model than the last "
                f"one, which this format cannot express"
            )


def _stored_and_aliases(
    model: nn.Module, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor under its first name, and for each other name that first one.

    Of a sharded model, only rank 0 has tensors.
    """
    if dtype not in (None, torch.int8) and not dtype.is_floating_point:
        raise InputError(f"the type of an export is a floating-point one or int8, got {dtype}")
    first: dict[Tensor, str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name_now, tensor in model.state_dict(keep_vars=True).items():
        name = _plain(name_now)
        if tensor in first:
            aliases[name] = first[tensor]
            continue
        first[tensor] = name
        for _, whole in whole_on_rank_0({name: tensor.detach()}).items():
            stored |= _as_stored(name, whole, dtype)
    return stored, aliases


def _plain(name: str) -> str:
    """A name as it is without ``torch.compile(module)``, which wraps a module."""
    return name.replace(COMPILED, "")


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype == torch.int8:
        return with_scales(name, tensor)
    cast = dtype if tensor.is_floating_point() else None
    return {name: tensor.to(dtype=cast).contiguous()}


def _saved_config(model: PreTrainedModel, dtype: torch.dtype | None) -> PretrainedConfig:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32 if dtype == torch.int8 else dtype or model.dtype
    return config


def _unwritable(folder: str | Path, error: Exception) -> InputError:
    return InputError(f"cannot write the export {folder}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """An error's message, without line ends and not too long."""
    return " ".join(str(error).split())[:200]
