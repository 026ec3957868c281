"""Copies whose layers share nothing compute what the model does, and remember no tying."""

import copy

import pytest
import torch
import transformers
from tiny_models import Plain, gpt2, llama, loss_of, t5
from torch import nn

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import TyingSettings, is_remembered, settings_of
from layer_tying.core.untied_copy import untied_copy
from layer_tying.core.weight_access import mixed_or_scaled
from layer_tying.errors import InputError

pytestmark = pytest.mark.numerics

SCALED = {"residual_scaling": 1.0, "residual_outputs": ["attn.c_proj", "mlp.c_proj"]}
WAYS = {
    "tied": lambda model: tie(model, "cycle", 2),
    "detached": lambda model: tie(model, "cycle", 2, gradient="owner"),
    "some untied": lambda model: tie(model, "cycle", 2, untied=["ln_*"]),
    "scaled": lambda model: tie(model, "cycle", 2, **SCALED),
    "mixed": lambda model: mixed(tie(model, "cycle", 2)),
    "mixed and scaled": lambda model: mixed(tie(model, "cycle", 2, **SCALED)),
}


def mixed(layers: TiedLayers) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for vector in layers.mix():
            vector.copy_(torch.randn(2))


@pytest.mark.parametrize("way", WAYS)
def test_it_computes_the_same_with_weights_of_its_own(way):
    torch.manual_seed(0)
    model = gpt2().double()
    WAYS[way](model)
    before, state = loss_of(model), copy.deepcopy(model.state_dict())
    copied = untied_copy(model)
    torch.testing.assert_close(loss_of(copied), before, rtol=1e-12, atol=0)
    assert type(copied.transformer.h[0].attn.c_attn) is type(gpt2().transformer.h[0].attn.c_attn)
    assert not mixed_or_scaled(copied)
    assert settings_of(copied) == TyingSettings()
    assert copied.state_dict().keys() == gpt2().state_dict().keys()
    assert TiedLayers(copied).tying == Tying.independent(6)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert loss_of(model) == before


class Named(nn.Linear):
    """It has a parameter whose name ends as those of coefficients do."""

    def __init__(self):
        super().__init__(8, 8)
        self.log_mixture = nn.Parameter(torch.tensor([0.3]))

    def forward(self, input):
        return super().forward(input) * self.log_mixture


def test_a_parameter_of_the_models_own_that_is_named_like_coefficients_is_a_parameter():
    model = nn.Module()
    model.blocks = nn.ModuleList(Named() for _ in range(4))
    model.head = Named()
    layers = tie(model, "cycle", 2)
    assert model.blocks[2].log_mixture is model.blocks[0].log_mixture
    mixed(layers)
    copied = untied_copy(model)
    assert copied.state_dict().keys() == {
        f"{path}.{name}"
        for path in ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "head")
        for name in ("weight", "bias", "log_mixture")
    }
    x = torch.randn(2, 8)
    for block, plain in zip(
        [*model.blocks, model.head], [*copied.blocks, copied.head], strict=True
    ):
        torch.testing.assert_close(plain(x), block(x))


class Cosine(nn.Linear):
    """A subclass that is not linear in its weight."""

    def forward(self, input):
        return nn.functional.linear(input, nn.functional.normalize(self.weight), self.bias)


class Shifted(nn.LayerNorm):
    def forward(self, input):
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias)


class Renamed(nn.Linear):
    """A subclass that computes as its class does."""


@pytest.mark.parametrize("make", [lambda: Cosine(8, 8), lambda: Shifted(8)])
def test_a_scale_is_not_put_into_what_is_no_linear_map(make):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"down": make()}) for _ in range(4))
    tie(model, "all", residual_scaling=1.0, residual_outputs=["down"])
    with pytest.raises(InputError, match="not known to be one linear map"):
        untied_copy(model)


def test_a_subclass_that_computes_as_its_class_does_takes_the_scale():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"down": Renamed(8, 8)}) for _ in range(4))
    tie(model, "all", residual_scaling=1.0, residual_outputs=["down"])
    x = torch.randn(2, 8)
    scaled, plain = model.blocks[1]["down"], untied_copy(model).blocks[1]["down"]
    torch.testing.assert_close(plain(x), scaled(x))


@pytest.mark.parametrize("make", [Plain, llama])
def test_a_model_that_shares_nothing_is_copied_as_it_is(make):
    model = make()
    copied = untied_copy(model)
    torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loss_of(copied) == loss_of(model)


def test_stacks_that_were_named_are_found_again():
    lists = {"layers": ["encoder.block", "decoder.block"], "by_kind": True}
    model = t5()
    tie(model, Tying((0, 0, 0, 3, 3, 3)), untied=["*relative_attention_bias*"], **lists)
    copied = untied_copy(model)
    layers = TiedLayers(copied, untied=["*relative_attention_bias*"], **lists)
    assert layers.tying == Tying.independent(6)


def test_what_no_weights_can_show_is_refused():
    model = gpt2()
    tie(model, "cycle", 2, residual_scaling=1.0, residual_outputs=["attn", "mlp"])
    with pytest.raises(InputError, match="cannot be put into its weights"):
        untied_copy(model)


def test_the_scale_of_torchs_attention_goes_into_its_output_projection():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4).double()
    tie(model, "cycle", 2, residual_scaling=1.0, residual_outputs=["self_attn", "linear2"])
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(untied_copy(model)(x), model(x))


@pytest.mark.parametrize("way", ["tied", "mixed"])
def test_the_scale_of_a_lora_layer_goes_into_both_of_its_terms(way):
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(gpt2(), lora).double()
    layers = tie(model, "cycle", 2, untied=["*lora_*"], **SCALED)
    if way == "mixed":
        mixed(layers)
    copied = untied_copy(model)
    torch.testing.assert_close(loss_of(copied), loss_of(model))
    torch.testing.assert_close(loss_of(copied.merge_and_unload()), loss_of(model))


def test_the_copy_of_what_wraps_a_tied_model_remembers_no_tying():
    peft = pytest.importorskip("peft")
    model = gpt2()
    mixed(tie(model, "cycle", 2))
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    copied = untied_copy(peft.get_peft_model(model, lora), untied=["*lora_*"])
    assert not any(map(is_remembered, copied.modules()))


@pytest.mark.parametrize(
    "outputs", [["attn.resid_dropout", "mlp.dropout"], ["mlp.act", "attn.c_proj"]]
)
def test_a_scale_that_would_be_lost_is_refused(outputs):
    model = gpt2()
    tie(model, "all", residual_scaling=1.0, residual_outputs=outputs)
    with pytest.raises(InputError, match="is not known to be one linear map"):
        untied_copy(model)


def test_norms_whose_weights_are_offsets_are_no_linear_maps():
    """Gemma's norms multiply by 1 + weight, so that a factor does not fit into the weight."""
    config = transformers.Gemma2Config(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=20, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    outputs = ["post_attention_layernorm", "post_feedforward_layernorm"]
    tie(model, "all", residual_scaling=1.0, residual_outputs=outputs)
    with pytest.raises(InputError, match="a Gemma2RMSNorm is not known to be one linear map"):
        untied_copy(model)
