"""Exports: a folder that any loader reads, and one that holds each weight once.

- *Expanded*: a plain transformers folder. Each layer has a copy of the weights it uses, so that
  ``from_pretrained`` loads it with no trace of this library.
- *Compact*: ``compact.safetensors`` holds each distinct weight once, under the first of its names;
  under ``layer_tying`` its metadata say, as a JSON object, for each other name which stored one it
  stands for. The file is not called ``model.safetensors`` because ``from_pretrained`` would load
  that, and leave every tied layer random.

``load`` opens a compact export, or a run folder, and never allocates a weight twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.data.tokenizer import FOLDER, Tokenizer, read_tokenizer
from layer_tying.errors import InputError
from layer_tying.models.build import allocate, lay_out, replace_tensors
from layer_tying.saving.checkpoint import check_fit, read_checkpoint, unique_tensors

COMPACT = "compact.safetensors"
METADATA = "layer_tying"
CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # config's names


def export_expanded(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that transformers loads as any model of its class, with equal logits.

    Args:
        model: a model of transformers, its layers tied or not.
        folder: where to write; files of the same names are replaced.
        dtype: of the stored weights; the model's own by default.

    Raises:
        InputError: if it is another model, or the folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is not a model of transformers, so there is no plain folder "
            f"for it: use the compact format"
        )
    declared = model.all_tied_weights_keys  # embeddings and head: transformers stores them once
    stored, aliases = _stored_and_aliases(model, dtype)
    for name, stored_name in aliases.items():
        tensor = stored[stored_name]
        stored[name] = tensor if name in declared else tensor.clone()
    was = model.config.dtype
    try:
        model.save_pretrained(folder, state_dict=stored, max_shard_size="1000GB")
        _saved_config(model, dtype).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from None
    finally:
        model.config.dtype = was


def export_compact(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write each distinct weight once, with the map of who uses which.

    What is shared is read off the model itself: layers, embeddings and head, parts of layers.

    Args:
        model: any module; of a model of transformers the configuration is written as well.
        folder: where to write; files of the same names are replaced.
        dtype: of the stored weights; the model's own by default.

    Raises:
        InputError: if the folder cannot be written, or tensors share memory in another way than by
            being the same parameter.
    """
    stored, aliases = _stored_and_aliases(model, dtype)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(stored, Path(folder) / COMPACT, {METADATA: json.dumps(aliases)})
        if isinstance(model, PreTrainedModel):
            _saved_config(model, dtype).save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
    except RuntimeError as error:
        raise InputError(f"cannot store each weight once: {_one_line(error)}") from None
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from None


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a compact export, or a run's best weights, shared in memory as they were.

    A model of transformers is built from its configuration, without drawing random weights or
    allocating any that is shared; it comes on the CPU and in eval mode.

    Args:
        folder: a compact export, or a run folder of ``layer-tying train``.
        model: the built model where it is not one of transformers; its layers need not be tied. Its
            weights are replaced, on its device, and it is returned.

    Raises:
        InputError: if the folder is neither, is damaged, or is of another model.
    """
    folder = Path(folder)
    if (folder / COMPACT).is_file():
        tensors, aliases = _read_compact(folder / COMPACT)
        model = lay_out(_read_config(folder)).eval() if model is None else model
        _share(model, aliases, folder)
    elif (folder / "checkpoints" / "best").is_dir():
        best = read_checkpoint(folder / "checkpoints" / "best")
        tensors = best.weights()
        model = lay_out(_config_of(best.facts, folder)).eval() if model is None else model
        TiedLayers(model).apply(best.tying)
    else:
        raise InputError(
            f"{folder} is neither a run with a best checkpoint nor a compact export "
            f"(a plain transformers folder is loaded by from_pretrained)"
        )
    _put_in(model, tensors, folder)
    if isinstance(model, PreTrainedModel) and (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        file: the weights.
        num_bytes: its size on disk.
        num_unique: distinct parameters.
        num_parameters: parameters that the layers use, shared ones counted each time.
        tying: the layers'.
    """

    file: Path
    num_bytes: int
    num_unique: int
    num_parameters: int
    tying: Tying


