"""Building transformers already tied.

A tied model never allocates its L layers: it is laid out on the meta device, tied there, and only
then is storage allocated for the parameters that are left. Loading (``saving/load.py``) takes the
same steps with saved weights in place of random ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES, ImageInput, TextInput


def transformers_config(model: ModelConfig, reads: TextInput | ImageInput) -> PretrainedConfig:
    """The transformers configuration of a model of the shape asked for, and what it reads."""
    return FAMILIES[model.family].configure(model, reads)


def classifier_config(config: PretrainedConfig, class_names: Sequence[str]) -> PretrainedConfig:
    """A language model's configuration with a head that classifies sequences in place of its own.

    GPT-2 and Llama classify by the last token that is not padding, BERT by the first.
    """
    return type(config)(
        **config.to_dict()
        | {
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: index for index, name in enumerate(class_names)},
            "architectures": [FAMILIES[config.model_type].classifier],
        }
    )


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a configuration names in ``architectures``.

    Raises:
        InputError: if it names none, or one that this version of transformers does not have.
    """
    name = (config.architectures or ["no class"])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputError(
            f"the configuration's architectures name {name}, which transformers "
            f"{transformers.__version__} does not have: build the model yourself and pass it"
        )
    return found


def context_of(model: PreTrainedModel) -> float:
    """The longest sequence in tokens; infinite where positions have no end, as Bloom's."""
    context = getattr(model.config, "max_position_embeddings", math.inf)
    for name, module in model.named_modules():  # RoBERTa's positions come after one for padding
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            context -= padding + 1
    return context


def lay_out(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on torch's meta device: its structure, without storage."""
    with torch.device("meta"):
        model = model_class(config)(config)
    model.tie_weights()  # heads to embeddings: transformers 5.0 does it only where it draws weights
    return model


def build_model(
    config: PretrainedConfig,
    tying: Tying,
    *,
    untied: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build a randomly initialised model whose layers are tied from the start.

    Only the independent layers are ever allocated. Weights are drawn from torch's global random
    numbers, layer by layer, as transformers initialises them.

    Args:
        config: of any model of transformers; its ``architectures`` say which class.
        tying: of as many layers as the configuration has.
        untied: patterns of the names of parameters that each layer keeps for itself.
        device: the device of the weights.
        dtype: of the weights.
    """
    model = lay_out(config)
    layers = TiedLayers(model, untied=untied)
    layers.apply(tying)
    allocate(model, torch.device(device), dtype)
    blocks = layers.stack.blocks
    for layer, owner in enumerate(tying.owners):
        if layer != owner:
            its = set(blocks[owner].parameters())
            for module in blocks[layer].modules():
                if its.issuperset(module.parameters(recurse=False)):  # drawn once, by its owner
                    module._is_hf_initialized = True  # type: ignore[assignment]
    model.init_weights()
    for layer, owner in enumerate(tying.owners):
        for mine, its in zip(blocks[layer].buffers(), blocks[owner].buffers(), strict=True):
            mine.copy_(its)
    return model


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give each distinct tensor on the meta device storage; buffers keep their types."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.is_meta:
            empty = torch.empty_like(parameter, device=device, dtype=dtype)
            made[parameter] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        if buffer.is_meta:
            made[buffer] = torch.empty_like(buffer, device=device)
    replace_tensors(model, made)


def replace_tensors(model: nn.Module, new: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Put new tensors in place of a model's parameters and buffers, wherever each is used."""
    for module in model.modules():
        here = (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, tensor in here:
            if tensor in new:
                setattr(module, name, new[tensor])
