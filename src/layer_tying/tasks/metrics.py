"""The scores there are: one record each. No torch.

Perplexities of different tokenizers do not compare, so text is scored per token, per byte, and per
word where the data set is published split into words. Bits per byte compare between tokenizers
that keep the whole text, as bytes, BPE and GPT-2's do; WordPiece drops white space and may drop
case, and what is dropped costs no bits.

To add a metric, add its record, and its name to the tasks that report it: ``FORMATS`` in
``data/glue.py``, or the list at the top of a task's module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np


def _nothing() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Outcome:
    """What scores are computed from: how a model did on a split.

    Attributes:
        loss: mean nats for each predicted item.
        predicted: int [N], the label that the model finds most likely.
        labels: int [N], the true ones.
        num_tokens, num_bytes, num_words: the size of a text; no words where they are not known.
    """

    loss: float = math.nan
    predicted: np.ndarray = field(default_factory=_nothing)
    labels: np.ndarray = field(default_factory=_nothing)
    num_tokens: int = 0
    num_bytes: int = 0
    num_words: int | None = None


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        title: what it is called in prose and tables.
        compute: its value.
        form: how its value is printed, as a format specification.
        is_headline: whether a run's summary gives the test split's under the bare name as well.
    """

    title: str
    compute: Callable[[Outcome], float]
    form: str = ".3f"
    is_headline: bool = False


def scores(names: Iterable[str], outcome: Outcome) -> dict[str, float]:
    """The named metrics of an outcome."""
    return {name: METRICS[name].compute(outcome) for name in names}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """From nats per token to bits per byte of text, given how many tokens the bytes make."""
    return loss / math.log(2) * num_tokens / num_bytes


def word_perplexity(loss: float, num_tokens: int, num_words: int) -> float:
    """From nats per token to perplexity per word."""
    return perplexity(loss * num_tokens / num_words)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of equal entries; not a number where there is none."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    return float(np.mean(predicted == labels)) if labels.size else math.nan


def matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two binary sequences; 0 where one of them is constant (CoLA)."""
    true_pos, true_neg, false_pos, false_neg = _confusion(predicted, labels)
    product = math.prod(
        (
            true_pos + false_pos,
            true_pos + false_neg,
            true_neg + false_pos,
            true_neg + false_neg,
        )
    )
    if product == 0:
        return 0.0
    return (true_pos * true_neg - false_pos * false_neg) / math.sqrt(product)


def f1_score(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither predicted nor present (MRPC)."""
    true_pos, _, false_pos, false_neg = _confusion(predicted, labels)
    found = 2 * true_pos + false_pos + false_neg
    return 2 * true_pos / found if found else 0.0


def _confusion(predicted: np.ndarray, labels: np.ndarray) -> tuple[int, int, int, int]:
    predicted, labels = np.asarray(predicted) == 1, np.asarray(labels) == 1
    return (
        int(np.sum(predicted & labels)),
        int(np.sum(~predicted & ~labels)),
        int(np.sum(predicted & ~labels)),
        int(np.sum(~predicted & labels)),
    )


def _bits_per_byte(of: Outcome) -> float:
    return bits_per_byte(of.loss, of.num_tokens, of.num_bytes)


def _word_perplexity(of: Outcome) -> float:
    return (
        math.nan if of.num_words is None else word_perplexity(of.loss, of.num_tokens, of.num_words)
    )


def _accuracy(of: Outcome) -> float:
    return accuracy(of.predicted, of.labels)


def _matthews_correlation(of: Outcome) -> float:
    return matthews_correlation(of.predicted, of.labels)


def _f1(of: Outcome) -> float:
    return f1_score(of.predicted, of.labels)


def _share(title: str, compute: Callable[[Outcome], float]) -> Metric:
    """A headline."""
    return Metric(title, compute, is_headline=True)


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", lambda of: of.loss),
    "perplexity": Metric("perplexity", lambda of: perplexity(of.loss)),
    "bits_per_byte": Metric("bits per byte", _bits_per_byte, is_headline=True),
    "word_perplexity": Metric("perplexity per word", _word_perplexity),
    "last_word_accuracy": _share("last-word accuracy", _accuracy),
    "masked_accuracy": _share("masked-token accuracy", _accuracy),
    "accuracy": _share("accuracy", _accuracy),
    "matthews_correlation": _share("Matthews correlation", _matthews_correlation),
    "f1": _share("F1", _f1),
}
