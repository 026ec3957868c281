"""The families of transformers that are built here: one record each. No torch at import.

To add a family, add its record. The keys are transformers' own names, its ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from layer_tying.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from layer_tying.models.config import ModelConfig

PATCHES_A_SIDE = (8, 7, 6, 5, 4)


@dataclass(frozen=True)
class TextInput:
    """What a language model reads.

    Attributes:
        vocab_size: number of token ids.
        max_length: the longest sequence, in tokens.
        eos_id, pad_id: the special tokens, where there are any.
        causal: whether the next token is predicted, rather than masked ones.
    """

    vocab_size: int
    max_length: int
    eos_id: int | None = None
    pad_id: int | None = None
    causal: bool = True


@dataclass(frozen=True)
class ImageInput:
    """What a model of images reads and tells apart.

    Attributes:
        size: height and width in pixels.
        num_channels: 1 (grey) or 3 (RGB).
        class_names: one for each label, in order.
    """

    size: int
    num_channels: int
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family of transformers.

    Attributes:
        kind: what it reads.
        configure: its transformers configuration, from the shape of the model and what it reads.
        residual_outputs: name patterns (as in ``fnmatch``, within a layer) of the modules whose
            output is added to the residual stream.
        classifier: transformers' class for classifying sequences.
        reads_token_types: whether it tells two texts in one input apart by token types.
        predicts_masked: whether it can learn to predict masked tokens.
        head_transform: the module between the last hidden states and the language model's head.
        head_width_multiple: what the width of an attention head has to be a multiple of.
    """

    kind: Literal["language", "image"]
    configure: Callable[[ModelConfig, Any], PretrainedConfig]
    residual_outputs: tuple[str, ...]
    classifier: str | None = None
    reads_token_types: bool = False
    predicts_masked: bool = False
    head_transform: str | None = None
    head_width_multiple: int = 1


def residual_outputs(model_type: str) -> tuple[str, ...]:
    """Name patterns of the modules whose output is added to the residual stream, within a layer.

    Raises:
        InputError: if they are not known for this ``model_type`` of transformers.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"the residual outputs of a layer of {model_type} are not known: "
            f"they are of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type].residual_outputs


def patch_size(image_size: int) -> int:
    """The side of a ViT's patches in pixels, such that 8 patches make a side, or 7, 6, 5 or 4.

    Raises:
        InputError: if none of these divides the size of the image.
    """
    for number in PATCHES_A_SIDE:
        if image_size % number == 0:
            return image_size // number
    raise InputError(
        f"images of {image_size} x {image_size} pixels cannot be cut into equal patches: "
        f"resize them to a multiple of 4, 5, 6, 7 or 8"
    )


def _special_tokens(text: TextInput) -> dict[str, int | None]:
    return {
        "bos_token_id": text.eos_id,
        "eos_token_id": text.eos_id,
        "pad_token_id": text.pad_id,
    }


def _gpt2(model: ModelConfig, text: TextInput) -> PretrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        initializer_range=model.init_std,
        n_layer=model.nlayers,
        n_head=model.nhead,
        n_embd=model.emsize,
        vocab_size=text.vocab_size,
        n_positions=text.max_length,
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        activation_function="gelu_pytorch_tanh",  # gelu_new, but saves one tensor, not six
        architectures=["GPT2LMHeadModel"],
        **_special_tokens(text),  # type: ignore[arg-type]
    )


def _llama(model: ModelConfig, text: TextInput) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        initializer_range=model.init_std,
        num_hidden_layers=model.nlayers,
        num_attention_heads=model.nhead,
        hidden_size=model.emsize,
        intermediate_size=-(-model.emsize * 8 // (3 * 32)) * 32,  # SwiGLU: 8/3 of the width
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_length,
        attention_dropout=model.dropout,
        architectures=["LlamaForCausalLM"],
        **_special_tokens(text),  # type: ignore[arg-type]
    )


def _bert(model: ModelConfig, text: TextInput) -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        initializer_range=model.init_std,
        num_hidden_layers=model.nlayers,
        num_attention_heads=model.nhead,
        hidden_size=model.emsize,
        intermediate_size=4 * model.emsize,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_length,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        is_decoder=text.causal,
        architectures=["BertLMHeadModel" if text.causal else "BertForMaskedLM"],
        **_special_tokens(text),  # type: ignore[arg-type]
    )


def _vit(model: ModelConfig, images: ImageInput) -> PretrainedConfig:
    from transformers import ViTConfig

    return ViTConfig(
        initializer_range=model.init_std,
        num_hidden_layers=model.nlayers,
        num_attention_heads=model.nhead,
        hidden_size=model.emsize,
        intermediate_size=4 * model.emsize,
        image_size=images.size,
        patch_size=patch_size(images.size),
        num_channels=images.num_channels,
        id2label=dict(enumerate(images.class_names)),
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        architectures=["ViTForImageClassification"],
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "language",
        _gpt2,
        residual_outputs=("attn.c_proj", "mlp.c_proj"),
        classifier="GPT2ForSequenceClassification",
    ),
    "llama": Family(
        "language",
        _llama,
        residual_outputs=("self_attn.o_proj", "mlp.down_proj"),
        classifier="LlamaForSequenceClassification",
        head_width_multiple=2,  # for rotary positions
    ),
    "bert": Family(
        "language",
        _bert,
        residual_outputs=("attention.output.dense", "output.dense"),
        classifier="BertForSequenceClassification",
        reads_token_types=True,
        predicts_masked=True,
        head_transform="cls.predictions.transform",
    ),
    "vit": Family(
        "image",
        _vit,
        residual_outputs=("attention.o_proj", "mlp.fc2"),
    ),
}
