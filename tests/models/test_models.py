"""Models built tied: the same as transformers builds, but that tied layers never get storage."""

import copy
import json
import math
import subprocess
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from built_models import CLASSES, NUM_LAYERS, SOME_TIED, config_of, inputs_for
from tolerance import assert_close

from layer_tying.core.find import find_layers
from layer_tying.core.residual_scale import residual_modules
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.models.build import build_model, context_of, model_class
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES, patch_size, residual_outputs

pytestmark = pytest.mark.numerics

KINDS = pytest.mark.parametrize("kind", CLASSES)
TYINGS = pytest.mark.parametrize(
    "tying", [Tying.all_tied(NUM_LAYERS), SOME_TIED, Tying.independent(NUM_LAYERS)], ids=str
)


def build(kind: str, tying: Tying = SOME_TIED, seed: int = 0, **options: Any):
    torch.manual_seed(seed)
    return build_model(config_of(kind), tying, **options).eval()


def plain(kind: str, seed: int = 0):
    """What transformers builds, with no help of the library."""
    torch.manual_seed(seed)
    return CLASSES[kind](config_of(kind)).eval()


def parameters_of_layers(model) -> list[dict[str, torch.nn.Parameter]]:
    blocks = find_layers(model).blocks
    return [dict(block.named_parameters(remove_duplicate=False)) for block in blocks]


@KINDS
def test_the_class_is_the_one_the_family_trains_with(kind):
    assert model_class(config_of(kind)) is CLASSES[kind]
    assert config_of(kind).num_hidden_layers == NUM_LAYERS


@KINDS
@TYINGS
def test_a_layer_uses_its_owners_parameters_and_no_other(kind, tying):
    layers = parameters_of_layers(build(kind, tying))
    for layer, owner in enumerate(tying.owners):
        assert layers[layer].keys() == layers[owner].keys()
        for name, parameter in layers[layer].items():
            assert parameter is layers[owner][name]
    owned = [p for layer in tying.independent_layers for p in layers[layer].values()]
    assert len({p.untyped_storage().data_ptr() for p in owned}) == len(owned)
    assert TiedLayers(build(kind, tying)).tying == tying


@KINDS
def test_nothing_is_left_without_storage(kind):
    model = build(kind)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert all(p.requires_grad for p in model.parameters())


@KINDS
@TYINGS
def test_buffers_are_those_of_a_plain_model(kind, tying):
    ours, theirs = (dict(model.named_buffers()) for model in (build(kind, tying), plain(kind)))
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        assert buffer.dtype == theirs[name].dtype
        assert torch.equal(buffer, theirs[name]), name
    persistent = set(build(kind, tying).state_dict()) & ours.keys()
    assert persistent == set(plain(kind).state_dict()) & theirs.keys()


@KINDS
def test_an_untied_model_computes_what_transformers_computes_from_its_weights(kind):
    ours = build(kind, Tying.independent(NUM_LAYERS))
    theirs = plain(kind, seed=1)
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_for(kind)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@KINDS
def test_a_tied_model_computes_what_its_untied_copy_computes(kind):
    ours, theirs = build(kind), plain(kind, seed=1)
    theirs.load_state_dict(ours.state_dict())  # which names the shared weights at every layer
    inputs = inputs_for(kind)
    with torch.no_grad():
        assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def drawn(models) -> dict[str, np.ndarray]:
    """All values of every kind of tensor, over layers and models."""
    values = defaultdict(list)
    for model in models:
        names = find_layers(model).names
        for name, parameter in model.named_parameters():
            block = next((b for b in names if name.startswith(f"{b}.")), None)
            key = name if block is None else f"block{name.removeprefix(block)}"
            values[key].append(parameter.detach().double().numpy().ravel())
    return {name: np.concatenate(arrays) for name, arrays in values.items()}


@KINDS
@TYINGS
def test_weights_are_drawn_as_transformers_draws_them(kind, tying):
    """Of every kind of tensor the same mean and standard deviation, within sampling error."""
    ours = drawn(build(kind, tying, seed) for seed in range(6))
    theirs = drawn(plain(kind, seed) for seed in range(6, 12))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found, deviation = ours[name], expected.std()
        error = 5 * (1 / len(found) + 1 / len(expected)) ** 0.5  # of a mean, in deviations
        assert found.mean() == pytest.approx(expected.mean(), abs=error * deviation), name
        assert found.std() == pytest.approx(deviation, rel=error), name


@TYINGS
def test_gpt2_scales_what_enters_the_residual_stream_by_the_real_number_of_layers(tying):
    model = build("gpt2", tying)
    for block in model.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            expected = 0.02 / (2 * NUM_LAYERS) ** 0.5
            assert float(projection.weight.detach().std()) == pytest.approx(expected, rel=0.1)
        assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@KINDS
