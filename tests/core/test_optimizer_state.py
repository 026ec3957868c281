"""Optimizers stay in step: each live parameter once, in the group its name had, no dead moments."""

import copy
import random

import pytest
import torch
import transformers
from checks import assert_books_agree, fake_step, train_step
from tiny_models import Plain, random_tying
from torch import nn

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError

pytestmark = pytest.mark.numerics

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor of torch": torch.optim.Adafactor,
    "Adafactor of transformers": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def by_decay(model: nn.Module) -> list[dict]:
    """Two groups, as everybody makes them: matrices are decayed, vectors are not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_holds_each_live_parameter_once_and_no_dead_moments(name):
    torch.manual_seed(0)
    rng = random.Random(0)
    model = Plain()
    optimizer = OPTIMIZERS[name](by_decay(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    layers = TiedLayers(model, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(15):
        train_step(model, optimizer, seed=step)
        scheduler.step()
        layers.apply(random_tying(rng, 6))
        layers.verify()
        assert_books_agree(model, optimizer)
        decayed, others = optimizer.param_groups
        assert all(p.ndim > 1 for p in decayed["params"])
        assert all(p.ndim <= 1 for p in others["params"])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] == pytest.approx(rate * 0.9**15)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copied_moments_make_the_next_step_that_of_the_owner(name):
    """Two layers with equal weights, moments and gradients stay equal; untying adds nothing."""
    torch.manual_seed(0)
    model = Plain(2)
    optimizer = OPTIMIZERS[name](model.parameters())
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.all_tied(2))
    train_step(model, optimizer)
    layers.apply(Tying.independent(2))
    one, other = (list(block.parameters()) for block in model.blocks)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(one, other, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in one]
        optimizer.step()
        for p, q, old in zip(one, other, before, strict=True):
            assert torch.equal(p, q)
            assert not torch.equal(p, old)
    for p, q in zip(one, other, strict=True):  # copies, not aliases
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                assert value.data_ptr() != optimizer.state[q][key].data_ptr()


def test_fresh_moments_are_for_the_newly_independent_only():
    """0 0 2 2 -> 0 1 1 3: 1 splits from 0, 2 goes to 1, 3 takes over 2's storage."""
    model = Plain(4)
    optimizer = torch.optim.AdamW(model.parameters())
    layers = TiedLayers(model, optimizer, optimizer_state="fresh")
    layers.apply(Tying((0, 0, 2, 2)))
    train_step(model, optimizer)
    weights = [p.detach().clone() for p in model.blocks[3].parameters()]
    layers.apply(Tying((0, 1, 1, 3)))
    for layer, has_moments in [(0, True), (1, False), (3, False)]:
        for p in model.blocks[layer].parameters():
            assert (p in optimizer.state) == has_moments
    assert all(
        torch.equal(a, b) for a, b in zip(weights, model.blocks[3].parameters(), strict=True)
    )
    assert_books_agree(model, optimizer)
    train_step(model, optimizer)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in model.blocks[1].parameters())
    assert all(float(optimizer.state[p]["step"]) == 2 for p in model.blocks[0].parameters())


def test_a_name_that_leaves_and_comes_back_returns_to_its_group():
    """Layer-wise learning rates: the layers' groups are empty while they are tied."""
    model = Plain(4)
    groups = [
        {"params": list(block.parameters()), "lr": 0.1 * i} for i, block in enumerate(model.blocks)
    ]
    rest = [*model.embed.parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD([*groups, {"params": rest, "lr": 1.0}], lr=1.0)
    layers = TiedLayers(model, optimizer)
    for owners in [(0, 0, 0, 0), (0, 1, 1, 1), (0, 0, 2, 2), (0, 1, 2, 3), (0, 0, 0, 3)]:
        layers.apply(Tying(owners))
        train_step(model, optimizer)
        for layer, group in enumerate(optimizer.param_groups[:4]):
            own = model.blocks[layer].parameters() if owners[layer] == layer else ()
            assert set(map(id, group["params"])) == set(map(id, own))
            assert group["lr"] == 0.1 * layer
        assert [id(p) for p in optimizer.param_groups[4]["params"]] == list(map(id, rest))


def test_a_layer_that_was_never_seen_on_its_own_takes_the_groups_of_the_first_layer():
    model = Plain(3)
    TiedLayers(model).apply(Tying.all_tied(3))  # comes tied
    optimizer = torch.optim.SGD(by_decay(model), lr=0.1)
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.independent(3))
    decayed, others = optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in others["params"])
    assert_books_agree(model, optimizer)


def test_parameters_that_no_optimizer_held_are_not_entered():
    model = Plain(3)
    heads_only = torch.optim.SGD(model.head.parameters(), lr=0.1)
    layers = TiedLayers(model, heads_only)
    layers.apply(Tying.all_tied(3))
    layers.apply(Tying.independent(3))
    held = {id(p) for p in heads_only.param_groups[0]["params"]}
    assert held == {id(p) for p in model.head.parameters()}


