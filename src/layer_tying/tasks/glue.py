"""Fine-tuning a language model for one of GLUE's tasks, as a workload (see ``workload.py``)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.core import distributed
from layer_tying.data.batches import REWARD_SEED, Stream
from layer_tying.data.glue import GlueBatches, Task, encode
from layer_tying.data.tokenizer import FOLDER, Tokenizer
from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig
from layer_tying.tasks import metrics

GlueBatch = dict[str, np.ndarray]  # as ``glue.encode`` makes them


class GlueWorkload:
    """Fine-tuning for a task of GLUE, whose test labels are not public.

    A tenth of the training examples (at most 1,000) validates, and the task's dev split is what
    ``test`` scores, so that nothing is selected on dev.
    A token in excess of the sequence length is cut off.

    Args:
        config: the run.
        task: the examples.
        tokenizer: of the model that is fine-tuned.
        model_config: of a classifier with the task's labels.

    Raises:
        InputError: if the tokenizer has no token to pad with.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        tokenizer: Tokenizer,
        model_config: PretrainedConfig,
    ) -> None:
        if tokenizer.pad_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name!r} has no token to pad with, which fine-tuning needs"
            )
        self.task = task
        self.tokenizer = tokenizer
        self._length = config.bptt
        self._eval_batch_size = config.eval_batch_size
        self._has_token_types = config.family == "bert"
        self.model_config = model_config
        order = np.random.default_rng(0).permutation(len(task.train))
        held, kept = np.split(order, [min(1000, max(1, len(order) // 10))])
        self._splits = {"validation": [task.train[i] for i in held], "test": task.dev}
        train = [task.train[i] for i in kept]
        seed, size = config.seed, config.batch_size
        ordered = GlueBatches(train, tokenizer, config.bptt, size, seed)
        self.batches: Stream = ordered
        self.reward_batches: Stream = GlueBatches(
            train, tokenizer, config.bptt, size, seed + REWARD_SEED
        )
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = size
        self.facts = {
            "task": task.name,
            "sha256": hashlib.sha256(repr(task).encode()).hexdigest(),
            "num_train": len(train),
            "validation": f"{len(held)} of the training examples",
            "test": f"dev, {len(task.dev)} examples",
        }

    def loss(self, model: PreTrainedModel, batch: GlueBatch) -> Tensor:
        """Mean nats per example of a batch of ``glue.encode``."""
        labels = torch.from_numpy(batch["labels"]).to(model.device)
        return metrics.cross_entropy(self._logits(model, batch), labels)

    def accuracy(self, model: PreTrainedModel, batch: GlueBatch) -> float:
        """The share of examples that are put into their class."""
        return metrics.accuracy(metrics.most_likely(self._logits(model, batch)), batch["labels"])

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Accuracy; Matthews correlation for CoLA and F1 for MRPC."""
        examples = self._splits[split]
        slices = metrics.slices(len(examples), self._eval_batch_size, max_batches)
        logits = []
        with metrics.evaluating(model):
            for rows in distributed.dealt(slices):
                batch = encode(examples[rows], self.tokenizer, self._length)
                logits.append(self._logits(model, batch).float().cpu())
        together = torch.cat(distributed.gather_dealt(logits))
        labels = np.array([example.label for example in examples[: len(together)]])
        scores = metrics.class_scores(together, labels)
        if self.task.name == "cola":
            found = metrics.most_likely(together)
            scores["matthews_correlation"] = metrics.matthews_correlation(found, labels)
        if self.task.name == "mrpc":
            scores["f1"] = metrics.f1_score(metrics.most_likely(together), labels)
        return scores

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save(folder / FOLDER)

    def _logits(self, model: PreTrainedModel, batch: GlueBatch) -> Tensor:
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * self._has_token_types
        tensors = {name: torch.from_numpy(batch[name]).to(model.device) for name in names}
        return model(**tensors).logits
