"""Layers that are frozen where they would be tied: what trains and moves, and is never copied."""

import random

import pytest
import torch
from checks import blocks_of, parameters_of, train_step
from small_runs import crashed_at, lines_of, small, traces_of, write_text
from tiny_models import Plain, gpt2, random_tying

from layer_tying.core.frozen_layers import FrozenLayers
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.dynamic import DynamicTying
from layer_tying.errors import InputError, InvariantError
from layer_tying.policies.simple import Schedule
from layer_tying.runs.train import train

NUM_LAYERS = 5
ALL = Tying.all_tied(NUM_LAYERS)


def frozen_layers(model, copies: bool, claim: Tying = ALL):
    """The layers of a model whose claim is that all are tied, and their optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return FrozenLayers(TiedLayers(model, optimizer), claim, copies=copies), optimizer


def values_of(model) -> list[torch.Tensor]:
    """Each layer's weights, in one vector."""
    return [torch.cat([p.detach().flatten() for p in layer]) for layer in parameters_of(model)]


def trainable_layers(model) -> list[int]:
    """Read off the parameters, whose flags must agree within a layer."""
    flags = [{p.requires_grad for p in layer} for layer in parameters_of(model)]
    assert all(len(each) == 1 for each in flags)
    return [i for i, each in enumerate(flags) if each == {True}]


def layers_with_moments(model, optimizer) -> list[int]:
    return [
        i
        for i, layer in enumerate(parameters_of(model))
        if any(p in optimizer.state for p in layer)
    ]


@pytest.mark.parametrize("make", [gpt2, Plain])
def test_nothing_is_ever_copied_and_only_independent_layers_move(make):
    torch.manual_seed(0)
    model = make(NUM_LAYERS)
    layers, optimizer = frozen_layers(model, copies=False)
    own = [[id(p) for p in layer] for layer in parameters_of(model)]
    rng = random.Random(0)
    for step in range(30):
        claim = random_tying(rng, NUM_LAYERS)
        layers.apply(claim)
        layers.verify()
        assert layers.tying == claim
        assert trainable_layers(model) == list(claim.independent_layers)
        before = values_of(model)
        train_step(model, optimizer, seed=step)
        after = values_of(model)
        moved = [i for i in range(NUM_LAYERS) if not torch.equal(before[i], after[i])]
        assert moved == list(claim.independent_layers)
        assert layers_with_moments(model, optimizer) == moved
        assert [[id(p) for p in layer] for layer in parameters_of(model)] == own
        for i in range(NUM_LAYERS):
            for j in range(i):
                assert not torch.equal(after[i], after[j]), "a layer was copied"


def test_a_layer_that_is_frozen_loses_gradient_and_moments_and_starts_afresh():
    model = gpt2(NUM_LAYERS)
    layers, optimizer = frozen_layers(model, copies=False, claim=Tying.independent(NUM_LAYERS))
    train_step(model, optimizer)
    assert layers_with_moments(model, optimizer) == [0, 1, 2, 3, 4]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    layers.apply(Tying((0, 0, 2, 2, 0)))
    assert layers_with_moments(model, optimizer) == [0, 2]
    assert [layer[0].grad is None for layer in parameters_of(model)] == [
        *(False, True, False, True, True)
    ]
    optimizer.zero_grad()
    layers.apply(Tying((0, 1, 2, 2, 0)))
    train_step(model, optimizer)
    steps = [optimizer.state[layer[0]]["step"].item() for layer in parameters_of(model)[:3]]
    assert steps == [2, 1, 2]


def test_the_literal_start_has_all_layers_and_trains_the_first():
    model = gpt2(NUM_LAYERS)
    before = values_of(model)
    layers, optimizer = frozen_layers(model, copies=True)
    assert layers.frozen == {1, 2, 3, 4}
    assert trainable_layers(model) == [0]
    train_step(model, optimizer)
    assert [torch.equal(*pair) for pair in zip(before, values_of(model), strict=True)] == [
        *(False, True, True, True, True)
    ]


