"""The chunked loss against torch's own, in float64 and through real models."""

import pytest
import torch
import transformers
from built_models import config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layer_tying.tasks import cross_entropy
from layer_tying.tasks.cross_entropy import (
    chunked_cross_entropy,
    language_model_loss,
    predicted_logits,
)

pytestmark = pytest.mark.numerics

WIDTH, VOCABULARY = 6, 11


def both(hidden, head, labels, scale=1.0):
    """(loss, gradients) of the chunked loss, and of torch's in float64."""
    results = []
    for dtype, loss_of in ((hidden.dtype, chunked_cross_entropy), (torch.float64, plain)):
        x = hidden.detach().to(dtype).requires_grad_()
        copy = nn.Linear(WIDTH, VOCABULARY, bias=head.bias is not None, dtype=dtype)
        copy.load_state_dict(head.state_dict())
        loss = loss_of(x, copy, labels)
        (scale * loss).backward()
        results.append([loss.detach(), x.grad, *(p.grad for p in copy.parameters())])
    return results


def plain(hidden, head, labels):
    logits = head(hidden).flatten(0, -2)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(1,), (7,), (3, 5)]),
    rows=st.integers(1, 20),
    has_bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_it_is_exact_whatever_the_chunks(seed, shape, rows, has_bias, scale):
    torch.manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCABULARY, bias=has_bias, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, shape)
    labels[torch.rand(shape) < 0.3] = -100
    labels.flatten()[0] = 3
    whole, cross_entropy.CHUNK = cross_entropy.CHUNK, rows * VOCABULARY
    try:
        ours, theirs = both(hidden, head, labels, scale)
    finally:
        cross_entropy.CHUNK = whole
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_in_fewer_bits(dtype, tolerance):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    ours, theirs = both(torch.randn(50, WIDTH, dtype=dtype), head, torch.randint(VOCABULARY, (50,)))
    assert ours[0].dtype == torch.float32, "the loss itself is not rounded"
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.double() - its).norm() <= tolerance * its.norm()


def test_large_logits_do_not_overflow():
    hidden = torch.full((2, WIDTH), 1e4)
    head = nn.Linear(WIDTH, VOCABULARY)
    ours, theirs = both(hidden, head, torch.tensor([1, 2]))
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), its, rtol=1e-4, atol=1e-4)


def test_autocast_holds_for_the_products_and_not_for_the_softmax():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.randn(20, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(hidden, head, labels)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16 and ours.dtype == torch.float32
    torch.testing.assert_close(ours, nn.functional.cross_entropy(logits.float(), labels))
    ours.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    whole, cross_entropy.CHUNK = cross_entropy.CHUNK, 3 * VOCABULARY  # few rows of the weight too
    wanted, head.weight.grad = head.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        chunked_cross_entropy(hidden, head, labels).backward()
    cross_entropy.CHUNK = whole
    torch.testing.assert_close(head.weight.grad, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-causal", "bert-masked"])
def test_it_is_the_loss_of_a_models_logits(kind):
    torch.manual_seed(0)
    config = config_of(kind, 2, 16, length=12, eos_id=None, pad_id=7)
    assert config.architectures
    model = getattr(transformers, config.architectures[0])(config).double()
    inputs, labels = torch.randint(60, (2, 2, 12))
    labels[:, ::3] = -100
    inputs[:, :2] = 7  # padding, whose embedding BERT does not train, and twice the same token
    wanted = nn.functional.cross_entropy(model(input_ids=inputs).logits.mT, labels)
    wanted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = language_model_loss(model, inputs, labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    language_model_loss(model, inputs, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * gradients[name], msg=f"{name}, accumulated")
    with torch.no_grad():
        torch.testing.assert_close(language_model_loss(model, inputs, labels), wanted)
        logits = model(input_ids=inputs).logits[labels >= 0]
        torch.testing.assert_close(predicted_logits(model, inputs, labels), logits)


def test_no_gradients_are_made_where_none_are_wanted():
    head = nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        loss = chunked_cross_entropy(torch.randn(5, WIDTH), head, torch.arange(5))
    assert not loss.requires_grad
    frozen = head.requires_grad_(False)
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    chunked_cross_entropy(hidden, frozen, torch.arange(5)).backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_its_gradient_can_be_taken_once():
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(WIDTH, VOCABULARY), torch.arange(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
