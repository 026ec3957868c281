"""Classifying images with a vision transformer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from layer_tying.core import distributed
from layer_tying.data.batches import REWARD_SEED, Stream
from layer_tying.data.config import DataConfig
from layer_tying.data.images import ImageBatches, Images
from layer_tying.models.build import transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import ImageInput
from layer_tying.tasks import metrics
from layer_tying.tasks.evaluation import (
    class_outcome,
    cross_entropy,
    evaluating,
    most_likely,
    slices,
)

METRICS = ("loss", "perplexity", "accuracy")
Pair = tuple[np.ndarray, np.ndarray]  # uint8 pixels [B, H, W, C] and labels [B]


class ImageTask:
    """Image classification; perplexity is the exponential of the cross-entropy."""

    def __init__(self, data: DataConfig, model: ModelConfig, seed: int, images: Images) -> None:
        self.images = images
        self._eval_batch_size = data.eval_batch_size
        _, height, _, num_channels = images.x_train.shape
        self.model_config = transformers_config(
            model, ImageInput(height, num_channels, images.classes)
        )
        ordered = self._batches(data.batch_size, seed)
        self.batches: Stream = ordered
        self.reward_batches: Stream = self._batches(data.batch_size, seed + REWARD_SEED)
        self.batches_per_epoch = ordered.batches_per_epoch
        self.tokens_per_batch = data.batch_size
        self.facts: dict[str, Any] = {
            "classes": list(images.classes),
            "sha256": _sha256(images),
        }

    def _batches(self, batch_size: int, seed: int) -> ImageBatches:
        return ImageBatches(self.images.x_train, self.images.y_train, batch_size, seed)

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        """Mean nats per image of uint8 pixels [B, H, W, C] and labels [B]."""
        labels = torch.from_numpy(batch[1]).to(model.device)
        return cross_entropy(self._logits(model, batch[0]), labels)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of images that are put into their class."""
        return metrics.accuracy(most_likely(self._logits(model, batch[0])), batch[1])

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Loss, its exponential and accuracy."""
        x = getattr(self.images, f"x_{split}")
        y = getattr(self.images, f"y_{split}")
        rows_of_batches = slices(len(x), self._eval_batch_size, max_batches)
        with evaluating(model):
            mine = [self._logits(model, x[rows]) for rows in distributed.dealt(rows_of_batches)]
        return metrics.scores(METRICS, class_outcome(mine, y))

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
