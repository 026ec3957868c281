"""Loading a compact export, or the best weights of a run: no weight is ever allocated twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from layer_tying.core.find import is_mixture
from layer_tying.core.mixtures import Mixtures
from layer_tying.core.parts import stack_of, which
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import TyingSettings, forget_settings, remember_settings
from layer_tying.core.weight_access import drop_mixtures
from layer_tying.errors import InputError
from layer_tying.models.build import allocate, lay_out, replace_tensors
from layer_tying.saving.checkpoint import check_fit, read_checkpoint, unique_tensors
from layer_tying.saving.export import COMPACT, METADATA, SETTINGS, one_line
from layer_tying.saving.int8 import without_scales

CONFIG, GENERATION = "config.json", "generation_config.json"


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a compact export, or a run's best weights, shared in memory as they were.

    A model of transformers is built from its configuration, without drawing random weights or
    allocating any that is shared; it comes on the CPU and in eval mode. What was said of its tying
    is remembered: ``TiedLayers(load(folder))`` goes on as before.

    Args:
        folder: a compact export, or a run folder of ``layer-tying train``.
        model: the built model where it is not one of transformers; its layers need not be tied. Its
            weights are replaced, on its device, and it is returned. Where the folder does not fit,
            it is as it was.

    Raises:
        InputError: if the folder is neither, is damaged, or is of another model.
    """
    folder = Path(folder)
    if (folder / COMPACT).is_file():
        tensors, aliases, settings = _read_compact(folder / COMPACT)
        model = _laid_out(folder).eval() if model is None else model
        others = {name: tensors[stored] for name, stored in aliases.items() if stored in tensors}
        check_fit(_but_mixtures({**tensors, **others}), _but_mixtures(_places(model)), folder)
        drop_mixtures(model)
        forget_settings(model)
        _separate(model, tensors)
        _share(model, aliases)
    elif (folder / "checkpoints" / "best").is_dir():
        best = read_checkpoint(folder / "checkpoints" / "best")
        tensors = best.weights()
        model = lay_out(_config_of(best.facts, folder)).eval() if model is None else model
        settings = best.settings
        places = _places(model)
        check_fit(_but_mixtures({**places, **tensors}), _but_mixtures(places), folder)
        drop_mixtures(model)
        remember_settings(model, settings.but(mixes=False))
        TiedLayers(model).apply(best.tying)
    else:
        raise InputError(
            f"{folder} is neither a run with a best checkpoint nor a compact export "
            f"(a plain transformers folder is loaded by from_pretrained)"
        )
    parts = [*settings.others, settings] if settings.owners else []  # of layers that can be found
    for part in parts:
        if part.mixes:  # room for the coefficients
            Mixtures(stack_of(model, part), Tying(part.owners))
    _put_in(model, tensors, folder)
    if parts:
        remember_settings(model, settings)
    for part in parts:  # the layers read their weights as they did
        TiedLayers(model, **which(part))
    if isinstance(model, PreTrainedModel) and (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _read_compact(file: Path) -> tuple[dict[str, Tensor], dict[str, str], TyingSettings]:
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        aliases = json.loads(metadata[METADATA])
        settings = TyingSettings.from_json(metadata[SETTINGS])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged: {one_line(error)}") from None
    except (KeyError, ValueError):
        raise InputError(f"{file} says nothing of shared weights: not a compact export") from None
    return without_scales(tensors), aliases, settings


def _laid_out(folder: Path) -> PreTrainedModel:
    """The model of a folder's configuration, without weights."""
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} has no {CONFIG}: build the model yourself and pass it, load(folder, model)"
        )
    try:
        return lay_out(AutoConfig.from_pretrained(folder))
    except Exception as error:  # transformers raises whatever a damaged file leads to
        raise InputError(f"{folder / CONFIG} cannot be used: {one_line(error)}") from None


def _config_of(facts: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    if "model" not in facts:
        raise InputError(f"{folder} does not hold its model's configuration: train it again")
    return AutoConfig.for_model(**facts["model"])


def _places(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by all their names."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _but_mixtures(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the coefficients, which a model has only once it mixes."""
    return {name: tensor for name, tensor in tensors.items() if not is_mixture(name, tensors)}


def _separate(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of these parameters a tensor of its own, in a model that was tied otherwise."""
    seen: set[Tensor] = set()
    for name in names:
        path, _, attribute = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        parameter = parameters.get(attribute)
        if parameter is None:  # a buffer
            continue
        if parameter in seen:
            parameters[attribute] = nn.Parameter(torch.empty_like(parameter))
        seen.add(parameter)


def _share(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make each name stand for the tensor of another."""
    for name, stored_name in aliases.items():
        path, _, attribute = name.rpartition(".")
        source_path, _, source = stored_name.rpartition(".")
        here, there = model.get_submodule(path), model.get_submodule(source_path)
        places = "_parameters" if source in there._parameters else "_buffers"
        getattr(here, places)[attribute] = getattr(there, places)[source]


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
