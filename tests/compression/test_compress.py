"""``compress`` as a caller uses it."""

import pytest
import torch
from tiny_models import Plain, gpt2, t5, tokens

from layer_tying import InputError, TiedLayers, compress, export_compact, export_expanded, load

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
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        compress(gpt2(), BATCHES, **{**FEW, **options})
