"""What a layer keeps for itself, and layers that share something before they are tied."""

import weakref

import pytest
import torch
from checks import (
    assert_books_agree,
    assert_storage_is,
    blocks_of,
    parameters_of,
    train_step,
)
from tiny_models import Plain, gpt2, loss_of, t5
from tolerance import assert_close
from torch import nn

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import TyingSettings, settings_of
from layer_tying.errors import InputError

pytestmark = pytest.mark.numerics


def test_buffers_hooks_and_indices_stay_the_layers_own():
    model = gpt2()
    for i, block in enumerate(model.transformer.h):
        block.register_buffer("mark", torch.tensor(i))
    called = []
    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    layers = TiedLayers(model)
    layers.apply(Tying.all_tied(6))
    loss_of(model)
    assert called == [0, 1, 2, 3, 4, 5]
    assert [int(block.mark) for block in model.transformer.h] == [0, 1, 2, 3, 4, 5]
    assert [block.attn.layer_idx for block in model.transformer.h] == [0, 1, 2, 3, 4, 5]
    assert len(set(map(id, blocks_of(model)))) == 6


def test_untied_parameters_stay_the_layers_own_and_are_optimized():
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer, untied=["norm.*", "scale"])
    layers.apply(Tying.all_tied(6))
    norms = [block.norm.weight for block in model.blocks]
    assert len(set(map(id, norms))) == len({id(block.scale) for block in model.blocks}) == 6
    assert len({id(block.feed_forward[0].weight) for block in model.blocks}) == 1
    assert_books_agree(model, optimizer)
    before = [norm.detach().clone() for norm in norms]
    train_step(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, norms, strict=True))


def test_a_parameter_shared_with_the_rest_of_the_model_stays_as_it_is():
    model = Plain()
    model.final_norm = nn.LayerNorm(8)
    shared = model.final_norm.weight
    for block in model.blocks:
        block.norm.weight = shared
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    for tying in (Tying.all_tied(6), Tying.independent(6)):
        layers.apply(tying)
        layers.verify()
        assert all(block.norm.weight is shared for block in model.blocks)
        assert_books_agree(model, optimizer)


def test_layers_that_share_only_a_part_are_refused():
    model = Plain()
    model.blocks[3].norm.weight = model.blocks[1].norm.weight
    with pytest.raises(InputError, match=r"blocks.1 and blocks.3 share some .*untied="):
        TiedLayers(model)
    TiedLayers(model, untied=["norm.weight"]).apply(Tying.all_tied(6))


def test_a_model_that_comes_tied_is_read_off_its_storage():
    model = Plain()
    for layer, owner in [(1, 0), (4, 3), (5, 3)]:
        for (name, _), p in zip(
            blocks_of(model)[layer].named_parameters(), parameters_of(model)[owner], strict=True
        ):
            path, _, attribute = name.rpartition(".")
            setattr(blocks_of(model)[layer].get_submodule(path), attribute, p)
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    assert layers.tying == Tying((0, 0, 2, 3, 3, 3))
    layers.verify()
    layers.apply(Tying.independent(6))
    assert_storage_is(model, Tying.independent(6))
    assert_books_agree(model, optimizer)


def test_a_parameter_that_a_block_uses_twice_stays_one():
    model = Plain(4)
    for block in model.blocks:
        block.twin = nn.LayerNorm(8)
        block.twin.weight = block.norm.weight
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    for tying in (Tying.all_tied(4), Tying((0, 0, 2, 2)), Tying.independent(4)):
        layers.apply(tying)
        layers.verify()
        assert all(block.twin.weight is block.norm.weight for block in model.blocks)
        assert_books_agree(model, optimizer)
    assert len({id(block.twin.weight) for block in model.blocks}) == 4


def test_frozen_layers_stay_frozen():
    model = Plain(3)
    model.blocks.requires_grad_(False)
    layers = TiedLayers(model)
    layers.apply(Tying.all_tied(3))
    layers.apply(Tying.independent(3))
    assert not any(p.requires_grad for p in model.blocks.parameters())


def test_modules_that_keep_their_own_list_of_weights_use_the_shared_ones():
    """torch's recurrent networks run on such a list."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.GRU(4, 4) for _ in range(3))
    x = torch.randn(2, 1, 4)
    layers = TiedLayers(model)
    dropped = weakref.ref(model.blocks[1].weight_hh_l0)
    layers.apply(Tying((0, 0, 2)))
    assert dropped() is None
    assert_close(model.blocks[0](x)[0], model.blocks[1](x)[0])
    layers.apply(Tying.independent(3))
    with torch.no_grad():
        for p in model.blocks[0].parameters():
            p.zero_()
    assert not torch.equal(model.blocks[0](x)[0], model.blocks[1](x)[0])


def test_what_is_refused_of_stacks_that_were_named_is_forgotten():
    model = t5()
    lists = {"layers": ["encoder.block", "decoder.block"], "by_kind": True}
    with pytest.raises(InputError, match="cannot use"):
        tie(model, "all", untied=["*relative_attention_bias*"], **lists)
    assert settings_of(model) == TyingSettings()
