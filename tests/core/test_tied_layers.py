"""Tying and untying the layers of a live model: state, storage and optimizer agree, always."""

import copy
import math
import random
from functools import partial

import pytest
import torch
from checks import (
    assert_books_agree,
    assert_storage_is,
    fake_step,
    parameters_of,
    train_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Plain, gpt2, gpt_neo, llama, loss_of, random_tying, t5, tokens
from tolerance import assert_close
from torch import nn

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError, InvariantError

pytestmark = pytest.mark.numerics

MODELS = [Plain, gpt2]
T5_LISTS = {"layers": ["encoder.block", "decoder.block"], "untied": ["*relative_attention_bias*"]}


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="is a power of 1/n, got nan"):
        tie(Plain(), "all", residual_scaling=math.nan, residual_outputs=["attention"])


@pytest.mark.parametrize("make", MODELS)
def test_500_random_transitions_against_a_simulation(make):
    """Layers, weights and moments after each of them are those of a model that never shares."""
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    layers = TiedLayers(model, optimizer)
    fake_step(optimizer, generator)

    def snapshot(of):
        return [torch.cat([of(p).flatten() for p in ps]).clone() for ps in parameters_of(model)]

    for transition in range(500):
        tying = random_tying(rng, 6)
        weights = snapshot(torch.Tensor.detach)
        moments = snapshot(lambda p: optimizer.state[p]["exp_avg_sq"])
        layers.apply(tying)
        layers.verify()
        assert layers.tying == tying
        assert_storage_is(model, tying)
        assert_books_agree(model, optimizer)
        now = zip(
            snapshot(torch.Tensor.detach),
            snapshot(lambda p: optimizer.state[p]["exp_avg_sq"]),
            tying.owners,
            strict=True,
        )
        for values, squares, owner in now:
            assert torch.equal(values, weights[owner])
            assert torch.equal(squares, moments[owner])
        if transition % 50 == 0:
            train_step(model, optimizer, seed=transition)
        else:
            fake_step(optimizer, generator)
        assert_storage_is(model, tying)


@pytest.mark.parametrize("make", MODELS)
@settings(max_examples=15)
@given(data=st.data())
def test_untying_leaves_the_logits_unchanged_bitwise(make, data):
    """A transition in which groups only split changes no weight that any layer uses."""
    torch.manual_seed(0)
    model = make().eval()
    layers = TiedLayers(model)
    labels = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    finer = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    x = torch.randn(2, 4, 8) if make is Plain else tokens()
    layers.apply(Tying.from_labels(labels))
    before = model(x)
    layers.apply(Tying.from_labels(zip(labels, finer, strict=True)))
    after = model(x)
    if make is gpt2:
        before, after = before.logits, after.logits
    assert torch.equal(before, after)


def test_an_owner_leaves_its_group_and_the_rest_keep_its_storage():
    """0 1 1 1 4 -> 0 0 2 2 0: layers 2 and 3 go on with layer 1's very parameters, uncopied."""
    model = Plain(5)
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying((0, 1, 1, 1, 4)))
    train_step(model, optimizer)
    of_0, of_1, _, _, of_4 = [list(ps) for ps in parameters_of(model)]
    states = [dict(optimizer.state[p]) for p in of_1]
    layers.apply(Tying((0, 0, 2, 2, 0)))
    now = parameters_of(model)
    for layer, expected in enumerate([of_0, of_0, of_1, of_1, of_0]):
        assert all(mine is its for mine, its in zip(now[layer], expected, strict=True))
    assert all(optimizer.state[p] == s for p, s in zip(of_1, states, strict=True))
    assert not any(p in optimizer.state for p in of_4)
    assert_books_agree(model, optimizer)


def test_a_chain_of_ties_ends_at_its_root():
    """1 goes to 0 while 2 goes to 1 and 3 to 2: all are layer 0's, not 1's or 2's old weights."""
    model = Plain(4)
    first = parameters_of(model)[0]
    TiedLayers(model).apply(Tying.from_action([0, 0, 1, 2]))
    assert all(ps[k] is first[k] for ps in parameters_of(model) for k in range(len(first)))


