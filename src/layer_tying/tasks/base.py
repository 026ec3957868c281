"""A task: what is trained on what. Its model's configuration, batches, loss and scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layer_tying.data.batches import Stream
from layer_tying.data.config import DataConfig
from layer_tying.data.glue import load_task
from layer_tying.data.images import load_images
from layer_tying.data.khop import is_khop
from layer_tying.data.texts import load_last_words, load_texts
from layer_tying.data.tokenizer import load_tokenizer, read_tokenizer
from layer_tying.data.tokens import tokenize
from layer_tying.errors import InputError
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES
from layer_tying.tasks.glue import GlueTask
from layer_tying.tasks.images import ImageTask, image_config
from layer_tying.tasks.khop import KhopTask
from layer_tying.tasks.language import LanguageTask, is_masked, language_config


class Task(Protocol):
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


def build_task(
    data: DataConfig, model: ModelConfig, seed: int, tokenizer_folder: Path | None = None
) -> Task:
    """Read and tokenise the data, and make a task of them.

    Args:
        data: which data, and how they are cut into batches.
        model: the shape of the model.
        seed: of the order of the batches.
        tokenizer_folder: where the tokenizer of the model lies, if it was trained already.

    Raises:
        InputError: if the data cannot be found or used, or do not fit the model.
    """
    if data.task:
        return _glue(data, model, seed, tokenizer_folder)
    if FAMILIES[model.family].kind == "image":
        images = load_images(data.dataset, data.data_dir)
        return ImageTask(data, image_config(model, images), seed, images)
    if is_khop(data.dataset):
        return KhopTask(data, model, seed)
    texts = load_texts(data.dataset, data.data_dir)
    if tokenizer_folder and tokenizer_folder.is_dir():  # it may lie elsewhere no more
        tokenizer = read_tokenizer(tokenizer_folder)
    else:
        tokenizer = load_tokenizer(data.tokenizer, texts.train, data.data_dir)
    masked = is_masked(data, model)
    last_words = [] if masked else load_last_words(data.dataset, data.data_dir)
    config = language_config(data, model, tokenizer)
    corpus = tokenize(texts, tokenizer)
    return LanguageTask(data, config, seed, corpus, masked=masked, last_words=last_words)


def _glue(
    data: DataConfig, model: ModelConfig, seed: int, tokenizer_folder: Path | None
) -> GlueTask:
    if FAMILIES[model.family].classifier is None or tokenizer_folder is None:
        raise InputError(
            f"task {data.task} fine-tunes a language model that was trained before, "
            f"which family {model.family} alone is not: name the run with --from"
        )
    examples = load_task(str(data.task), data.data_dir)
    return GlueTask(data, model, seed, examples, read_tokenizer(tokenizer_folder))


def is_same_data(facts: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two tasks' facts are of the same data, wherever these came from."""
    return {**facts, "source": None} == {**other, "source": None}
