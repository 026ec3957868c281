"""What is measured, against models whose weights were copied by hand."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from tiny_models import Plain, gpt2, gpt_neo, t5, tokens
from torch import nn

from layer_tying import InputError, Tying
from layer_tying.compression.outcome import divergence, outcome_of
from layer_tying.compression.sensitivity import SEARCHES, Probe, choose, reading_from
from layer_tying.core.find import find_layers

SAME = {"rtol": 1e-4, "atol": 1e-6}  # float32, kernels that may add up in another order


def batches(number: int = 2):
    return [{"input_ids": tokens(seed=i), "labels": tokens(seed=i)} for i in range(number)]


def spread_out(model):
    """Larger weights than at the start, so that layers do something, each its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def copied(model, reading):
    """The model with the weights that a reading says copied into each layer."""
    other = copy.deepcopy(model)
    for layer, source in zip(other.transformer.h, reading, strict=True):
        layer.load_state_dict(model.transformer.h[source].state_dict())
    return other


def divergence_by_hand(logits, teacher, temperature):
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(logits.double() / temperature, -1)
    return float((p * (p / q).log()).sum(-1).mean()) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_its_definition_in_float64(temperature):
    logits, teacher = torch.randn(7, 11), torch.randn(7, 11)
    found = float(divergence(logits, teacher, temperature))
    assert found == pytest.approx(divergence_by_hand(logits, teacher, temperature), rel=1e-5)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_layers_read_others_for_a_while_and_nothing_is_copied():
    model = spread_out(gpt2())
    stack = find_layers(model)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    reading = (0, 0, 2, 5, 5, 5)
    with torch.no_grad(), reading_from(stack, reading):
        found = model(tokens()).logits
        assert sum(1 for _ in model.parameters()) < len(before)
    torch.testing.assert_close(found, copied(model, reading)(tokens()).logits, **SAME)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_weights_come_back_when_the_model_raises():
    model = gpt2()
    ids = [id(p) for p in model.parameters()]
    with pytest.raises(IndexError), reading_from(find_layers(model), (0,) * 6):
        model(torch.full((1, 4), 999))
    assert [id(p) for p in model.parameters()] == ids


def test_the_table_is_that_of_copies_made_by_hand():
    model = spread_out(gpt2(num_layers=3))
    table, rises = Probe(find_layers(model), batches(), outcome_of).table()
    untouched = [model(**batch) for batch in batches()]
    for layer in range(3):
        for source in range(3):
            reading = [source if i == layer else i for i in range(3)]
            found = [copied(model, reading)(**batch) for batch in batches()]
            pairs = list(zip(found, untouched, strict=True))
            apart = [divergence_by_hand(one.logits, other.logits, 1.0) for one, other in pairs]
            rise = [float(one.loss - other.loss) for one, other in pairs]
            assert table[layer][source] == pytest.approx(sum(apart) / 2, rel=1e-3, abs=1e-6)
            assert rises[layer][source] == pytest.approx(sum(rise) / 2, rel=1e-3, abs=1e-5)


def test_layers_before_the_first_changed_one_do_not_run_again():
    """Their kept outputs give the same figures to the last bit, in fewer layers run."""
    model = spread_out(gpt2())
    found, runs = [], []
    for can_stand_in in (True, False):
        probe = Probe(find_layers(model), batches(), outcome_of)
        for kept in probe._untouched:
            assert kept.can_stand_in
            kept.can_stand_in = can_stand_in
        with counted(model) as calls:
            found.append([probe.table(), probe.divergence((0, 1, 2, 3, 3, 3))])
        runs.append(len(calls))
    assert found[0] == found[1]
    # 2 batches x 6 layers x (1 untouched model, 30 entries of the table, 1 reading more)
    assert runs[1] == 2 * 6 * 32
    assert runs[0] == 2 * (5 * (6 + 5 + 4 + 3 + 2 + 1) + 2)
    assert not any("forward" in vars(block) for block in model.transformer.h)


@contextmanager
def counted(model):
    """One entry for each time that the attention of a layer has run."""
    calls: list[bool] = []
    hooks = [
        block.attn.register_forward_hook(lambda *_: calls.append(True))
        for block in model.transformer.h
    ]
    yield calls
    for hook in hooks:
        hook.remove()


class Blocks(nn.Module):
    """Layers that are run in an order of choice, or hand the last one more than their output."""

    def __init__(self, order: tuple[int, ...], more: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cached() for _ in range(4))
        self.order, self.more = order, more

    def forward(self, x):
        cache: list[torch.Tensor] = []
        for index in self.order:
            x = self.layers[index](x, cache)
        return x + cache[0] if self.more else x


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.append(torch.tanh(self.linear(x)))
        return x + cache[-1]


