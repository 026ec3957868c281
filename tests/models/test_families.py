"""Other people's models: each trains with random tying, keeps the invariant, and is exported."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tiny_models import gpt_neo
from tolerance import assert_close
from torch import nn
from transformers import PreTrainedModel

from layer_tying import (
    DynamicTying,
    InputError,
    RandomPolicy,
    TiedLayers,
    compress,
    export_compact,
    export_expanded,
    load,
)

pytestmark = pytest.mark.numerics

transformers.logging.set_verbosity_error()
LAYERS = 4
STEPS = 30
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
TEXT = SHAPE | {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 32}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
GROUPED = TEXT | NO_SPECIAL | {"num_key_value_heads": 1, "head_dim": 8}


class Case(NamedTuple):
    """A model, what it is fed, and what has to be said about its layers, if anything."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    options: Mapping[str, Any] = MappingProxyType({})


class VisionBlock(nn.Module):
    """As in timm: LayerScale as parameters directly on the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.gamma_1 = nn.Parameter(torch.full((width,), 0.1))
        self.gamma_2 = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.gamma_1 * self.proj(mixed)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class TimmLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 16, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        self.blocks = nn.Sequential(*(VisionBlock(16) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, pixels, labels):
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        logits = self.head(self.norm(self.blocks(x))[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(40, 16)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        logits = self.head(self.encoder(self.embed(input_ids), mask, is_causal=True))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).bool(), persistent=True)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(~self.mask[:length, :length], -torch.inf)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(16, bias=False), nn.LayerNorm(16, bias=False)
        self.attn = CausalAttention()
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(16, 64), "c_proj": nn.Linear(64, 16)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """In the manner of karpathy/nanoGPT: modules in a ModuleDict, embeddings tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                **{"wte": nn.Embedding(40, 16), "wpe": nn.Embedding(32, 16)},
                **{"h": nn.ModuleList(NanoBlock() for _ in range(LAYERS))},
                **{"ln_f": nn.LayerNorm(16)},
            }
        )
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, input_ids, labels):
        positions = torch.arange(input_ids.shape[1])
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def text() -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * 8).reshape(2, 8) % 40
    return {"input_ids": ids, "labels": ids}


def classes(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors, "labels": torch.tensor([0, 2])}


def image(name: str, size: int) -> dict[str, torch.Tensor]:
    return classes(**{name: torch.linspace(-1, 1, 2 * size * size).reshape(2, 1, size, size)})


def sound() -> dict[str, torch.Tensor]:
    return classes(input_features=torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32))


