"""Fine-tuning a language model for one of GLUE's tasks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from layer_tying.data.batches import REWARD_SEED, Stream
from layer_tying.data.config import DataConfig
from layer_tying.data.glue import FORMATS, Example, GlueBatches, GlueExamples, encode
from layer_tying.data.tokenizer import FOLDER, Tokenizer
from layer_tying.errors import InputError
from layer_tying.models.build import classifier_config, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES, TextInput
from layer_tying.tasks import metrics
from layer_tying.tasks.evaluation import (
    class_outcome,
    cross_entropy,
    evaluating,
    most_likely,
    of_my_share,
    slices,
)

METRICS = ("loss", "perplexity")  # and those of the task's format
MOST_HELD_OUT = 1000
GlueBatch = dict[str, np.ndarray]  # as ``encode`` makes them


class GlueTask:
    """Fine-tuning for a task of GLUE, whose test labels are not public.

    A tenth of the training examples (at most 1,000) validates, and the task's dev split is what
    ``test`` scores, so that nothing is selected on dev.
    Tokens in excess of the sequence length are cut off.

    Args:
        data, model, seed: the run's.
        examples: the task's.
        tokenizer: of the model that is fine-tuned.

    Raises:
        InputError: if the tokenizer has no token to pad with.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        examples: GlueExamples,
        tokenizer: Tokenizer,
    ) -> None:
        if tokenizer.pad_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name!r} has no token to pad with, which fine-tuning needs"
            )
        self.examples = examples
        self.tokenizer = tokenizer
        self._length = data.bptt
        self._eval_batch_size = data.eval_batch_size
        self._inputs = ["input_ids", "attention_mask"]
        if FAMILIES[model.family].reads_token_types:
            self._inputs.append("token_type_ids")
        text = TextInput(tokenizer.vocab_size, data.bptt, tokenizer.eos_id, tokenizer.pad_id, False)
        self.model_config = classifier_config(transformers_config(model, text), examples.labels)
        order = np.random.default_rng(0).permutation(len(examples.train))
        held, kept = np.split(order, [min(MOST_HELD_OUT, max(1, len(order) // 10))])
        self._splits = {
            "validation": [examples.train[i] for i in held],
            "test": list(examples.dev),
        }
        train = [examples.train[i] for i in kept]
        size = data.batch_size
        ordered = GlueBatches(train, tokenizer, data.bptt, size, seed)
        self.batches: Stream = ordered
        self.reward_batches: Stream = GlueBatches(
            train, tokenizer, data.bptt, size, seed + REWARD_SEED
        )
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = size
        self.facts: dict[str, Any] = {
            "task": examples.name,
            "sha256": hashlib.sha256(repr(examples).encode()).hexdigest(),
            "num_train": len(train),
            "validation": f"{len(held)} of the training examples",
            "test": f"dev, {len(examples.dev)} examples",
            "majority_share": _majority_share(examples.dev),
        }

    def loss(self, model: PreTrainedModel, batch: GlueBatch) -> Tensor:
        """Mean nats per example of a batch of ``encode``."""
        labels = torch.from_numpy(batch["labels"]).to(model.device)
        return cross_entropy(self._logits(model, batch), labels)

    def accuracy(self, model: PreTrainedModel, batch: GlueBatch) -> float:
        """The share of examples that are put into their class."""
        return metrics.accuracy(most_likely(self._logits(model, batch)), batch["labels"])

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Loss, its exponential, and the metrics that the task is reported by."""
        examples = self._splits[split]

        def logits_of(rows: slice) -> Tensor:
            return self._logits(model, encode(examples[rows], self.tokenizer, self._length))

        with evaluating(model):
            batches = slices(len(examples), self._eval_batch_size, max_batches)
            logits = of_my_share(batches, logits_of)
        outcome = class_outcome(logits, np.array([example.label for example in examples]))
        return metrics.scores((*METRICS, *FORMATS[self.examples.name].metrics), outcome)

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save(folder / FOLDER)

    def _logits(self, model: PreTrainedModel, batch: GlueBatch) -> Tensor:
        inputs = {name: torch.from_numpy(batch[name]).to(model.device) for name in self._inputs}
        return model(**inputs).logits


def _majority_share(examples: Sequence[Example]) -> float:
    """The accuracy of always saying the most frequent label."""
    return max(Counter(example.label for example in examples).values()) / len(examples)
