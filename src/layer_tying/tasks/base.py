"""What is trained on what: a model's configuration, its batches, its loss and its scores.

Knows nothing of tying. One class each for text, images and GLUE's tasks, with the same face.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core import distributed
from layer_tying.data.batches import REWARD_SEED, Batches, Stream, evaluation_windows, mask_tokens
from layer_tying.data.glue import load_task
from layer_tying.data.images import ImageBatches, Images, load_images
from layer_tying.data.texts import Corpus, load_lambada, load_texts, tokenize
from layer_tying.data.tokenizer import FOLDER, Tokenizer, load_tokenizer, read_tokenizer
from layer_tying.errors import InputError
from layer_tying.models.build import classifier_config, image_config, language_config
from layer_tying.runs.config import TrainConfig
from layer_tying.tasks import metrics
from layer_tying.tasks.cross_entropy import language_model_loss
from layer_tying.tasks.glue import GlueWorkload

Pair = tuple[np.ndarray, np.ndarray]  # inputs and labels, one example a row


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

    def loss(self, model: PreTrainedModel, batch: Any) -> Tensor:
        """The mean loss of a batch, in nats."""
        ...

    def accuracy(self, model: PreTrainedModel, batch: Any) -> float:
        """The share of a batch's labels that the model finds most likely."""
        ...

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Score the ``validation`` or ``test`` split, or its first batches."""
        ...

    def save(self, folder: Path) -> None:
        """Write what a model needs to be used on new data: of text, its tokenizer."""
        ...


def build_workload(config: TrainConfig) -> Workload:
    """The workload of a configuration: reads and tokenises its data."""
    if config.task:
        assert config.source is not None  # the configuration saw to it
        task = load_task(config.task, config.data_dir)
        tokenizer = read_tokenizer(Path(config.source) / FOLDER)
        backbone = _text_config(config, tokenizer, causal=False)
        return GlueWorkload(config, task, tokenizer, classifier_config(backbone, task.labels))
    if config.family == "vit":
        return ImageWorkload(config, load_images(config.dataset, config.data_dir))
    texts = load_texts(config.dataset, config.data_dir)
    tokenizer = load_tokenizer(config.tokenizer, texts.train, config.data_dir)
    last_words = []
    if config.dataset == "lambada" and not is_masked(config):
        last_words = load_lambada(config.data_dir, held_out=True)
    return LanguageWorkload(config, tokenize(texts, tokenizer), last_words)


def is_same_data(facts: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two workloads' facts are of the same data, wherever these came from."""
    return {**facts, "source": None} == {**other, "source": None}


def is_masked(config: TrainConfig) -> bool:
    """Whether a model of text learns to predict masked tokens, not the next one."""
    return config.family == "bert" and config.objective == "masked"


def _text_config(config: TrainConfig, tokenizer: Tokenizer, causal: bool) -> PretrainedConfig:
    return language_config(
        config.family,
        num_layers=config.nlayers,
        num_heads=config.nhead,
        hidden_size=config.emsize,
        vocab_size=tokenizer.vocab_size,
        max_length=config.bptt,
        dropout=config.dropout,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        causal=causal,
    )