def built(architecture: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    model_class = getattr(transformers, architecture)
    return lambda: model_class(model_class.config_class(**settings))


T5 = {"num_layers": 3, "num_decoder_layers": 3, "d_model": 16, "d_kv": 8, "d_ff": 32}
WHISPER = {"d_model": 16, "encoder_layers": LAYERS, "encoder_attention_heads": 2}
WHISPER |= {"encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 16}
CASES = {
    "GPT-2": Case(
        built(
            "GPT2LMHeadModel",
            **{"n_layer": LAYERS, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32},
            **NO_SPECIAL,
        ),
        text,
    ),
    "Llama": Case(built("LlamaForCausalLM", **GROUPED), text),
    "Qwen2": Case(built("Qwen2ForCausalLM", **GROUPED), text),
    "Qwen3": Case(built("Qwen3ForCausalLM", **GROUPED), text),
    "GPT-NeoX": Case(built("GPTNeoXForCausalLM", **TEXT, **NO_SPECIAL), text),
    "OPT": Case(
        built(
            "OPTForCausalLM",
            **{"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "vocab_size": 40},
            **{"num_hidden_layers": LAYERS, "num_attention_heads": 2},
            **{"max_position_embeddings": 32, "pad_token_id": 1},
        ),
        text,
    ),
    "BERT": Case(built("BertForMaskedLM", **TEXT), text),
    "RoBERTa": Case(built("RobertaForMaskedLM", **TEXT | {"pad_token_id": 1}), text),
    "ViT": Case(
        built(
            "ViTForImageClassification",
            **SHAPE,
            **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_channels": 1},
            **{"num_labels": 3},
        ),
        lambda: image("pixel_values", 8),
    ),
    "T5": Case(
        built(
            "T5ForConditionalGeneration",
            **T5,
            **{"num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0},
        ),
        text,
        {
            "layers": ["encoder.block", "decoder.block"],
            "untied": ["*relative_attention_bias*"],
            "by_kind": True,  # the decoder's blocks attend to the encoder as well
        },
    ),
    "Whisper's encoder": Case(
        built("WhisperForAudioClassification", **WHISPER, num_labels=3),
        sound,
        {"layers": "encoder.layers"},
    ),
    "a ViT like timm's": Case(TimmLike, lambda: image("pixels", 8)),
    "nn.TransformerEncoder": Case(TorchEncoder, text),
    "nanoGPT": Case(NanoGPT, text),
    "Mixtral": Case(
        built("MixtralForCausalLM", **GROUPED, num_local_experts=2, num_experts_per_tok=1), text
    ),
}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs)["logits"]


@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_of_random_tying(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make().train()
    inputs = case.inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    policy = RandomPolicy(seed=1)
    tying = DynamicTying(model, optimizer, every=3, policy=policy, initial="none", **case.options)
    losses, seen = [], set()
    for _ in range(STEPS):
        loss = model(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
        losses.append(loss.item())
        seen.add(tying.tying)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert len(seen) > 2
    wanted = outputs(model, inputs)
    export_compact(model, tmp_path / "compact")
    if isinstance(model, PreTrainedModel):
        loaded = load(tmp_path / "compact")
        export_expanded(model, tmp_path / "expanded")
        plain = type(model).from_pretrained(tmp_path / "expanded")
        assert_close(outputs(plain, inputs), wanted)
    else:
        loaded = load(tmp_path / "compact", case.make())
    assert_close(outputs(loaded, inputs), wanted)
    assert TiedLayers(loaded, **case.options).tying == tying.tying
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_compressed_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.make(), case.inputs()
    before = outputs(model, inputs)
    options = dict(case.options)
    small = compress(
        model,
        [inputs],
        **{"layers": 2, "steps": 2, "probes": 1, "precision": "fp32"},
        **{"sharing": "tied", "groups": "free", "stack": options.pop("layers", None)},
        **options,
    )
    assert TiedLayers(small, **case.options).tying.num_independent == 2
    assert_close(outputs(model, inputs), before)
    wanted = outputs(small, inputs)
    export_compact(small, tmp_path)
    loaded = load(tmp_path, None if isinstance(model, PreTrainedModel) else case.make())
    assert_close(outputs(loaded, inputs), wanted)


# Models whose blocks differ

MOE = GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
DIFFERING = {
    "GPT-Neo": (gpt_neo, "attention_type is global in one and local in the other", (0, 1) * 2),
    "Gemma-2": (
        built("Gemma2ForCausalLM", **GROUPED, sliding_window=4),
        r"sliding",
        (0, 1) * 2,
    ),
    "Qwen2-MoE": (
        built(
            "Qwen2MoeForCausalLM",
            **MOE,
            **{"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
        ),
        r"mlp\.gate_proj\.weight is .* in one and absent in the other",
        (0, 1, 1, 1),
    ),
    "DeepSeek-V3": (
        built(
            "DeepseekV3ForCausalLM",
            **TEXT,
            **NO_SPECIAL,
            **{"num_key_value_heads": 2, "first_k_dense_replace": 2, "n_routed_experts": 2},
            **{"moe_intermediate_size": 16, "num_experts_per_tok": 1, "n_group": 1},
            **{"topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
            **{"qk_nope_head_dim": 4, "v_head_dim": 8},
        ),
        r"mlp\.gate_proj\.weight is .* in one and absent in the other",
        (0, 0, 2, 2),
    ),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_blocks_that_differ_are_refused_or_tied_within_their_kind(name):
    torch.manual_seed(0)
    make, says, kinds = DIFFERING[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(InputError, match=says) as caught:
        DynamicTying(model, optimizer, "dqn")
    assert "by_kind=True" in str(caught.value) and "\n" not in str(caught.value)
    tying = DynamicTying(model, optimizer, every=1, policy=RandomPolicy(0), by_kind=True)
    assert tying.tying.owners == kinds, "one independent layer of each kind"
    seen = set()
    for _ in range(8):
        loss = model(**text())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tying.step(reward=lambda: 0.0)
        tying.layers.verify()
        assert math.isfinite(loss.item())
        assert all(kinds[owner] == kinds[i] for i, owner in enumerate(tying.tying.owners))
        seen.add(tying.tying)
    assert len(seen) > 1
