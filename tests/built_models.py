"""Models of every family, built tied, and what they are fed."""

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import ImageInput, TextInput

transformers.logging.set_verbosity_error()
NUM_LAYERS = 4
SOME_TIED = Tying((0, 0, 2, 0))
CLASSES: dict[str, Any] = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "bert-masked": transformers.BertForMaskedLM,
    "bert-causal": transformers.BertLMHeadModel,
    "vit": transformers.ViTForImageClassification,
}


def config_of(
    kind: str,
    num_layers: int = NUM_LAYERS,
    width: int = 32,
    *,
    heads: int = 2,
    vocab_size: int = 60,
    length: int = 16,
    eos_id: int | None = 58,
    pad_id: int | None = 59,
) -> PretrainedConfig:
    """The configuration of a small model; ``kind`` is one of ``CLASSES``."""
    model = ModelConfig(kind.partition("-")[0], num_layers, heads, width)
    if kind == "vit":
        return transformers_config(model, ImageInput(8, 1, ("cat", "dog", "ox")))
    text = TextInput(vocab_size, length, eos_id, pad_id, causal=kind != "bert-masked")
    return transformers_config(model, text)


def inputs_for(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(58, (2, 16), generator=generator)}


def trained(kind: str, embeddings_tied: bool, tying: Tying = SOME_TIED) -> PreTrainedModel:
    """A tied model whose weights are all different from each other, biases and norms too."""
    torch.manual_seed(0)
    config = config_of(kind)
    config.tie_word_embeddings = embeddings_tied
    model = build_model(config, tying).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model
