"""What a trained model is measured by: perplexity, bits per byte, accuracy, GLUE's metrics.

Perplexities of different tokenizers do not compare; bits per byte do. So every score of text is
reported per token, per byte, and per word where the data set is tokenised into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from layer_tying.core import distributed

IGNORED = -100  # the label of a position that is not predicted, as in torch and transformers


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, in float32, over labels that are not ignored.

    Args:
        logits: [..., classes], of any floating type.
        labels: [...] class indices; -100 is ignored.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients, and back as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mean_loss(loss_and_count: Iterable[tuple[Tensor, int]]) -> float:
    """The mean loss per predicted item over all ranks' batches of (mean loss, number of items)."""
    total, count = 0.0, 0.0
    for loss, items in loss_and_count:
        if items:  # the mean of nothing is not a number
            total += float(loss) * items
            count += items
    total, count = distributed.sums(total, count)
    return total / count


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
    """The share of equal entries."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def most_likely(logits: Tensor) -> np.ndarray:
    """The index of the largest of the logits [..., classes], int64 [...]."""
    return logits.argmax(-1).cpu().numpy()


def class_scores(logits: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Loss, its exponential and accuracy of logits [N, classes] against labels [N]."""
    loss = float(cross_entropy(logits, torch.from_numpy(labels)))
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": accuracy(most_likely(logits), labels),
    }


def slices(number: int, size: int, max_slices: int | None = None) -> list[slice]:
    """Rows 0..number in slices of a size, at most so many."""
    return [slice(start, start + size) for start in range(0, number, size)][:max_slices]


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


def last_word_accuracy(
    passages: Sequence[tuple[str, str]],
    encode: Callable[[str], np.ndarray],
    logits_of: Callable[[Tensor], Tensor],
    max_length: int,
) -> float:
    """LAMBADA: how often every token of the last word is the most likely one.

    Args:
        passages: (context, last word) pairs.
        encode: text to token ids.
        logits_of: [1, T] ids to [1, T, vocabulary] logits.
        max_length: the longest input; contexts are cut from the left.
    """
    hits = []
    for context, word in distributed.dealt(passages):
        target = encode(" " + word)
        tokens = np.concatenate([encode(context), target])[-(max_length + 1) :]
        inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
        best = logits_of(inputs)[0, -len(target) :].argmax(-1).cpu().numpy()
        hits.append(bool(np.array_equal(best, target[-len(best) :])))
    correct, passages_seen = distributed.sums(sum(hits), len(hits))
    return correct / passages_seen