def export_run(run: Path, folder: Path, format: str, dtype: str | None = None) -> Export:
    """Export a run's best weights (or another compact export), with its tokenizer if it has one.

    Args:
        run: the run folder.
        folder: where to write.
        format: ``expanded`` or ``compact``.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default what the run was trained for.

    Raises:
        InputError: as ``load`` and the two formats do, or if the folder is the run's own.
    """
    if run.resolve() == folder.resolve():
        raise InputError(f"cannot export {run} into itself: name another folder")
    model = load(run)
    best = run / "checkpoints" / "best"
    if dtype is None and best.is_dir():
        dtype = read_checkpoint(best).config.get("export_dtype")
    write, name = {
        "expanded": (export_expanded, "model.safetensors"),
        "compact": (export_compact, COMPACT),
    }[format]
    write(model, folder, DTYPES[dtype] if dtype else None)
    if (run / FOLDER).is_dir() or (run / "tokenizer.json").is_file():
        tokenizer_of(run).save(folder)
    layers = TiedLayers(model)
    num_unique = sum(p.numel() for p in model.parameters())
    again = sum(
        p.numel()
        for layer, owner in enumerate(layers.tying.owners)
        if layer != owner
        for p in layers.parameters(layer).values()
    )
    file = folder / name
    return Export(file, file.stat().st_size, num_unique, num_unique + again, layers.tying)


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer that a run, or an export of one, was saved with.

    Raises:
        InputError: if there is none.
    """
    in_run = Path(folder) / FOLDER
    return read_tokenizer(in_run if in_run.is_dir() else folder)


def _stored_and_aliases(
    model: nn.Module, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor under its first name, and for each other name that first one."""
    first: dict[Tensor, str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor in first:
            aliases[name] = first[tensor]
            continue
        first[tensor] = name
        cast = dtype if tensor.is_floating_point() else None
        stored[name] = tensor.detach().to(dtype=cast).contiguous()
    return stored, aliases


def _saved_config(model: PreTrainedModel, dtype: torch.dtype | None) -> PretrainedConfig:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype or model.dtype
    return config


def _read_compact(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        aliases = json.loads(metadata[METADATA])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged: {_one_line(error)}") from None
    except (KeyError, ValueError):
        raise InputError(f"{file} says nothing of shared weights: not a compact export") from None
    return tensors, aliases


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} has no {CONFIG}: build the model yourself and pass it, load(folder, model)"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} cannot be used: {_one_line(error)}") from None


def _config_of(facts: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    if "model" not in facts:
        raise InputError(f"{folder} does not hold its model's configuration: train it again")
    return AutoConfig.for_model(**facts["model"])


def _share(model: nn.Module, aliases: Mapping[str, str], folder: Path) -> None:
    """Make each name stand for the tensor of another."""
    for name, stored_name in aliases.items():
        path, _, attribute = name.rpartition(".")
        source_path, _, source = stored_name.rpartition(".")
        try:
            here, there = model.get_submodule(path), model.get_submodule(source_path)
            places = "_parameters" if source in there._parameters else "_buffers"
            getattr(here, places)[attribute] = getattr(there, places)[source]
        except (AttributeError, KeyError):
            raise InputError(f"{folder} is of another model: this one has no {name}") from None


def _put_in(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put saved tensors in a model's place for them, and compute the buffers that are not saved."""
    old = unique_tensors(model)
    check_fit(tensors, old, folder)
    new: dict[Tensor, Tensor] = {}
    for name, before in old.items():
        tensor = tensors[name] if before.is_meta else tensors[name].to(before.device)
        is_parameter = isinstance(before, nn.Parameter)
        new[before] = nn.Parameter(tensor, before.requires_grad) if is_parameter else tensor
        new[before]._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps it from being drawn
    replace_tensors(model, new)
    lacking = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lacking and not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{folder} does not hold the buffer {lacking[0]}: build the model on a CPU"
        )
    if lacking:
        allocate(model, torch.device("cpu"), torch.float32)
        model.init_weights()  # type: ignore[operator]


def _unwritable(folder: str | Path, error: Exception) -> InputError:
    return InputError(f"cannot write the export {folder}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
