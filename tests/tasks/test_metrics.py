"""Scores against numbers worked out by hand, in numpy, and by scikit-learn."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from layer_tying.data.glue import FORMATS
from layer_tying.tasks import evaluation
from layer_tying.tasks import metrics as ours
from layer_tying.tasks.language import last_word_outcome

pytestmark = pytest.mark.numerics

LABELS = st.integers(1, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2)
)


def cross_entropy_in_numpy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = logits.astype(np.float64).reshape(-1, logits.shape[-1])
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    labels = labels.ravel()
    return float(np.mean([-log_probabilities[i, c] for i, c in enumerate(labels) if c != -100]))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("scale", [1e-3, 1, 50])
def test_cross_entropy(shape, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(*shape, 11))).astype(np.float32)
    labels = rng.integers(11, size=shape)
    labels.ravel()[::3] = -100
    found = evaluation.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert float(found) == pytest.approx(cross_entropy_in_numpy(logits, labels), rel=1e-5)


def test_cross_entropy_of_half_precision_logits_is_computed_in_single():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(64)
    found = evaluation.cross_entropy(logits, labels)
    assert found.dtype == torch.float32
    expected = cross_entropy_in_numpy(logits.float().numpy(), labels.numpy())
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_mean_loss_weighs_batches_by_what_is_predicted_in_them():
    batches = [(torch.tensor(1.0), 3), (torch.tensor(2.0), 1), (torch.tensor(math.nan), 0)]
    assert evaluation.mean_loss(batches) == 1.25


def test_perplexity():
    assert ours.perplexity(0.0) == 1.0
    assert ours.perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert ours.perplexity(1e6) == math.inf
    assert not math.isfinite(ours.perplexity(math.nan))


def test_bits_per_byte():
    # A uniform guess among 256 bytes costs eight bits a byte,
    assert ours.bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    # and one among 1,024 tokens of four bytes costs ten bits a token, two and a half a byte.
    assert ours.bits_per_byte(math.log(1024), 250, 1000) == pytest.approx(2.5)


def test_word_perplexity():
    # Three tokens a word, each one of two: one word is one of eight.
    assert ours.word_perplexity(math.log(2), 300, 100) == pytest.approx(8)


@given(LABELS)
def test_two_class_metrics_are_scikit_learns(pair):
    predicted, labels = map(np.array, pair)
    with warnings.catch_warnings():  # of classes that do not occur
        warnings.simplefilter("ignore")
        matthews = metrics.matthews_corrcoef(labels, predicted)
        f1 = metrics.f1_score(labels, predicted, zero_division=0)
    assert ours.matthews_correlation(predicted, labels) == pytest.approx(matthews)
    assert ours.f1_score(predicted, labels) == pytest.approx(f1)
    assert ours.accuracy(predicted, labels) == metrics.accuracy_score(labels, predicted)


def test_matthews_correlation_of_many_examples_does_not_overflow():
    predicted = np.arange(400_000) % 2
    labels = np.roll(predicted, 1)
    assert ours.matthews_correlation(predicted, labels) == -1
    assert ours.matthews_correlation(predicted, predicted) == 1


class Speller:
    """A "model" of bytes that always expects the next letter of a text it knows by heart."""

    def __init__(self, text: str) -> None:
        self.ids = np.frombuffer(text.encode(), np.uint8)
        self.lengths: list[int] = []

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.lengths.append(inputs.shape[1])
        logits = torch.zeros(1, inputs.shape[1], 256)
        for place in range(inputs.shape[1]):
            seen = inputs[0, max(0, place - 3) : place + 1].numpy()
            starts = range(len(self.ids) - len(seen))
            match = [i for i in starts if np.array_equal(self.ids[i : i + len(seen)], seen)]
            if match:
                logits[0, place, self.ids[match[0] + len(seen)]] = 1
        return logits


def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def accuracy_of_last_words(passages, model: Speller, max_length: int) -> float:
    outcome = last_word_outcome(passages, encode, model, max_length)
    return ours.scores(["last_word_accuracy"], outcome)["last_word_accuracy"]


def test_last_word_accuracy_asks_for_every_letter_of_the_last_word():
    model = Speller("she fed the brown cat")
    right = ("she fed the brown", "cat")
    cut_short = ("she fed the brown", "ca")  # is a prefix: every letter asked for is right
    last_letter_wrong = ("she fed the brown", "car")
    nothing_known = ("zzzz", "dog")
    for passages, expected in [
        ([right], 1),
        ([cut_short], 1),
        ([last_letter_wrong], 0),
        ([right, last_letter_wrong, nothing_known, right], 0.5),
    ]:
        assert accuracy_of_last_words(passages, model, 100) == expected


def test_the_last_word_begins_with_the_token_that_it_has_in_the_text():
    """Not with a space of its own, where the tokenizer puts one before every text."""
    vocabulary = {"_a": 0, "_b": 1, "_": 2}

    def encode_with_a_space(text: str) -> np.ndarray:
        tokens = re.findall("_[ab]|_", "_" + text.replace(" ", "_"))
        return np.array([vocabulary[token] for token in tokens], np.int32)

    def says_b(inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.ones_like(inputs), 3).float()

    outcome = last_word_outcome([("a a", "b")], encode_with_a_space, says_b, 100)
    assert outcome.predicted.tolist() == [1]


def test_last_word_accuracy_cuts_long_contexts_from_the_left():
    model = Speller("she fed the brown cat")
    passages = [("x" * 50 + " the brown", "cat")]
    assert accuracy_of_last_words(passages, model, 12) == 1
    assert model.lengths == [12]


def test_evaluating_switches_off_dropout_and_gradients_and_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    for mode in (True, False):
        model.train(mode)
        with evaluation.evaluating(model):
            assert not model.training
            assert not model[1].training
            assert not torch.is_grad_enabled()
        assert model.training is mode
        assert model[1].training is mode
        assert torch.is_grad_enabled()


def test_evaluating_puts_things_back_after_an_exception():
    model = nn.Dropout().train()
    with pytest.raises(ZeroDivisionError), evaluation.evaluating(model):
        _ = 1 / 0
    assert model.training
    assert torch.is_grad_enabled()


def test_every_metric_of_a_task_has_a_record():
    outcome = ours.Outcome(math.log(2), np.array([0, 1]), np.array([0, 0]), 3, 6, 2)
    found = ours.scores(ours.METRICS, outcome)
    assert found["loss"] == math.log(2)
    assert found["perplexity"] == pytest.approx(2)
    assert found["bits_per_byte"] == pytest.approx(0.5)
    assert found["word_perplexity"] == pytest.approx(2**1.5)
    assert found["accuracy"] == found["last_word_accuracy"] == 0.5
    assert found["f1"] == found["matthews_correlation"] == 0
    for form in FORMATS.values():
        assert set(form.metrics) <= set(ours.METRICS)
