"""k-hop induction as a causal task: at every position, the symbol that k look-ups lead to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from layer_tying.data.batches import IGNORED, REWARD_SEED, Stream
from layer_tying.data.config import DataConfig
from layer_tying.data.khop import KhopBatches, held_out, hops_in, hops_of, vocabulary_size
from layer_tying.errors import InputError
from layer_tying.models.build import transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import TextInput
from layer_tying.tasks import metrics
from layer_tying.tasks.evaluation import slices
from layer_tying.tasks.language import Pair, accuracy_of_tokens, guesses, is_masked, loss_of_tokens

METRICS = ("loss", "perplexity", "accuracy")


class KhopTask:
    """k-hop induction; sequences are ``bptt`` tokens long.

    Raises:
        InputError: if the model predicts masked tokens, or the sequences are too short.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, seed: int) -> None:
        if is_masked(data, model):
            raise InputError(
                f"data set {data.dataset} is for causal models: take --objective causal, or a "
                f"family other than {model.family}"
            )
        self.max_hops = hops_of(data.dataset)
        self._eval_batch_size = data.eval_batch_size
        self._held_out = {
            split: held_out(split, data.bptt, self.max_hops) for split in ("validation", "test")
        }
        self.model_config = transformers_config(
            model, TextInput(vocabulary_size(self.max_hops), data.bptt)
        )
        ordered = KhopBatches(data.bptt, self.max_hops, data.batch_size, seed)
        self.batches: Stream = ordered
        self.reward_batches: Stream = KhopBatches(
            data.bptt, self.max_hops, data.batch_size, seed + REWARD_SEED
        )
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = data.batch_size * data.bptt
        digest = hashlib.sha256(b"".join(array.tobytes() for array in self._held_out["test"]))
        self.facts: dict[str, Any] = {
            "max_hops": self.max_hops,
            "length": data.bptt,
            "sha256": digest.hexdigest(),
        }

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        """Mean nats per label of a batch of ids and labels, each [B, T]."""
        return loss_of_tokens(model, batch)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of labels that the model finds most likely."""
        return accuracy_of_tokens(model, batch)

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Loss, perplexity and accuracy; accuracy for each number of hops from 1."""
        inputs, labels = self._held_out[split]
        batches = slices(len(inputs), self._eval_batch_size, max_batches)
        outcome = guesses(model, [(inputs[rows], labels[rows]) for rows in batches])
        scores = metrics.scores(METRICS, outcome)
        hops = np.broadcast_to(hops_in(inputs)[:, None], labels.shape)[labels != IGNORED]
        hops = hops[: len(outcome.labels)]
        for number in range(1, self.max_hops + 1):
            chosen = hops == number
            accuracy = metrics.accuracy(outcome.predicted[chosen], outcome.labels[chosen])
            scores[f"accuracy_k{number}"] = accuracy
        return scores

    def save(self, folder: Path) -> None:
        """Nothing: the name of the data set says what the tokens are."""
