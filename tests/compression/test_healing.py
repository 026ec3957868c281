"""Training the tied model: its objective, its stages, and what it starts from."""

import copy

import pytest
import torch
from tiny_models import Plainest, gpt2, tokens

from layer_tying import InputError, TiedLayers, Tying
from layer_tying.compression.healing import Healing, stages, tie_as
from layer_tying.compression.outcome import outcome_of
from layer_tying.compression.settings import HealingSettings
from layer_tying.runs.config import OptimizationConfig

READING = (1, 1, 2, 2, 5, 5)
BATCH = {"input_ids": tokens(4), "labels": tokens(4)}


def healing(teacher, reading=READING, steps=8, **settings):
    optimization = OptimizationConfig(lr=1e-2, max_steps=steps, precision="fp32")
    return Healing(
        teacher,
        copy.deepcopy(teacher),
        reading,
        optimization,
        HealingSettings(**settings),
        outcome_of=outcome_of,
    )


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return gpt2(initializer_range=0.3).eval()


def test_groups_start_from_the_weights_of_their_source(teacher):
    student = copy.deepcopy(teacher)
    layers = TiedLayers(student)
    tie_as(layers, READING)
    assert layers.tying.owners == (0, 0, 2, 2, 4, 4)
    for layer, source in enumerate(READING):
        for name, parameter in layers.parameters(layer).items():
            assert torch.equal(parameter, teacher.transformer.h[source].get_parameter(name))


def test_a_reading_may_be_reached_over_others(teacher):
    """Whatever was tied before, groups end with the weights of the source, as they were."""
    student = copy.deepcopy(teacher)
    layers = TiedLayers(student)
    for each in stages((3, 3, 2, 3, 4, 2)):
        tie_as(layers, each)
    assert layers.tying.owners == (0, 0, 2, 0, 4, 2)
    for layer, source in enumerate((3, 3, 2, 3, 4, 2)):
        for name, parameter in layers.parameters(layer).items():
            assert torch.equal(parameter, teacher.transformer.h[source].get_parameter(name))


def test_stages_tie_one_group_after_another():
    assert stages(READING) == [
        (0, 1, 2, 3, 5, 5),
        (0, 1, 2, 2, 5, 5),
        (1, 1, 2, 2, 5, 5),
    ]


@pytest.mark.parametrize("sharing", ["tied", "mixture"])
def test_gradual_healing_ties_over_the_first_half(teacher, sharing):
    run = healing(teacher, steps=12, gradual=True, sharing=sharing)
    seen = []
    for _ in range(12):
        run.train_step(BATCH)
        run.layers.verify()
        seen.append((run.layers.tying.num_independent, run.layers.mixtures is not None))
    numbers = [number for number, _ in seen]
    assert numbers == [5, 5, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3]
    mixes = [mixes for _, mixes in seen]
    assert mixes == [sharing == "mixture" and number == 3 for number in numbers]


def test_the_objective_is_what_it_is_said_to_be(teacher):
    """Against plain transformers in float64, the weights copied by hand."""
    settings = {"temperature": 2.0, "loss_weight": 0.25, "hidden_weight": 0.5, "sharing": "tied"}
    run = healing(teacher, **settings)
    total, progress = run._objective(BATCH)
    plain, untouched = copy.deepcopy(teacher).double(), copy.deepcopy(teacher).double()
    for layer, source in enumerate(READING):
        plain.transformer.h[layer].load_state_dict(teacher.transformer.h[source].state_dict())
    outputs = {}
    for model in (plain, untouched):
        for block in model.transformer.h:
            block.register_forward_hook(
                lambda module, _, output: outputs.setdefault(module, output)
            )
    found, wanted = plain(**BATCH), untouched(**BATCH)
    p, q = (torch.softmax(each.logits / 2, -1) for each in (wanted, found))
    apart = 4 * (p * (p / q).log()).sum(-1).mean()
    pairs = zip(plain.transformer.h, untouched.transformer.h, strict=True)
    ours_and_theirs = [(outputs[one], outputs[other]) for one, other in pairs]
    hidden = sum(((a - b) ** 2).mean() / (b**2).mean() for a, b in ours_and_theirs) / 6
    expected = 0.75 * apart + 0.25 * found.loss + 0.5 * hidden
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(progress.divergence) == pytest.approx(apart.item(), rel=1e-4)


@pytest.mark.parametrize("sharing", ["tied", "mixture"])
def test_healing_heals_and_leaves_the_teacher_alone(teacher, sharing):
    before = [p.clone() for p in teacher.parameters()]
    run = healing(teacher, steps=40, sharing=sharing)
    found = [float(run.train_step(BATCH).divergence) for _ in range(40)]
    assert found[-1] < 0.5 * found[0]
    assert run.layers.tying == Tying.from_labels(READING)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_without_labels_only_the_divergence_is_minimised(teacher):
    run = healing(teacher, loss_weight=1.0)
    total, progress = run._objective({"input_ids": tokens(4)})
    assert progress.loss is None
    assert total.item() == float(progress.divergence)


def test_hidden_states_are_those_of_any_module():
    teacher = Plainest()
    run = healing(teacher, (0, 0, 0, 3, 3, 3), hidden_weight=2.0)
    alone = healing(teacher, (0, 0, 0, 3, 3, 3))
    assert run._objective(BATCH)[0].item() > alone._objective(BATCH)[0].item()


def test_settings_out_of_range_are_refused():
    for wrong in ({"temperature": 0.0}, {"loss_weight": 1.5}, {"hidden_weight": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            HealingSettings(**wrong)
