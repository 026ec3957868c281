"""Classifying images with a vision transformer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

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
    of_my_share,
    slices,
)

METRICS = ("loss", "perplexity", "accuracy")
Pair = tuple[np.ndarray, np.ndarray]  # uint8 pixels [B, H, W, C] and labels [B]


class ImageTask:
    """Image classification; perplexity is the exponential of the cross-entropy.

    Args:
        data: the sizes of the batches.
        model_config: the model that is trained.
        seed: of the order of the batches.
        images: all of them.
    """

    def __init__(
        self, data: DataConfig, model_config: PretrainedConfig, seed: int, images: Images
    ) -> None:
        self.images = images
        self.model_config = model_config
        self._eval_batch_size = data.eval_batch_size
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
        return cross_entropy(logits_of_images(model, batch[0]), labels)

    def accuracy(self, model: PreTrainedModel, batch: Pair) -> float:
        """The share of images that are put into their class."""
        return metrics.accuracy(most_likely(logits_of_images(model, batch[0])), batch[1])

    def scores(
        self, model: PreTrainedModel, split: str, max_batches: int | None = None
    ) -> dict[str, float]:
        """Loss, its exponential and accuracy."""
        x = getattr(self.images, f"x_{split}")
        y = getattr(self.images, f"y_{split}")
        batches = slices(len(x), self._eval_batch_size, max_batches)
        with evaluating(model):
            mine = of_my_share(batches, lambda rows: logits_of_images(model, x[rows]))
        return metrics.scores(METRICS, class_outcome(mine, y))

    def save(self, folder: Path) -> None:
        """Nothing: the model's configuration names its classes."""


def image_config(model: ModelConfig, images: Images) -> PretrainedConfig:
    """The configuration of a model that tells these images apart."""
    _, height, _, num_channels = images.x_train.shape
    return transformers_config(model, ImageInput(height, num_channels, images.classes))


def scaled(pixels: np.ndarray) -> Tensor:
    """What a model reads of uint8 pixels [B, H, W, C]: from -1 to 1, [B, C, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def logits_of_images(model: PreTrainedModel, pixels: np.ndarray) -> Tensor:
    """Logits [B, classes] of uint8 pixels [B, H, W, C], on the model's device."""
    return model(pixel_values=scaled(pixels).to(model.device)).logits


def _sha256(images: Images) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for part in ("x", "y"):
            digest.update(np.ascontiguousarray(getattr(images, f"{part}_{split}")).data)
    return digest.hexdigest()