def test_groups_that_exchange_members_take_their_weights_from_before():
    """0 1 0 1 -> 0 0 2 2: layer 3 leaves layer 1's group for layer 2, which splits from layer 0."""
    model = Plain(4)
    layers = TiedLayers(model)
    layers.apply(Tying((0, 1, 0, 1)))
    of_0 = [p.detach().clone() for p in parameters_of(model)[0]]
    layers.apply(Tying((0, 0, 2, 2)))
    now = parameters_of(model)
    assert all(torch.equal(now[layer][k], of_0[k]) for layer in range(4) for k in range(len(of_0)))
    assert_storage_is(model, Tying((0, 0, 2, 2)))


def test_a_tying_that_does_not_fit_changes_nothing():
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters())
    layers = TiedLayers(model, optimizer)
    groups = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(InputError, match="7 layers does not fit a model of 6"):
        layers.apply(Tying.all_tied(7))
    assert layers.tying == Tying.independent(6)
    assert_storage_is(model, Tying.independent(6))
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], params, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"gradient": "mean"}, {"optimizer_state": "zero"}],
    ids=["gradient", "optimizer state"],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options.values()))):
        TiedLayers(Plain(), **options)


# Other models


def test_t5_ties_within_encoder_and_decoder():
    model = t5()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer, by_kind=True, **T5_LISTS)
    assert layers.rules.tightest == Tying((0, 0, 0, 3, 3, 3))
    with pytest.raises(InputError, match="layer 3 cannot use the weights of layer 0"):
        layers.apply(Tying.all_tied(6))
    rng = random.Random(0)
    for _ in range(10):
        action = [rng.choice(layers.rules.choices(i)) for i in range(6)]
        layers.apply(Tying.from_action(action))
        layers.verify()
        assert_books_agree(model, optimizer)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_gpt_neo_ties_within_its_kinds_of_attention():
    model = gpt_neo()
    layers = TiedLayers(model, by_kind=True)
    layers.apply(layers.rules.tightest)
    weight = [block.mlp.c_fc.weight for block in model.transformer.h]
    assert weight[0] is weight[2] and weight[1] is weight[3] and weight[0] is not weight[1]
    loss_of(model).backward()
    with pytest.raises(InputError, match="layer 1 cannot use the weights of layer 0"):
        layers.apply(Tying((0, 0, 2, 3)))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("owners", [(0, 0, 0, 0, 0, 0), (0, 1, 1, 0, 4, 1)])
def test_generation_with_a_cache_equals_generation_without(make, owners):
    torch.manual_seed(0)
    model = make().eval()
    TiedLayers(model).apply(Tying(owners))
    prompt = tokens(batch=2, length=5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(prompt, use_cache=True, **options)
    uncached = model.generate(prompt, use_cache=False, **options)
    assert cached.sequences.shape == (2, 17)
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# Interference from outside


def test_storage_that_was_changed_from_outside_is_noticed():
    """``load_state_dict(assign=True)`` gives every layer weights of its own."""
    model = Plain()
    layers = TiedLayers(model)
    layers.apply(Tying.all_tied(6))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(InvariantError, match="the layers share as"):
        layers.verify()
    with pytest.raises(InputError, match=r"load_state_dict\(assign=True\)"):
        layers.apply(Tying.independent(6))


def test_verify_notices_parameters_that_share_memory_without_being_one():
    """What the published code does: ``modified.data = copied.data``."""
    model = Plain()
    layers = TiedLayers(model)
    layers.verify()
    model.blocks[2].scale.data = model.blocks[1].scale.data
    with pytest.raises(InvariantError, match="memory"):
        layers.verify()


def test_verify_notices_an_optimizer_that_is_out_of_step():
    model = Plain(2)
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    stranger = model.blocks[1].scale
    layers.apply(Tying.all_tied(2))
    group = optimizer.param_groups[0]["params"]
    group.append(nn.Parameter(torch.zeros(1)))
    layers.verify()  # which may be of another module
    group[-1] = stranger
    with pytest.raises(InvariantError, match="no layer uses"):
        layers.verify()
    group[-1] = group[0]
    with pytest.raises(InvariantError, match="twice"):
        layers.verify()
    group.pop()
    optimizer.state[stranger] = {}
    with pytest.raises(InvariantError, match="state of a parameter"):
        layers.verify()
    del optimizer.state[stranger]
    layers.verify()
    group[:] = [p for p in group if p is not model.blocks[1].scale]
    with pytest.raises(InvariantError, match="lost"):
        layers.verify()


def test_weights_are_loaded_through_any_of_their_names():
    model, other = Plain(), Plain()
    for each in (model, other):
        TiedLayers(each).apply(Tying((0, 0, 2, 2, 2, 0)))
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 8)
    assert_close(model(x), other(x))
    assert_storage_is(other, Tying((0, 0, 2, 2, 2, 0)))