def test_independent_layers_start_from_different_weights(kind):
    layers = parameters_of_layers(build(kind, SOME_TIED))
    matrices = [name for name, parameter in layers[0].items() if parameter.ndim > 1]
    assert matrices
    assert not [name for name in matrices if torch.equal(layers[0][name], layers[2][name])]


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind != "vit"])
def test_the_head_keeps_what_it_shares_with_the_embeddings(kind):
    ours, theirs = build(kind), plain(kind)
    same = [
        m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (ours, theirs)
    ]
    assert same[0] == same[1]
    outside = {name for name, _ in plain(kind).named_parameters()}
    assert {
        name for name, _ in build(kind, Tying.independent(NUM_LAYERS)).named_parameters()
    } == outside


@KINDS
def test_the_seed_decides(kind):
    one, same, other = build(kind, seed=3), build(kind, seed=3), build(kind, seed=4)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_weights_can_be_of_another_type():
    model = build("gpt2", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(**inputs_for("gpt2")).logits.dtype == torch.bfloat16


@KINDS
def test_a_built_model_trains_and_copies(kind):
    model = build(kind).train()
    model(**inputs_for(kind)).logits.float().pow(2).mean().backward()
    for layer in parameters_of_layers(model):
        assert any(parameter.grad is not None for parameter in layer.values())
    assert TiedLayers(copy.deepcopy(model)).tying == SOME_TIED


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_llama_computes_at_any_number_of_heads(heads):
    config = config_of("llama", 2, 12, heads=heads, length=8)
    model = build_model(config, Tying.independent(2))
    assert model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, 60)


MEASURE = """
import json, torch
from layer_tying.runs.memory import peak_bytes
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import TextInput
from layer_tying.core.tying import Tying
cpu = torch.device("cpu")
def config(num_layers, width):
    return transformers_config(ModelConfig("gpt2", num_layers, 4, width), TextInput(1000, 64))
build_model(config(2, 16), Tying.all_tied(2))  # what any first model costs
before = peak_bytes(cpu)
for tying in (Tying.all_tied(24), Tying.independent(24)):
    model = build_model(config(24, 512), tying)
    block = sum(p.numel() * p.element_size() for p in model.transformer.h[0].parameters())
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps([peak_bytes(cpu) - before, block, total]))
    del model
"""


def test_a_tied_start_allocates_one_block_and_not_all():
    """At 24 layers of width 512: one block is 12.6 MB, and all of them are 300 MB."""
    command = [sys.executable, "-c", MEASURE]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tied, untied = map(json.loads, output.splitlines())
    growth, block, total = tied
    others = total - block
    assert 0.75 * total < growth < others + 2 * block
    growth, _, total = untied
    assert total == others + 24 * block
    assert growth > 24 * block


def test_scaling_names_what_a_layer_has_where_nothing_matches():
    layers = TiedLayers(build("gpt2"))
    before = {n: p.detach().clone() for n, p in layers.parameters(0).items()}
    with pytest.raises(InputError, match=r"h\.0 has no module named o_proj: .* out of ln_1, "):
        residual_modules(layers.stack, ["o_proj"])
    assert all(torch.equal(p, before[n]) for n, p in layers.parameters(0).items())


def test_the_residual_outputs_of_other_models_are_not_known():
    with pytest.raises(InputError, match="gpt_neox are not known: they are of gpt2, llama, bert"):
        residual_outputs("gpt_neox")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-causal", "vit"])
def test_a_familys_name_is_its_model_type(kind):
    assert config_of(kind).model_type == kind.partition("-")[0]
    assert config_of(kind).model_type in FAMILIES


def test_a_head_of_llama_has_an_even_width():
    with pytest.raises(InputError, match=r"emsize 12 over nhead 4 is 3: .* llama .* multiple of 2"):
        ModelConfig("llama", 2, nhead=4, emsize=12)
    assert ModelConfig("gpt2", 2, nhead=4, emsize=12)


@pytest.mark.parametrize(
    ("size", "side"), [(8, 1), (32, 4), (28, 4), (27, None), (25, 5), (96, 12)]
)
def test_images_are_cut_into_equal_patches(size, side):
    if side is None:
        with pytest.raises(InputError, match=r"27 x 27 pixels .* multiple of 4, 5, 6, 7 or 8"):
            patch_size(size)
    else:
        assert patch_size(size) == side


def test_the_context_of_models_whose_positions_begin_late_or_never_end():
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.RobertaConfig(
        **sizes, num_hidden_layers=2, max_position_embeddings=66, pad_token_id=1
    )
    roberta = transformers.RobertaForCausalLM(config).eval()
    assert context_of(roberta) == 64
    roberta(torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 65), 5))
    bloom = transformers.BloomConfig(vocab_size=40, hidden_size=8, n_layer=2, n_head=2)
    assert context_of(transformers.BloomForCausalLM(bloom)) == math.inf