def test_several_optimizers_each_keep_their_own():
    """As with Muon: matrices in one optimizer, the rest in another."""
    rng = random.Random(0)
    model = Plain()
    matrices, vectors = (group["params"] for group in by_decay(model))
    first = torch.optim.SGD(matrices, lr=0.01, momentum=0.9)
    second = torch.optim.AdamW(vectors)
    layers = TiedLayers(model, [first, second])
    for step in range(10):
        layers.apply(random_tying(rng, 6))
        layers.verify()
        assert_books_agree(model, first, second)
        assert all(p.ndim > 1 for p in first.param_groups[0]["params"])
        assert all(p.ndim <= 1 for p in second.param_groups[0]["params"])
        train_step(model, first, second, seed=step)


def test_parameter_names_in_the_groups_stay_beside_their_parameters():
    """torch's optimizers keep a list of names if they were made from named parameters."""
    rng = random.Random(0)
    model = Plain()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    layers = TiedLayers(model, optimizer)
    for step in range(10):
        layers.apply(random_tying(rng, 6))
        layers.verify()
        assert_books_agree(model, optimizer)
        by_name = dict(model.named_parameters())  # the name of each is its owner's
        for group in optimizer.param_groups:
            pairs = zip(group["param_names"], group["params"], strict=True)
            assert all(by_name[name] is p for name, p in pairs)
        train_step(model, optimizer, seed=step)


def test_the_order_of_the_books_depends_on_the_tying_alone():
    """So that a state dict fits a process that came to the same tying another way."""
    rng = random.Random(0)
    wandering = Plain()
    optimizer = torch.optim.AdamW(by_decay(wandering))
    layers = TiedLayers(wandering, optimizer)
    for step in range(8):
        train_step(wandering, optimizer, seed=step)
        layers.apply(random_tying(rng, 6))
    train_step(wandering, optimizer)

    fresh = Plain()
    other = torch.optim.AdamW(by_decay(fresh))
    TiedLayers(fresh, other).apply(layers.tying)
    fresh.load_state_dict(wandering.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3):  # on equal gradients in the order of the groups
        for each in (optimizer, other):
            fake_step(each, torch.Generator().manual_seed(step))
    for p, q in zip(wandering.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_layer_comes_back_to_its_group_whoever_ties_the_layers_next():
    model = Plain()
    rates = [
        {"params": block.parameters(), "lr": 0.1 * (i + 1)} for i, block in enumerate(model.blocks)
    ]
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    optimizer = torch.optim.SGD([*rates, {"params": rest, "lr": 1.0}])
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    TiedLayers(model, optimizer).apply(Tying.all_tied(6))
    TiedLayers(model, optimizer).apply(Tying.independent(6))
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    for block, group in zip(model.blocks, optimizer.param_groups, strict=False):
        assert {id(p) for p in group["params"]} == {id(p) for p in block.parameters()}


def test_state_in_tuples_is_copied_and_not_shared():
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters())
    layers = TiedLayers(model, optimizer)
    layers.apply(Tying.all_tied(6))
    for p in model.parameters():
        optimizer.state[p]["pair"] = (torch.zeros_like(p), 1)
    layers.apply(Tying.independent(6))
    for p in model.parameters():
        optimizer.state[p]["pair"][0].add_(1.0)
    assert all(optimizer.state[p]["pair"][0].eq(1.0).all() for p in model.parameters())


class Ends(nn.Module):
    """Parameters of equal shapes before, in and after the layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 8)


@pytest.mark.parametrize("grouped", [lambda model: list(model.parameters()), by_decay])
@pytest.mark.parametrize("labels", ["abcd", "abab", "aaaa"])
def test_the_order_is_that_of_an_optimizer_made_of_the_tied_model(labels, grouped):
    model = Ends()
    optimizer = torch.optim.AdamW(grouped(model))
    tie(model, Tying.from_labels(labels), optimizer=optimizer)
    afterwards = torch.optim.AdamW(grouped(model))
    for one, other in zip(optimizer.param_groups, afterwards.param_groups, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]


@pytest.mark.parametrize("num_optimizers", [1, 2])
def test_a_refused_tying_leaves_the_parameters_in_their_order(num_optimizers):
    model = Plain()
    parameters = list(reversed(list(model.parameters())))
    optimizers = [
        torch.optim.AdamW(parameters[start::num_optimizers]) for start in range(num_optimizers)
    ]

    def held():
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return [[id(p) for p in group["params"]] for group in groups]

    before = held()
    with pytest.raises(InputError):
        tie(model, "cycle", 7, optimizer=optimizers)
    assert held() == before
    tie(model, "cycle", 3, optimizer=optimizers)
    assert held() != before


def test_parameters_of_other_modules_keep_their_places():
    """Two towers and a head in one optimizer, each tower tied on its own, in any order."""
    rng = random.Random(0)
    whole = nn.ModuleDict({"one": Plain(4), "other": Plain(4), "head": nn.Linear(8, 2)})
    optimizer = torch.optim.AdamW(by_decay(whole))
    towers = [TiedLayers(whole[name], optimizer) for name in ("one", "other")]
    for _ in range(20):
        rng.choice(towers).apply(random_tying(rng, 4))
        made_anew = torch.optim.AdamW(by_decay(whole))
        for group, other in zip(optimizer.param_groups, made_anew.param_groups, strict=True):
            assert list(map(id, group["params"])) == list(map(id, other["params"]))
        for tower in towers:
            tower.verify()