def test_training_goes_on_where_memory_ran_out_for_one_of_the_copies(monkeypatch):
    """The layers that could not be untied stay tied, and the optimizer holds what there is."""
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.all_tied(6))
    copy, copied = layers._copy, []

    def copy_twice(parameters):
        if len(copied) == 2:
            raise torch.OutOfMemoryError("no room")
        copied.append(parameters)
        return copy(parameters)

    monkeypatch.setattr(layers, "_copy", copy_twice)
    with pytest.raises(torch.OutOfMemoryError):
        layers.apply(Tying.independent(6))
    assert layers.tying == Tying((0, 1, 2, 0, 0, 0))
    layers.verify()
    assert_storage_is(model, layers.tying)
    assert_books_agree(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))
    monkeypatch.undo()
    layers.apply(Tying.independent(6))
    layers.verify()


@pytest.mark.parametrize("name", ["untied", "residual_outputs"])
def test_a_text_where_patterns_are_wanted_is_refused(name):
    with pytest.raises(InputError, match=rf"{name} is a list.*: write \['\*norm\*'\]"):
        TiedLayers(Plain(), **{name: "*norm*"})


def test_a_copy_that_runs_out_of_memory_leaves_nothing_in_the_optimizer(monkeypatch):
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.all_tied(6))
    train_step(model, optimizer)
    clone, cloned = torch.Tensor.clone, []

    def clone_some(tensor, *args, **options):
        cloned.append(tensor)
        if len(cloned) > 5:
            raise torch.OutOfMemoryError("no room")
        return clone(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "clone", clone_some)
    with pytest.raises(torch.OutOfMemoryError):
        layers.apply(Tying.independent(6))
    monkeypatch.undo()
    layers.verify()
    assert_books_agree(model, optimizer)
    optimizer.state_dict()
    train_step(model, optimizer)
    layers.apply(Tying.independent(6))
    layers.verify()


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (["attn*"], r"names transformer\.h\.0\.attn and .*\.attn\.\w+, which is a part of it"),
        (["mlp.c_proj", "mlp"], r"names .*h\.0\.mlp and .*h\.0\.mlp\.c_proj, which is a part"),
    ],
)
def test_what_would_be_scaled_twice_is_refused(outputs, says):
    with pytest.raises(InputError, match=says):
        tie(gpt2(), "cycle", 2, residual_scaling=1.0, residual_outputs=outputs)


def test_a_module_that_nobody_calls_is_no_residual_output():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)
    outputs = ["self_attn.out_proj", "linear2"]
    with pytest.raises(InputError, match="never calls: name 'self_attn' instead"):
        tie(model, "cycle", 2, residual_scaling=1.0, residual_outputs=outputs)


@pytest.mark.parametrize("mixes", [True, False])
def test_what_wraps_a_tied_model_or_is_in_one_does_not_take_over(mixes):
    outputs = ["attn.c_proj", "mlp.c_proj"]
    model = gpt2()
    layers = tie(model, "cycle", 2, residual_scaling=1.0, residual_outputs=outputs)
    if mixes:
        layers.mix()
    before = loss_of(model)
    for other in (nn.Sequential(model), model.transformer):
        with pytest.raises(InputError, match="is mixed or scaled by a tying of"):
            TiedLayers(other)
    assert loss_of(model) == before
    TiedLayers(model).verify()


def test_a_pattern_of_residual_outputs_that_is_the_name_of_nothing_is_refused():
    with pytest.raises(
        InputError, match=r"'mlp.c_prj' is the name of no module in transformer.h.0"
    ):
        TiedLayers(gpt2(), residual_outputs=["attn.c_proj", "mlp.c_prj"])


def test_quantised_weights_are_copied_with_what_they_need():
    """Of a 4-bit base model, whose weights are a subclass of Parameter with a state."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    make = partial(bitsandbytes.nn.Linear4bit, 64, 64, bias=False, quant_type="nf4")
    model = nn.Module()
    model.layers = nn.ModuleList(make() for _ in range(3)).to("cpu")  # which quantises them
    layers = TiedLayers(model)
    layers.apply(Tying.all_tied(3))
    x = torch.randn(2, 64)
    expected = model.layers[0](x)
    layers.apply(Tying.independent(3))
    for layer in model.layers:
        assert torch.equal(layer(x), expected)
