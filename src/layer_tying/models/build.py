"""Transformers from their configurations, built already tied: ours and any of transformers'.

A tied model never allocates its L layers: it is laid out on the meta device, tied there, and only
then is storage made, for what is left. Layers that are tied from the start cost nothing. Loading
(``export.py``) uses the same steps with saved weights in place of random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core.residual_scale import damp_shared_layers
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError


def language_config(
    family: str,
    *,
    num_layers: int,
    num_heads: int,
    hidden_size: int,
    vocab_size: int,
    max_length: int,
    dropout: float = 0.0,
    eos_id: int | None = None,
    pad_id: int | None = None,
    causal: bool = True,
) -> PretrainedConfig:
    """The transformers configuration of a language model.

    Args:
        family: ``gpt2``, ``llama`` or ``bert``.
        num_layers: L.
        num_heads: attention heads; divides ``hidden_size``.
        hidden_size: width.
        vocab_size: of the tokenizer.
        max_length: the longest sequence, in tokens.
        dropout: probability, everywhere the family has dropout.
        eos_id, pad_id: the tokenizer's special tokens.
        causal: for BERT, a decoder rather than an encoder.
    """
    special: dict[str, Any] = {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if family == "gpt2":
        return transformers.GPT2Config(
            n_layer=num_layers,
            n_head=num_heads,
            n_embd=hidden_size,
            vocab_size=vocab_size,
            n_positions=max_length,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            activation_function="gelu_pytorch_tanh",  # gelu_new, but saves one tensor, not six
            architectures=["GPT2LMHeadModel"],
            **special,
        )
    if family == "llama":
        return transformers.LlamaConfig(
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            hidden_size=hidden_size,
            intermediate_size=-(-hidden_size * 8 // (3 * 32)) * 32,  # SwiGLU: 8/3 of the width
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            attention_dropout=dropout,
            architectures=["LlamaForCausalLM"],
            **special,
        )
    return transformers.BertConfig(
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        is_decoder=causal,
        architectures=["BertLMHeadModel" if causal else "BertForMaskedLM"],
        **special,
    )


def image_config(
    *,
    num_layers: int,
    num_heads: int,
    hidden_size: int,
    image_size: int,
    num_channels: int,
    class_names: Sequence[str],
    dropout: float = 0.0,
) -> PretrainedConfig:
    """The transformers configuration of a ViT whose images are 8 x 8 patches."""
    return transformers.ViTConfig(
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        image_size=image_size,
        patch_size=max(image_size // 8, 1),
        num_channels=num_channels,
        id2label=dict(enumerate(class_names)),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        architectures=["ViTForImageClassification"],
    )


CLASSIFIERS = {
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "bert": "BertForSequenceClassification",
}


def classifier_config(config: PretrainedConfig, class_names: Sequence[str]) -> PretrainedConfig:
    """A language model's configuration with a head that classifies sequences in place of its own.

    GPT-2 and Llama classify by the last token that is not padding, BERT by the first.
    """
    return type(config)(
        **config.to_dict()
        | {
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: index for index, name in enumerate(class_names)},
            "architectures": [CLASSIFIERS[config.model_type]],
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


def lay_out(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on torch's meta device: its structure, without storage."""
    with torch.device("meta"):
        return model_class(config)(config)


def build_model(
    config: PretrainedConfig,
    tying: Tying,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    damped: bool = False,
) -> PreTrainedModel:
    """Build a randomly initialised model whose layers are tied from the start.

    Only the independent layers are ever allocated. Weights are drawn from torch's global random
    numbers, layer by layer, as transformers initialises them.

    Args:
        config: of any model of transformers; its ``architectures`` say which class.
        tying: of as many layers as the configuration has.
        device: where the weights shall lie.
        dtype: of the weights.
        damped: see ``damp_shared_layers``.

    Raises:
        InputError: if it shall be damped and is of a kind whose output projections are not known.
    """
    model = lay_out(config)
    layers = TiedLayers(model)
    layers.apply(tying)
    allocate(model, torch.device(device), dtype)
    blocks = layers.stack.blocks
    for layer, owner in enumerate(tying.owners):
        if layer != owner:
            for module in blocks[layer].modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # drawn once, by its owner
    model.init_weights()
    if damped:
        damp_shared_layers(layers, output_projections(config))
    for layer, owner in enumerate(tying.owners):
        for mine, its in zip(blocks[layer].buffers(), blocks[owner].buffers(), strict=True):
            mine.copy_(its)
    return model


OUTPUT_PROJECTIONS = {  # by model type: what writes to the residual stream, within a layer
    "gpt2": ("attn.c_proj.*", "mlp.c_proj.*"),
    "llama": ("self_attn.o_proj.*", "mlp.down_proj.*"),
    "bert": ("attention.output.dense.*", "output.dense.*"),
    "vit": ("attention.o_proj.*", "mlp.fc2.*", "attention.output.dense.*", "output.dense.*"),
}


def output_projections(config: PretrainedConfig) -> tuple[str, ...]:
    """Name patterns of the parameters that write to the residual stream, within a layer."""
    if config.model_type not in OUTPUT_PROJECTIONS:
        raise InputError(
            f"the output projections of a layer of {config.model_type} are not known: "
            f"they are of {', '.join(OUTPUT_PROJECTIONS)}"
        )
    return OUTPUT_PROJECTIONS[config.model_type]


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