class LanguageWorkload:
    """Next-token prediction, or masked-token prediction for BERT.

    Args:
        config: the run.
        corpus: the tokenised text.
        last_words: of LAMBADA, the (context, last word) pairs that are scored with the test split.
    """

    def __init__(
        self, config: TrainConfig, corpus: Corpus, last_words: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.corpus = corpus
        self.tokenizer: Tokenizer = corpus.tokenizer
        self.masked = is_masked(config)
        self._last_words = last_words
        self._length = config.bptt
        self._eval_batch_size = config.eval_batch_size
        self.model_config = _text_config(config, self.tokenizer, causal=not self.masked)
        train = corpus.train.tokens
        ordered = Batches(train, config.bptt, config.batch_size, config.seed)
        rewards = Batches(train, config.bptt, config.batch_size, config.seed + REWARD_SEED)
        self.batches: Stream = self._stream(ordered, config.seed)
        self.reward_batches: Stream = self._stream(rewards, config.seed + REWARD_SEED)
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = config.batch_size * config.bptt
        self.facts = {"sha256": corpus.sha256, "source": corpus.source}
        self._windows = {split: self._held_out(split) for split in ("validation", "test")}

    def _held_out(self, split: str) -> Pair:
        """All of a split in order: inputs and labels, the same masks at every evaluation."""
        tokens = getattr(self.corpus, split).tokens
        inputs, labels = evaluation_windows(tokens, self._length)
        if self.masked:
            inputs, masked = mask_tokens(inputs, np.random.default_rng(0), self.tokenizer)
            labels = np.where(labels == metrics.IGNORED, metrics.IGNORED, masked)
        if (labels == metrics.IGNORED).all():
            raise InputError(
                f"nothing to predict in the {len(tokens)} tokens of the {split} split: "
                f"use a longer text"
            )
        return inputs, labels

    def _stream(self, batches: Batches, seed: int) -> Stream:
        return MaskedBatches(batches, self.tokenizer, seed) if self.masked else batches

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        """Mean nats per predicted token of a batch of ids and labels, each [B, T]."""
        inputs, labels = (torch.from_numpy(array).to(model.device) for array in batch)
        return language_model_loss(model, inputs, labels)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of predicted tokens that the model finds most likely."""
        found = metrics.most_likely(self._logits(model, torch.from_numpy(batch[0])))
        chosen = batch[1] != metrics.IGNORED
        return metrics.accuracy(found[chosen], batch[1][chosen])

    @staticmethod
    def _logits(model: PreTrainedModel, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs.to(model.device)).logits

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Perplexity per token; bits per byte, per word, last-word accuracy where they apply."""
        part = getattr(self.corpus, split)
        inputs, labels = self._windows[split]
        slices = metrics.slices(len(inputs), self._eval_batch_size, max_batches)
        with metrics.evaluating(model):
            loss = metrics.mean_loss(
                (self.loss(model, (inputs[rows], labels[rows])), int((labels[rows] >= 0).sum()))
                for rows in distributed.dealt(slices)
            )
        scores = {"loss": loss, "perplexity": metrics.perplexity(loss)}
        if not self.masked:
            tokens, words = len(part.tokens), part.num_words
            scores["bits_per_byte"] = metrics.bits_per_byte(loss, tokens, part.num_bytes)
            if words is not None:
                scores["word_perplexity"] = metrics.word_perplexity(loss, tokens, words)
        if self._last_words and split == "test":
            scores["last_word_accuracy"] = self._last_word_accuracy(model)
        return scores

    def _last_word_accuracy(self, model: PreTrainedModel) -> float:
        with metrics.evaluating(model):
            return metrics.last_word_accuracy(
                self._last_words,
                self.tokenizer.encode,
                lambda inputs: self._logits(model, inputs),
                self._length,
            )

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save(folder / FOLDER)


class MaskedBatches:
    """Batches for masked-token prediction: BERT's 80/10/10 masks, drawn anew each time."""

    def __init__(self, batches: Batches, tokenizer: Tokenizer, seed: int) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> Pair:
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
        self.facts = {"classes": list(images.classes), "sha256": _sha256(images)}

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        """Mean nats per image of uint8 pixels [B, H, W, C] and labels [B]."""
        labels = torch.from_numpy(batch[1]).to(model.device)
        return metrics.cross_entropy(self._logits(model, batch[0]), labels)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of images that are put into their class."""
        found = metrics.most_likely(self._logits(model, batch[0]))
        return metrics.accuracy(found, batch[1])

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Perplexity (exp of the cross-entropy) and accuracy."""
        x = getattr(self.images, f"x_{split}")
        y = getattr(self.images, f"y_{split}")
        slices = metrics.slices(len(x), self._eval_batch_size, max_batches)
        with metrics.evaluating(model):
            mine = [
                self._logits(model, x[rows]).float().cpu() for rows in distributed.dealt(slices)
            ]
        logits = torch.cat(distributed.gather_dealt(mine))
        return metrics.class_scores(logits, y[: len(logits)])

    def save(self, folder: Path) -> None:
        """Nothing: the model's configuration names its classes."""

    @staticmethod
    def _logits(model: PreTrainedModel, pixels: np.ndarray) -> Tensor:
        scaled = torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2) / 127.5 - 1
        return model(pixel_values=scaled).logits


def _sha256(images: Images) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for part in ("x", "y"):
            digest.update(np.ascontiguousarray(getattr(images, f"{part}_{split}")).data)
    return digest.hexdigest()
