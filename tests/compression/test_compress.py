"""``compress`` as a caller uses it."""

import copy

import pytest
import torch
from tiny_models import Plain, gpt2, t5, tokens

from layer_tying import (
    InputError,
    TiedLayers,
    compress,
    export_compact,
    export_expanded,
    load,
    tie,
)
from layer_tying.compression.outcome import divergence

BATCHES = [{"input_ids": tokens(seed=i), "labels": tokens(seed=i)} for i in range(4)]
FEW = {"steps": 6, "lr": 1e-2, "probes": 1, "precision": "fp32"}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_a_model_becomes_smaller_and_the_given_one_stays(tmp_path):
    torch.manual_seed(0)
    model = gpt2().train()
    before = logits_of(model.eval())
    model.train()
    small = compress(model, BATCHES, layers=2, **FEW)
    assert model.training and not small.training
    assert torch.equal(logits_of(model), before)
    layers = TiedLayers(small)
    assert layers.tying.num_independent == 2
    assert layers.mixtures is not None
    wanted = logits_of(small)
    export_compact(small, tmp_path / "compact")
    torch.testing.assert_close(logits_of(load(tmp_path / "compact")), wanted)
    export_expanded(small, tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits_of(plain), wanted, rtol=1e-4, atol=1e-5)


def test_what_was_compressed_trains_on():
    small = compress(gpt2(), BATCHES, layers=2, **FEW)
    optimizer = torch.optim.AdamW(small.train().parameters(), lr=1e-2)
    layers = TiedLayers(small, optimizer)
    losses = []
    for _ in range(8):
        loss = small(**BATCHES[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layers.verify()


def test_any_torch_model_by_tensors():
    torch.manual_seed(0)
    model = Plain()
    small = compress(model, [torch.randn(2, 4, 8)], layers=2, sharing="tied", **FEW)
    assert TiedLayers(small).tying.num_independent == 2


def test_an_encoder_and_a_decoder_by_name():
    small = compress(
        t5(),
        BATCHES,
        layers=2,
        sharing="tied",
        stack=["encoder.block", "decoder.block"],
        untied=["*relative_attention_bias*"],
        by_kind=True,
        **FEW,
    )
    assert TiedLayers(small).tying.owners == (0, 0, 0, 3, 3, 3)


@pytest.mark.parametrize("sharing", ["tied", "mixture"])
def test_a_budget_of_parameters_holds(sharing):
    model = gpt2()
    budget = 2 * sum(p.numel() for p in model.parameters()) // 3
    small = compress(model, BATCHES, parameters=budget, sharing=sharing, **FEW)
    assert sum(p.numel() for p in small.parameters()) <= budget


def test_batches_that_can_be_gone_through_once_only_are_refused_when_they_end():
    with pytest.raises(InputError, match="ended after 4, and 6 steps"):
        compress(gpt2(), iter(BATCHES), layers=2, **FEW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give the size to reach"),
        ({"layers": 0}, "layers is at least 1, got 0"),
        ({"bytes": 10}, "a budget of 10 bytes is too small"),
        ({"layers": 2, "stack": "nothing"}, "no module 'nothing'"),
        ({"layers": 2, "learning_rate": 1.0}, "no setting 'learning_rate'"),
        ({"layers": 2, "groups": "best"}, "groups is one of"),
        ({"layers": 1}, "a mixture needs two independent layers"),
        ({"layers": 9}, "room for all 6 layers: nothing would be shared"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        compress(gpt2(), BATCHES, **{**FEW, **options})


def shared(way: str) -> torch.nn.Module:
    """A model of six layers that share weights already."""
    torch.manual_seed(0)
    model = gpt2()
    scaled = {"residual_scaling": 1.0, "residual_outputs": ["attn.c_proj", "mlp.c_proj"]}
    layers = tie(model, "cycle", 4, **(scaled if way == "scaled" else {}))
    if way == "mixed":
        layers.mix()
    return model


@pytest.mark.parametrize("way", ["tied", "scaled", "mixed"])
@pytest.mark.parametrize("sharing", ["tied", "mixture"])
def test_a_model_that_shares_already_gets_smaller_still(way, sharing):
    model = shared(way)
    before, size = logits_of(model), sum(p.numel() for p in model.parameters())
    few = FEW | {"lr": 1e-8, "steps": 1}
    small = compress(model, BATCHES, layers=2, sharing=sharing, **few)
    assert TiedLayers(small).tying.num_independent == 2
    assert sum(p.numel() for p in small.parameters()) < size
    assert torch.equal(logits_of(model), before)
    whole = compress(model, BATCHES, layers=5, sharing=sharing, **few)  # nothing is lost
    torch.testing.assert_close(logits_of(whole), before, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("start", ["groups", "closed-form"])
def test_half_precision_is_healed_in_single(dtype, start):
    torch.manual_seed(0)
    whole = gpt2(4)
    options = {"layers": 2, "start": start, **FEW, "steps": 60, "lr": 3e-3}
    half = compress(copy.deepcopy(whole).to(dtype), BATCHES, **options)
    single = compress(copy.deepcopy(whole), BATCHES, **options)
    assert {p.dtype for p in half.parameters()} == {dtype}
    kl = [
        float(divergence(logits_of(each.float()).flatten(0, 1), logits_of(whole).flatten(0, 1)))
        for each in (half, single)
    ]
    assert kl[0] < 2 * kl[1] + 1e-3


def test_healing_that_diverges_is_one_line():
    with pytest.raises(InputError, match="smaller lr than 10000"):
        compress(gpt2(), BATCHES, layers=2, **FEW | {"steps": 30, "lr": 1e4})


def test_a_model_that_was_frozen_is_healed():
    model = gpt2().requires_grad_(False)
    small = compress(model, BATCHES, layers=2, sharing="tied", **FEW)
    assert not any(p.requires_grad for p in model.parameters())
    block, was = small.transformer.h[0].mlp.c_fc.weight, model.transformer.h
    assert not any(torch.equal(block, layer.mlp.c_fc.weight) for layer in was)


def test_modules_stay_in_their_modes_also_when_it_fails():
    model = gpt2().train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    compress(model, BATCHES, layers=2, **FEW)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(InputError):
        compress(model, iter(BATCHES), layers=2, **FEW)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["accumulate", "compile", "epochs", "max_steps", "parallel"])
def test_settings_that_it_does_not_use_are_refused(name):
    with pytest.raises(InputError, match=f"does not take '{name}'"):
        compress(gpt2(), BATCHES, layers=2, **FEW, **{name: 1})


def test_batches_of_another_kind_are_refused():
    with pytest.raises(InputError, match="a tensor, got a list: pass outcome_of"):
        compress(gpt2(), [[tokens()]], layers=2, **FEW)


def test_layers_that_share_by_themselves_are_untied_by_name():
    """T5's decoder, two of whose layers are one from the start, and which has two lists."""
    model = t5()
    blocks = model.decoder.block
    for name, _ in [*blocks[1].named_parameters()]:
        path, _, attribute = name.rpartition(".")
        there = blocks[0].get_submodule(path)._parameters.get(attribute)
        if there is not None:
            blocks[1].get_submodule(path)._parameters[attribute] = there
    options = {"stack": "decoder.block", "untied": ["*relative_attention_bias*"]}
    small = compress(model, BATCHES, layers=1, sharing="tied", **options, **FEW)
    assert TiedLayers(small, layers="decoder.block").tying.num_independent == 1


def test_batches_may_hold_more_than_tensors():
    small = compress(gpt2(), [{**batch, "use_cache": False} for batch in BATCHES], layers=2, **FEW)
    assert TiedLayers(small).tying.num_independent == 2


def test_groups_that_cannot_keep_kinds_apart_are_refused():
    options = {"stack": ["encoder.block", "decoder.block"], "by_kind": True, "sharing": "tied"}
    untied = ["*relative_attention_bias*"]
    with pytest.raises(InputError, match="no cycle groups of 3 keep layers apart"):
        compress(t5(), BATCHES, layers=3, groups="cycle", untied=untied, **options, **FEW)


def test_a_loss_that_is_not_finite_is_refused():
    labels = torch.full_like(tokens(), -100)
    with pytest.raises(InputError, match="the model's loss is nan"):
        compress(gpt2(), [{"input_ids": tokens(), "labels": labels}], layers=2, **FEW)
