"""Language modelling: predicting the next token of a text, or masked ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core import distributed
from layer_tying.data.batches import (
    IGNORED,
    REWARD_SEED,
    Batches,
    MaskedBatches,
    Stream,
    evaluation_windows,
    mask_tokens,
)
from layer_tying.data.config import DataConfig
from layer_tying.data.tokenizer import FOLDER, Tokenizer
from layer_tying.data.tokens import Corpus
from layer_tying.errors import InputError
from layer_tying.models.build import transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES, TextInput
from layer_tying.tasks import metrics
from layer_tying.tasks.cross_entropy import language_model_loss, predicted_logits
from layer_tying.tasks.evaluation import (
    cross_entropy,
    evaluating,
    mean_loss,
    most_likely,
    of_my_share,
    slices,
)

METRICS = ("loss", "perplexity")
MASKED_METRICS = (*METRICS, "masked_accuracy")
CAUSAL_METRICS = (*METRICS, "bits_per_byte")
WORD_METRICS = ("word_perplexity",)  # where the text is published split into words
LAST_WORD_METRICS = ("last_word_accuracy",)  # LAMBADA's
Pair = tuple[np.ndarray, np.ndarray]  # inputs and labels, int64 [B, T] each


def is_masked(data: DataConfig, model: ModelConfig) -> bool:
    """Whether a model learns to predict masked tokens, not the next one."""
    return FAMILIES[model.family].predicts_masked and data.objective == "masked"


def language_config(data: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> PretrainedConfig:
    """The configuration of a language model that reads what a tokenizer makes of a text."""
    return transformers_config(
        model,
        TextInput(
            tokenizer.vocab_size,
            data.bptt,
            tokenizer.eos_id,
            tokenizer.pad_id,
            causal=not is_masked(data, model),
        ),
    )


class LanguageTask:
    """Next-token prediction, or masked-token prediction where the family has it.

    Args:
        data: how the text is cut into batches.
        model_config: the model that is trained.
        seed: of the order of the batches.
        corpus: the tokenised text.
        masked: whether masked tokens are predicted, and not the next one.
        last_words: of LAMBADA, the (context, last word) pairs that are scored with the test split.
    """

    def __init__(
        self,
        data: DataConfig,
        model_config: PretrainedConfig,
        seed: int,
        corpus: Corpus,
        *,
        masked: bool,
        last_words: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.corpus = corpus
        self.tokenizer: Tokenizer = corpus.tokenizer
        self.masked = masked
        self.model_config = model_config
        self._last_words = last_words
        self._length = data.bptt
        self._eval_batch_size = data.eval_batch_size
        train = corpus.train.tokens
        ordered = Batches(train, data.bptt, data.batch_size, seed)
        rewards = Batches(train, data.bptt, data.batch_size, seed + REWARD_SEED)
        self.batches: Stream = self._stream(ordered, seed)
        self.reward_batches: Stream = self._stream(rewards, seed + REWARD_SEED)
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = data.batch_size * data.bptt
        self.facts: dict[str, Any] = {"sha256": corpus.sha256, "source": corpus.source}
        self._windows = {split: self._held_out(split) for split in ("validation", "test")}

    def _held_out(self, split: str) -> Pair:
        """All of a split in order: inputs and labels, the same masks at every evaluation."""
        tokens = getattr(self.corpus, split).tokens
        inputs, labels = evaluation_windows(tokens, self._length)
        if self.masked:
            inputs, masked = mask_tokens(inputs, np.random.default_rng(0), self.tokenizer)
            labels = np.where(labels == IGNORED, IGNORED, masked)
        if (labels == IGNORED).all():
            raise InputError(
                f"nothing to predict in the {len(tokens)} tokens of the {split} split: "
                f"use a longer text"
            )
        return inputs, labels

    def _stream(self, batches: Batches, seed: int) -> Stream:
        return MaskedBatches(batches, self.tokenizer, seed) if self.masked else batches

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        """Mean nats per predicted token of a batch of ids and labels, each [B, T]."""
        return loss_of_tokens(model, batch)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of predicted tokens that the model finds most likely."""
        return accuracy_of_tokens(model, batch)

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Perplexity per token; bits per byte, per word, last-word accuracy where they apply."""
        part = getattr(self.corpus, split)
        inputs, labels = self._windows[split]
        batches = slices(len(inputs), self._eval_batch_size, max_batches)
        if self.masked:
            pairs = [(inputs[rows], labels[rows]) for rows in batches]
            return metrics.scores(MASKED_METRICS, guesses(model, pairs))

        def loss_and_count(rows: slice) -> tuple[Tensor, int]:
            loss = self.loss(model, (inputs[rows], labels[rows]))
            return loss, int((labels[rows] >= 0).sum())

        with evaluating(model):
            loss = mean_loss(of_my_share(batches, loss_and_count))
        outcome = metrics.Outcome(
            loss, num_tokens=len(part.tokens), num_bytes=part.num_bytes, num_words=part.num_words
        )
        found = metrics.scores(CAUSAL_METRICS, outcome)
        if part.num_words is not None:
            found |= metrics.scores(WORD_METRICS, outcome)
        if self._last_words and split == "test":
            found |= metrics.scores(LAST_WORD_METRICS, self._last_word_outcome(model))
        return found

    def _last_word_outcome(self, model: PreTrainedModel) -> metrics.Outcome:
        with evaluating(model):
            return last_word_outcome(
                self._last_words,
                self.tokenizer.encode,
                lambda inputs: logits_of_tokens(model, inputs),
                self._length,
            )

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save(folder / FOLDER)


def guesses(model: PreTrainedModel, batches: Sequence[Pair]) -> metrics.Outcome:
    """Loss and most likely tokens where there are labels, all from one run of the model."""

    def guess(batch: Pair) -> tuple[tuple[Tensor, int], np.ndarray]:
        inputs, labels = (torch.from_numpy(array).to(model.device) for array in batch)
        logits = predicted_logits(model, inputs, labels)
        loss = cross_entropy(logits, labels[labels != IGNORED])
        return (loss, len(logits)), most_likely(logits)

    with evaluating(model):
        mine = of_my_share(batches, guess)
    loss = mean_loss(each for each, _ in mine)
    predicted = np.concatenate(distributed.gather_dealt([found for _, found in mine]))
    labels = np.concatenate([labels[labels != IGNORED] for _, labels in batches])
    return metrics.Outcome(loss, predicted, labels)


def logits_of_tokens(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of ids [B, T], on the model's device."""
    return model(input_ids=inputs.to(model.device)).logits


