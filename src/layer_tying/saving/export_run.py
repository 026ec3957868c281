"""Exporting what the command trained: a run's best weights, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.data.glue import for_others
from layer_tying.data.tokenizer import FOLDER, Tokenizer, read_tokenizer
from layer_tying.errors import InputError
from layer_tying.models.families import FAMILIES
from layer_tying.saving.checkpoint import read_checkpoint
from layer_tying.saving.export import COMPACT, DTYPES, export_compact, export_expanded
from layer_tying.saving.load import load


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        file: the weights.
        num_bytes: its size on disk.
        num_unique: distinct parameters.
        num_parameters: parameters that the layers use, shared ones counted each time.
        tying: the layers'.
    """

    file: Path
    num_bytes: int
    num_unique: int
    num_parameters: int
    tying: Tying


def export_run(run: Path, folder: Path, format: str, dtype: str | None = None) -> Export:
    """Export a run's best weights (or another compact export), with its tokenizer if it has one.

    Args:
        run: the run folder.
        folder: where to write.
        format: ``expanded`` or ``compact``.
        dtype: ``fp32``, ``bf16``, ``fp16`` or, of compact ones, ``int8``; by default what the run
            was trained for.

    Raises:
        InputError: as ``load`` and the two formats do, or if the folder is the run's own.
    """
    if run.resolve() == folder.resolve():
        raise InputError(f"cannot export {run} into itself: name another folder")
    model = load(run)
    best = run / "checkpoints" / "best"
    if dtype is None and best.is_dir():
        dtype = read_checkpoint(best).config["tying"]["export_dtype"]
    write, name = {
        "expanded": (export_expanded, "model.safetensors"),
        "compact": (export_compact, COMPACT),
    }[format]
    write(model, folder, DTYPES[dtype] if dtype else None)
    if (run / FOLDER).is_dir() or (run / "tokenizer.json").is_file():
        _tokenizer_for_others(run, model).save(folder)
    layers = TiedLayers(model)
    num_unique = sum(p.numel() for p in model.parameters())
    again = sum(
        p.numel()
        for layer, owner in enumerate(layers.tying.owners)
        if layer != owner
        for p in layers.parameters(layer).values()
    )
    file = folder / name
    return Export(file, file.stat().st_size, num_unique, num_unique + again, layers.tying)


def _tokenizer_for_others(run: Path, model: nn.Module) -> Tokenizer:
    """The run's tokenizer; of a run on GLUE, one that builds the inputs of a classifier."""
    tokenizer = tokenizer_of(run)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if isinstance(model, PreTrainedModel) and is_classifier:
        reads_types = FAMILIES[model.config.model_type].reads_token_types
        return for_others(tokenizer, reads_types)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, model: PreTrainedModel, folder: str | Path) -> None:
    """Raise an InputError if a folder's tokenizer has ids that its model has not."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, and the model has "
            f"{model.config.vocab_size}: they are not of one model"
        )


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer that a run, or an export of one, was saved with.

    Raises:
        InputError: if there is none.
    """
    in_run = Path(folder) / FOLDER
    return read_tokenizer(in_run if in_run.is_dir() else folder)
