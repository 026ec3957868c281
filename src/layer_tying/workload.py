"""What is trained on what: a model's configuration, its batches, its loss and its scores.

Knows nothing of tying. One class for text and one for images, with the same face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying import evaluate
from layer_tying.batches import Batches, evaluation_windows, mask_tokens
from layer_tying.config import TrainConfig
from layer_tying.data import Corpus, load_texts, tokenize
from layer_tying.images import ImageBatches, Images, load_images
from layer_tying.models import image_config, language_config
from layer_tying.tokenizer import Tokenizer, load_tokenizer

Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, one example a row
REWARD_SEED = 1_000_003  # keeps the agent's batches apart from those the model trains on


class Stream(Protocol):
    """An endless, resumable stream of batches."""

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Where the stream is: JSON-able."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from there."""
        ...


class Workload(Protocol):
    """A task to train a model for.

    Attributes:
        model_config: the model that fits it.
        batches: what it trains on.
        reward_batches: the same data in an order of its own, for the agent's rewards.
        batches_per_epoch: number of batches in a pass over the training split.
        tokens_per_batch: tokens (or images) in one.
        facts: what identifies the data, JSON-able.
    """

    model_config: PretrainedConfig
    batches: Stream
    reward_batches: Stream
    batches_per_epoch: int
    tokens_per_batch: int
    facts: dict[str, Any]

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The mean loss of a batch, in nats."""
        ...

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Score the ``validation`` or ``test`` split, or its first batches."""
        ...


def build_workload(config: TrainConfig) -> Workload:
    """The workload of a configuration: reads and tokenises its data."""
    if config.family == "vit":
        return ImageWorkload(config, load_images(config.dataset, config.data_dir))
    texts = load_texts(config.dataset, config.data_dir)
    tokenizer = load_tokenizer(config.tokenizer, texts.train, config.data_dir)
    return LanguageWorkload(config, tokenize(texts, tokenizer))


class LanguageWorkload:
    """Next-token prediction, or masked-token prediction for BERT."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.corpus = corpus
        self.tokenizer: Tokenizer = corpus.tokenizer
        self.masked = config.family == "bert" and config.objective == "masked"
        self._length = config.bptt
        self._eval_batch_size = config.eval_batch_size
        self.model_config = language_config(
            config.family,
            num_layers=config.nlayers,
            num_heads=config.nhead,
            hidden_size=config.emsize,
            vocab_size=self.tokenizer.vocab_size,
            max_length=config.bptt,
            dropout=config.dropout,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            causal=not self.masked,
        )
        train = corpus.train.tokens
        ordered = Batches(train, config.bptt, config.batch_size, config.seed)
        rewards = Batches(train, config.bptt, config.batch_size, config.seed + REWARD_SEED)
        self.batches: Stream = self._stream(ordered, config.seed)
        self.reward_batches: Stream = self._stream(rewards, config.seed + REWARD_SEED)
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = config.batch_size * config.bptt
        self.facts = {"sha256": corpus.sha256, "source": corpus.source}

    def _stream(self, batches: Batches, seed: int) -> Stream:
        return MaskedBatches(batches, self.tokenizer, seed) if self.masked else batches

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Mean nats per predicted token of a batch of ids and labels, each [B, T]."""
        inputs, labels = (torch.from_numpy(array).to(model.device) for array in batch)
        return evaluate.cross_entropy(model(input_ids=inputs).logits, labels)

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Perplexity per token; bits per byte and perplexity per word where they apply."""
        part = getattr(self.corpus, split)
        inputs, labels = evaluation_windows(part.tokens, self._length)
        if self.masked:  # the same masks at every evaluation
            inputs, masked = mask_tokens(inputs, np.random.default_rng(0), self.tokenizer)
            labels = np.where(labels == evaluate.IGNORED, evaluate.IGNORED, masked)
        with evaluate.evaluating(model):
            loss = evaluate.mean_loss(
                (self.loss(model, (inputs[rows], labels[rows])), int((labels[rows] >= 0).sum()))
                for rows in _slices(len(inputs), self._eval_batch_size, max_batches)
            )
        scores = {"loss": loss, "perplexity": evaluate.perplexity(loss)}
        if not self.masked:
            tokens, words = len(part.tokens), part.num_words
            scores["bits_per_byte"] = evaluate.bits_per_byte(loss, tokens, part.num_bytes)
            if words is not None:
                scores["word_perplexity"] = evaluate.word_perplexity(loss, tokens, words)
        return scores


class MaskedBatches:
    """Batches for masked-token prediction: BERT's 80/10/10 masks, drawn anew each time."""

    def __init__(self, batches: Batches, tokenizer: Tokenizer, seed: int) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> Batch:
        inputs, _ = next(self._batches)
        return mask_tokens(inputs, self._rng, self._tokenizer)

    def state(self) -> dict[str, Any]:
        """The place in the data, and the random numbers' state."""
        return {"batches": self._batches.state(), "rng": self._rng.bit_generator.state}

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned."""
        self._batches.restore(state["batches"])
        self._rng.bit_generator.state = state["rng"]


class ImageWorkload:
    """Image classification with a ViT."""

    def __init__(self, config: TrainConfig, images: Images) -> None:
        self.images = images
        self._eval_batch_size = config.eval_batch_size
        _, height, _, num_channels = images.x_train.shape
        self.model_config = image_config(
            num_layers=config.nlayers,
            num_heads=config.nhead,
            hidden_size=config.emsize,
            image_size=height,
            num_channels=num_channels,
            class_names=images.classes,
            dropout=config.dropout,
        )
        seed, size = config.seed, config.batch_size
        ordered = ImageBatches(images.x_train, images.y_train, size, seed)
        self.batches: Stream = ordered
        self.reward_batches: Stream = ImageBatches(
            images.x_train, images.y_train, size, seed + REWARD_SEED
        )
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = size
        self.facts = {"classes": list(images.classes)}

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Mean nats per image of uint8 pixels [B, H, W, C] and labels [B]."""
        labels = torch.from_numpy(batch[1]).to(model.device)
        return evaluate.cross_entropy(self._logits(model, batch[0]), labels)

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Perplexity (exp of the cross-entropy) and accuracy."""
        x = getattr(self.images, f"x_{split}")
        y = getattr(self.images, f"y_{split}")
        slices = _slices(len(x), self._eval_batch_size, max_batches)
        with evaluate.evaluating(model):
            logits = torch.cat([self._logits(model, x[rows]).float().cpu() for rows in slices])
        labels = torch.from_numpy(y[: len(logits)])
        loss = float(evaluate.cross_entropy(logits, labels))
        return {
            "loss": loss,
            "perplexity": evaluate.perplexity(loss),
            "accuracy": evaluate.accuracy(logits.argmax(-1).numpy(), labels.numpy()),
        }

    @staticmethod
    def _logits(model: PreTrainedModel, pixels: np.ndarray) -> Tensor:
        scaled = torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2) / 127.5 - 1
        return model(pixel_values=scaled).logits


def _slices(number: int, size: int, max_slices: int | None) -> list[slice]:
    """Rows 0..number in slices of a size, at most so many."""
    return [slice(start, start + size) for start in range(0, number, size)][:max_slices]
