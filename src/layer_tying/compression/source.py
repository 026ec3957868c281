"""What a command is given to compress: a model on disk, and data that fit it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from layer_tying.compression.outcome import Outcome, OutcomeOf
from layer_tying.compression.settings import CompressConfig
from layer_tying.core.untied_copy import untied_copy
from layer_tying.data.config import DataConfig
from layer_tying.data.images import Images, load_images
from layer_tying.data.texts import load_last_words, load_texts
from layer_tying.data.tokenizer import Tokenizer
from layer_tying.data.tokens import tokenize
from layer_tying.errors import InputError
from layer_tying.models.build import context_of, model_class
from layer_tying.saving.checkpoint import unique_tensors
from layer_tying.saving.export import COMPACT, one_line
from layer_tying.saving.export_run import check_tokenizer
from layer_tying.saving.load import load
from layer_tying.tasks.base import Task
from layer_tying.tasks.evaluation import cross_entropy
from layer_tying.tasks.images import ImageTask, scaled
from layer_tying.tasks.language import LanguageTask

USUAL_LENGTH = 256


def open_model(folder: Path) -> tuple[PreTrainedModel, int]:
    """A run's best weights, a compact export, or a plain folder of transformers.

    The layers come independent: those that shared weights get copies of what they used. The number
    is that of the parameters before.

    Raises:
        InputError: if it is none of these, or is damaged.
    """
    if (folder / COMPACT).is_file() or (folder / "checkpoints" / "best").is_dir():
        loaded = load(folder)
        model = untied_copy(loaded)
        assert isinstance(loaded, PreTrainedModel) and isinstance(model, PreTrainedModel)
        return model, loaded.num_parameters()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no model: neither a run, an export nor a transformers folder"
        )
    try:
        model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()
        return model, model.num_parameters()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error)}") from None


@dataclass(frozen=True)
class Kind:
    """What a class of models does, by a part of its name.

    Attributes:
        names: endings of the names of classes.
        reads_text: whether it needs a tokenizer.
        task: reads the data that it is compressed on; takes the tokenizer as well.
        outcome_of: what it makes of a batch of that task.
    """

    names: tuple[str, ...]
    reads_text: bool
    task: Callable[[CompressConfig, PreTrainedModel, Tokenizer | None], Task]
    outcome_of: OutcomeOf


def kind_of(model: PreTrainedModel) -> Kind:
    """The record of a model.

    Raises:
        InputError: if there is none: such a model is compressed with the library.
    """
    name = type(model).__name__
    for kind in KINDS.values():
        if name.endswith(kind.names):
            return kind
    raise InputError(
        f"{name} is neither a language model nor a classifier of images, which the command reads "
        f"data for: call layer_tying.compress(model, batches) with batches of your own"
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in unique_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text(
    config: CompressConfig, model: PreTrainedModel, tokenizer: Tokenizer | None, masked: bool
) -> Task:
    assert tokenizer is not None
    check_tokenizer(tokenizer, model, config.source)
    context = context_of(model)
    length = config.bptt or int(min(context, USUAL_LENGTH))
    if length > context:
        raise InputError(f"bptt {length} is longer than the model's context of {context} tokens")
    data = DataConfig(dataset=config.dataset, bptt=length, batch_size=config.batch_size)
    corpus = tokenize(load_texts(config.dataset, config.data_dir), tokenizer)
    last_words = [] if masked else load_last_words(config.dataset, config.data_dir)
    return LanguageTask(
        data, model.config, config.seed, corpus, masked=masked, last_words=last_words
    )


def _images(config: CompressConfig, model: PreTrainedModel, _: Tokenizer | None) -> Task:
    images = load_images(config.dataset, config.data_dir)
    ours = images.x_train.shape[1:]
    size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise InputError(
            f"the configuration of {type(model).__name__} has no image_size: call "
            f"layer_tying.compress(model, batches) with batches of your own"
        )
    if ours != (its := (size, size, model.config.num_channels)):
        raise InputError(
            f"the images are of {' x '.join(map(str, ours))} (height, width, channels), the "
            f"model's of {' x '.join(map(str, its))}"
        )
    data = DataConfig(dataset=config.dataset, batch_size=config.batch_size, eval_batch_size=250)
    return ImageTask(data, model.config, config.seed, _as_numbered_by(model, images))


def _as_numbered_by(model: PreTrainedModel, images: Images) -> Images:
    """Images whose labels are the model's numbers of the classes.

    Raises:
        InputError: if there are more or fewer classes, or others by their names.
    """
    theirs = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
    if len(images.classes) != len(theirs):
        raise InputError(
            f"the images are in {len(images.classes)} classes, and the model tells "
            f"{len(theirs)} apart"
        )
    if theirs == [f"LABEL_{number}" for number in range(len(theirs))]:
        return images  # as transformers calls them where nobody has: they have no names
    number_of = {name.lower(): number for number, name in enumerate(theirs)}
    if unknown := [name for name in images.classes if name.lower() not in number_of]:
        raise InputError(
            f"the images have a class {unknown[0]!r}, and the model's are {', '.join(theirs)}: "
            f"name the folders of images as the model names its classes"
        )
    numbers = np.array([number_of[name.lower()] for name in images.classes])
    return replace(
        images,
        y_train=numbers[images.y_train],
        y_validation=numbers[images.y_validation],
        y_test=numbers[images.y_test],
        classes=tuple(theirs),
    )


def _outcome_of_tokens(model: Any, batch: Any) -> Outcome:
    """Of (ids, labels), int64 [B, T] each, the labels in their places."""
    ids, labels = (torch.from_numpy(array).to(model.device) for array in batch)
    return _outcome(model(input_ids=ids).logits, labels)


def _outcome_of_images(model: Any, batch: Any) -> Outcome:
    """Of (pixels, labels): uint8 [B, H, W, C] and int64 [B]."""
    pixels, labels = scaled(batch[0]).to(model.device), torch.from_numpy(batch[1]).to(model.device)
    return _outcome(model(pixel_values=pixels).logits, labels)


def _outcome(logits: Tensor, labels: Tensor) -> Outcome:
    return Outcome(logits.flatten(0, -2), cross_entropy(logits, labels))


KINDS: dict[str, Kind] = {
    "causal": Kind(
        ("ForCausalLM", "LMHeadModel"), True, partial(_text, masked=False), _outcome_of_tokens
    ),
    "masked": Kind(("ForMaskedLM",), True, partial(_text, masked=True), _outcome_of_tokens),
    "image": Kind(("ForImageClassification",), False, _images, _outcome_of_images),
}