def loss_of_tokens(model: PreTrainedModel, batch: Pair) -> Tensor:
    """Mean nats per predicted token of a batch of ids and labels, each [B, T]."""
    inputs, labels = (torch.from_numpy(array).to(model.device) for array in batch)
    return language_model_loss(model, inputs, labels)


def accuracy_of_tokens(model: PreTrainedModel, batch: Pair) -> float:
    """The share of predicted tokens that the model finds most likely."""
    found = most_likely(logits_of_tokens(model, torch.from_numpy(batch[0])))
    chosen = batch[1] != IGNORED
    return metrics.accuracy(found[chosen], batch[1][chosen])


def last_word_outcome(
    passages: Sequence[tuple[str, str]],
    encode: Callable[[str], np.ndarray],
    logits_of: Callable[[Tensor], Tensor],
    max_length: int,
) -> metrics.Outcome:
    """LAMBADA: whether every token of the last word is the most likely one (1) or not (0).

    Args:
        passages: (context, last word) pairs.
        encode: text to token ids.
        logits_of: [1, T] ids to [1, T, vocabulary] logits.
        max_length: the longest input; contexts are cut from the left.
    """

    def is_hit(passage: tuple[str, str]) -> int:
        context, word = passage
        before, tokens = encode(context), encode(f"{context} {word}")
        differs = before != tokens[: len(before)]
        target = tokens[int(differs.argmax()) if differs.any() else len(before) :]
        tokens = tokens[-(max_length + 1) :]
        inputs = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
        best = most_likely(logits_of(inputs)[0, -len(target) :])
        return int(np.array_equal(best, target[-len(best) :]))

    hits = of_my_share(passages, is_hit)
    predicted = np.array(distributed.gather_dealt(hits), np.int64)
    return metrics.Outcome(predicted=predicted, labels=np.ones_like(predicted))