@pytest.mark.parametrize(
    ("order", "more", "can"),
    [
        ((0, 1, 2, 3), False, True),
        ((0, 1, 2, 3), True, False),  # the first cached tensor would be another layer's, or none
        ((3, 2, 1, 0), False, False),
        ((0, 1, 2, 3, 0, 1, 2, 3), False, False),
    ],
)
def test_layers_run_again_where_their_outputs_are_not_enough(order, more, can):
    torch.manual_seed(0)
    model, x = Blocks(order, more), torch.randn(2, 3, 8)
    probe = Probe(find_layers(model), [x], outcome_of)
    assert probe._untouched[0].can_stand_in == can
    reading = (0, 1, 2, 2)
    other = copy.deepcopy(model)
    other.layers[3].load_state_dict(model.layers[2].state_dict())
    expected = divergence_by_hand(other(x).flatten(0, 1), model(x).flatten(0, 1), 1.0)
    assert probe.divergence(reading) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_layer_that_has_a_forward_of_its_own_gets_it_back():
    """As accelerate gives them, to move weights."""
    model = spread_out(gpt2())
    block = model.transformer.h[0]
    block.forward = own = block.forward
    Probe(find_layers(model), batches(), outcome_of).table()
    assert vars(block)["forward"] is own


def test_the_choice_is_the_candidate_that_was_measured_to_be_best():
    model = spread_out(gpt2())
    choice = choose(Probe(find_layers(model), batches(), outcome_of), 3)
    assert set(choice.candidates) == {*SEARCHES, "refined"}
    assert len(set(choice.reading)) == 3
    assert choice.divergence == min(value for _, value in choice.candidates.values())
    assert all(len(set(reading)) == 3 for reading, _ in choice.candidates.values())


def test_equal_layers_are_found_to_cost_nothing():
    """Layers 0, 1 and 2 hold equal weights, and 3, 4 and 5 do: two groups change nothing."""
    model = spread_out(gpt2())
    model = copied(model, (0, 0, 0, 3, 3, 3))
    choice = choose(Probe(find_layers(model), batches(), outcome_of), 2)
    assert Tying.from_labels(choice.reading).owners == (0, 0, 0, 3, 3, 3)
    assert choice.divergence == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("groups", ["any", *SEARCHES])
def test_readings_that_overflow_are_not_chosen(groups):
    """The first layer adds so much that float16 overflows when another one reads its weights."""
    torch.manual_seed(0)
    model = Plain(num_layers=4).half()
    with torch.no_grad():
        model.blocks[0].feed_forward[1].bias.fill_(4e4)
        model.head.weight.mul_(1e-3)
    probe = Probe(find_layers(model), [torch.randn(2, 4, 8).half()], outcome_of)
    table, _ = probe.table()
    assert math.inf in table[1], "nothing overflows"
    assert not any(math.isnan(value) for row in table for value in row)
    try:
        assert math.isfinite(choose(probe, 2, groups).divergence)
    except InputError as error:
        assert groups in ("cycle", "neighbours") and "finite" in str(error)


def test_padding_does_not_count():
    model = spread_out(gpt2())
    ids, mask = tokens(), torch.ones(2, 8, dtype=torch.long)
    mask[0, 4:] = 0
    assert len(outcome_of(model, {"input_ids": ids, "attention_mask": mask}).logits) == 12
    assert len(outcome_of(model, {"input_ids": ids}).logits) == 16


def test_the_mask_of_an_encoder_is_not_the_decoders():
    model, ids = t5().eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    logits = model(**batch).logits
    assert torch.equal(outcome_of(model, batch).logits, logits.flatten(0, 1))
    found = outcome_of(model, batch | {"decoder_attention_mask": mask}).logits
    assert len(found) == mask.sum() < mask.numel()


def test_layers_of_different_kinds_are_never_tied():
    model = spread_out(gpt_neo())
    choice = choose(Probe(find_layers(model, by_kind=True), batches(), outcome_of), 2)
    assert choice.table[0][1] == float("inf")
    assert Tying.from_labels(choice.reading).owners == (0, 1, 0, 1)


def test_a_model_that_is_not_finite_is_refused():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        Probe(find_layers(model), batches(), outcome_of)


def test_a_model_without_logits_is_refused():
    with pytest.raises(InputError, match="without logits"):
        outcome_of(gpt2().transformer, {"input_ids": tokens()})


def test_a_tensor_is_a_batch_too():
    model = Plain()
    x = torch.randn(2, 4, 8)
    outcome = outcome_of(model, x)
    torch.testing.assert_close(outcome.logits, model(x).flatten(0, 1))
    assert outcome.loss is None