def test_from_the_literal_start_a_layer_is_tied_or_untied_when_its_owner_changes():
    model = gpt2(NUM_LAYERS)
    layers, optimizer = frozen_layers(model, copies=True)
    before = values_of(model)
    layers.apply(Tying((0, 1, 1, 0, 0)))  # 1 is untied, 2 tied to it; 3 and 4 stay
    layers.verify()
    assert layers.frozen == {3, 4}
    assert layers.storage.tying == Tying((0, 1, 1, 3, 4))
    after = values_of(model)
    for layer, source in enumerate([0, 1, 1, 3, 4]):
        assert torch.equal(after[layer], before[source])
    assert blocks_of(model)[2].mlp.c_fc.weight is blocks_of(model)[1].mlp.c_fc.weight
    train_step(model, optimizer)
    assert trainable_layers(model) == [0, 1, 2]
    assert layers_with_moments(model, optimizer) == [0, 1, 2]

    layers.apply(Tying((0, 1, 0, 1, 0)))  # 2 moves to 0, 3 to 1; 4 stays
    layers.verify()
    assert layers.storage.tying == Tying((0, 1, 0, 1, 4))
    layers.apply(ALL)  # 1 and 3 are tied; 4 claims what it claimed from the start
    layers.verify()
    assert layers.storage.tying == Tying((0, 0, 0, 0, 4))
    assert layers.frozen == {4}


def test_once_every_layer_has_moved_it_is_the_usual_tying():
    torch.manual_seed(0)
    model = gpt2(NUM_LAYERS)
    layers, _ = frozen_layers(model, copies=True)
    layers.apply(Tying.independent(NUM_LAYERS))
    rng = random.Random(1)
    for _ in range(20):
        layers.apply(random_tying(rng, NUM_LAYERS))
        layers.verify()
        assert layers.storage.tying == layers.tying
        assert not layers.frozen


def test_a_claim_that_does_not_fit_changes_nothing():
    layers, _ = frozen_layers(gpt2(NUM_LAYERS), copies=False)
    with pytest.raises(InputError, match="a tying of 3 layers does not fit a model of 5"):
        layers.apply(Tying.all_tied(3))
    assert layers.tying == ALL
    layers.verify()


def test_verify_notices_a_layer_that_trains_though_it_should_not():
    model = gpt2(NUM_LAYERS)
    layers, _ = frozen_layers(model, copies=False)
    blocks_of(model)[3].ln_1.weight.requires_grad_(True)
    with pytest.raises(InvariantError, match=r"layer \d should be"):
        layers.verify()


def test_dynamic_tying_decides_over_layers_that_were_prepared():
    model = gpt2(NUM_LAYERS)
    layers, _ = frozen_layers(model, copies=False)
    schedule = Schedule([Tying((0, 0, 2, 2, 2))])
    tying = DynamicTying.over(layers, schedule, every=1)
    assert tying.layers is layers
    assert tying.tying == ALL
    tying.step(reward=lambda: 0.0)
    assert trainable_layers(model) == [0, 2]


# Runs

FREEZING = {"frozen": {"sharing": "frozen"}, "literal": {"initial": "frozen"}}


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("policy", ["dqn", "random"])
def test_a_crashed_run_goes_on_exactly(folder, name, policy):
    changes = FREEZING[name] | {"policy": policy, "nlayers": 5, "every": 3}
    alone, crashed = small(folder, exp="alone", **changes), small(folder, **changes)
    summary = train(alone)
    assert len({str(line["state"]) for line in lines_of(alone.folder / "tying.jsonl")}) > 3
    crashed_at(crashed, 17)
    resumed = train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(alone.folder)
    assert resumed["test_loss"] == summary["test_loss"]
    assert resumed["owners_end"] == summary["owners_end"]


def test_trainable_parameters_are_those_of_independent_layers(folder):
    frozen = train(small(folder, exp="frozen", **FREEZING["frozen"]))
    tied = train(small(folder, exp="tied", policy="all"))
    conventional = train(small(folder, exp="none", policy="none"))
    whole = conventional["trainable_parameters_end"]
    assert frozen["conventional_parameters"] == tied["conventional_parameters"] == whole
    a_layer = (whole - tied["trainable_parameters_end"]) / 2
    outside = whole - 3 * a_layer
    for line in lines_of(folder / "runs/frozen/metrics.jsonl"):
        assert line["trainable_parameters"] <= outside + 3 * a_layer
        assert line["gradient_bytes"] == 4 * line["trainable_parameters"]
        assert line["parameter_bytes"] == 4 * whole, "frozen layers are held too"
    end = outside + frozen["independent_layers_end"] * a_layer
    assert frozen["trainable_parameters_end"] == end
    mean = outside + frozen["independent_layers_mean"] * a_layer
    assert frozen["trainable_parameters_mean"] == pytest.approx(mean)


def test_a_pattern_may_be_frozen_too(folder):
    summary = train(small(folder, policy="all", sharing="frozen"))
    assert summary["owners_end"] == summary["owners_best"] == [0, 0, 0]
    assert summary["independent_layers_mean"] == 1
    assert summary["trainable_parameters_end"] < summary["conventional_parameters"]
