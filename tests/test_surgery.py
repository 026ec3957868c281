"""Tying and untying the layers of a live model: state, storage and optimizer agree, always."""

import copy
import gc
import random
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Plain, gpt2, gpt_neo, llama, loss_of, random_tying, t5, tokens
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from layer_tying.errors import InputError
from layer_tying.surgery import TiedLayers
from layer_tying.tying import Tying

MODELS = [Plain, gpt2]
T5_LISTS = {"layers": ["encoder.block", "decoder.block"], "untied": ["*relative_attention_bias*"]}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks if isinstance(model, Plain) else model.transformer.h)


def parameters_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """For each block its parameters, read with no help of the library."""
    return [[p for _, p in b.named_parameters(remove_duplicate=False)] for b in blocks_of(model)]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    loss_of(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def fake_step(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """An optimizer step on random gradients: as good as a real one here, and faster."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def assert_storage_is(model: nn.Module, tying: Tying) -> None:
    """Identity, memory and counts, checked without the library."""
    parameters = parameters_of(model)
    for layer, owner in enumerate(tying.owners):
        for mine, its in zip(parameters[layer], parameters[owner], strict=True):
            assert mine is its
    owned = [p for layer in tying.independent_layers for p in parameters[layer]]
    assert len({id(p) for p in owned}) == len(owned)
    assert len({p.untyped_storage().data_ptr() for p in owned}) == len(owned)
    assert len({id(p) for ps in parameters for p in ps}) == len(owned)


def assert_books_agree(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each live parameter is held exactly once, and there are moments for no other."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted({id(p) for p in model.parameters()})
    assert {id(p) for p in optimizer.state} <= set(map(id, held))


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
@settings(max_examples=15, deadline=None)
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
    "options", [{"gradient": "mean"}, {"moments": "zero"}], ids=["gradient", "moments"]
)
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options.values()))):
        TiedLayers(Plain(), **options)


# Memory


def test_tied_layers_free_their_weights_gradients_and_moments_at_once():
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    dropped = [p for ps in parameters_of(model)[1:] for p in ps]
    references = [weakref.ref(p) for p in dropped]
    references += [weakref.ref(optimizer.state[p]["exp_avg"]) for p in dropped]
    del dropped
    gc.collect()
    gc.disable()
    try:
        layers.apply(Tying.all_tied(6))
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of some tensors, and of all that are made since, as long as they live."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self._count(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._count([made] if torch.is_tensor(made) else [])
        return made

    def _count(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.total)

    @property
    def total(self) -> int:
        return sum(size for ref, size in self.sizes.items() if not ref.expired())


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("moments", ["copy", "fresh"])
def test_memory_never_rises_above_the_larger_of_before_and_after(moments):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer, moments=moments)
    sizes = set()
    for _ in range(150):
        fake_step(optimizer, generator)
        with LiveBytes(model_state(model, optimizer)) as live:
            before = live.total
            layers.apply(random_tying(rng, 6))
            after = live.total
        assert live.peak == max(before, after)
        assert after == sum(t.nbytes for t in model_state(model, optimizer))
        sizes.add((layers.tying.num_independent, before))
    assert len(sizes) > 6


def test_tying_and_untying_restores_the_memory_and_the_shapes():
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    train_step(model, optimizer)
    block = sum(t.nbytes for t in parameters_of(model)[0])
    full = sum(t.nbytes for t in model_state(model, optimizer))
    layers.apply(Tying.all_tied(6))
    tied = sum(t.nbytes for t in model_state(model, optimizer))
    num_parameters = len(parameters_of(model)[0])
    assert tied == full - 5 * (3 * block + 4 * num_parameters)  # 4 bytes: AdamW's step
    layers.apply(Tying.independent(6))
    assert sum(t.nbytes for t in model_state(model, optimizer)) == full
    assert_storage_is(model, Tying.independent(6))
    train_step(model, optimizer)


# What stays a layer's own


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
    assert torch.equal(model.blocks[0](x)[0], model.blocks[1](x)[0])
    layers.apply(Tying.independent(3))
    with torch.no_grad():
        for p in model.blocks[0].parameters():
            p.zero_()
    assert not torch.equal(model.blocks[0](x)[0], model.blocks[1](x)[0])


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
    with pytest.raises(AssertionError, match="storage"):
        layers.verify()
    with pytest.raises(InputError, match=r"load_state_dict\(assign=True\)"):
        layers.apply(Tying.independent(6))


def test_verify_notices_parameters_that_share_memory_without_being_one():
    """What the published code does: ``modified.data = copied.data``."""
    model = Plain()
    layers = TiedLayers(model)
    layers.verify()
    model.blocks[2].scale.data = model.blocks[1].scale.data
    with pytest.raises(AssertionError, match="memory"):
        layers.verify()


def test_verify_notices_an_optimizer_that_is_out_of_step():
    model = Plain(2)
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer)
    group = optimizer.param_groups[0]["params"]
    stranger = nn.Parameter(torch.zeros(1))
    group.append(stranger)
    with pytest.raises(AssertionError, match="no layer uses"):
        layers.verify()
    group[-1] = group[0]
    with pytest.raises(AssertionError, match="twice"):
        layers.verify()
    group.pop()
    optimizer.state[stranger] = {}
    with pytest.raises(AssertionError, match="dead moments"):
        layers.verify()
    del optimizer.state[stranger]
    layers.verify()
    del group[-1]
    with pytest.raises(AssertionError, match="lost"):
        layers.verify()


def test_weights_are_loaded_through_any_of_their_names():
    model, other = Plain(), Plain()
    for each in (model, other):
        TiedLayers(each).apply(Tying((0, 0, 2, 2, 2, 0)))
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 8)
    assert torch.equal(model(x), other(x))
    assert_storage_is(other, Tying((0, 0, 2, 2, 2, 0)))
