"""Other ways to make a trained model as small, healed in the same way as ours."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from low_rank import cut_ranks
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_tying.compression.grouping import Reading
from layer_tying.compression.outcome import OutcomeOf
from layer_tying.core.find import find_layers
from layer_tying.core.patterns import pattern

Student = tuple[PreTrainedModel, Reading]  # a copy of the teacher, and what its layers will read


def tied_by(name: str) -> Any:
    """Layers tied in a pattern, with the weights of each group's first layer."""

    def make(teacher: PreTrainedModel, number: int, seed: int, **_: Any) -> Student:
        depth = len(find_layers(teacher).names)
        return copy.deepcopy(teacher), pattern(name, depth, number).owners

    return make


def tied_at_random(teacher: PreTrainedModel, number: int, seed: int, **_: Any) -> Student:
    """Random layers are kept, and each other layer reads one of them, at random."""
    rng = random.Random(seed)
    depth = len(find_layers(teacher).names)
    kept = rng.sample(range(depth), number)
    reading = tuple(layer if layer in kept else rng.choice(kept) for layer in range(depth))
    return copy.deepcopy(teacher), reading


def upper_dropped(teacher: PreTrainedModel, number: int, **_: Any) -> Student:
    """The first layers are kept, and the upper ones dropped."""
    return _with_layers(teacher, range(number))


def least_influential_dropped(
    teacher: PreTrainedModel, number: int, batches: Sequence[Any], outcome_of: OutcomeOf, **_: Any
) -> Student:
    """The layers that turn the hidden states most are kept.

    The block influence of a layer is 1 minus the cosine between what it reads and what it returns
    (Men et al. 2024, ShortGPT).
    """
    blocks = find_layers(teacher).blocks
    influence = [0.0] * len(blocks)

    def add(index: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            after: Tensor = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(inputs[0], after, dim=-1)
            influence[index] += float(1 - cosine.mean())

        return hook

    hooks = [block.register_forward_hook(add(i)) for i, block in enumerate(blocks)]
    with torch.no_grad():
        for batch in batches:
            outcome_of(teacher, batch)
    for hook in hooks:
        hook.remove()
    kept = sorted(sorted(range(len(blocks)), key=lambda i: -influence[i])[:number])
    return _with_layers(teacher, kept)


def low_rank(teacher: PreTrainedModel, number: int, **_: Any) -> Student:
    """Every matrix is cut to a rank with which all layers take as much as so many whole ones."""
    student = copy.deepcopy(teacher)
    blocks = find_layers(student).blocks
    cut_ranks(blocks, number / len(blocks))
    return student, tuple(range(len(blocks)))


def _with_layers(teacher: PreTrainedModel, kept: Sequence[int]) -> Student:
    """A copy with some of its layers only, each on its own."""
    student = copy.deepcopy(teacher)
    stack = find_layers(student)
    path = stack.names[0].rpartition(".")[0]  # of the list of layers
    parent, attribute = path.rpartition(".")[::2]
    blocks = nn.ModuleList(stack.blocks[i] for i in kept)
    setattr(student.get_submodule(parent), attribute, blocks)
    student.config.num_hidden_layers = len(blocks)
    student.config.use_cache = False  # the layers' places in a cache are no longer in a row
    return student, tuple(range(len(blocks)))


RIVALS: dict[str, Any] = {
    "sequence, first layers": tied_by("sequence"),
    "cycle, first layers": tied_by("cycle"),
    "random groups": tied_at_random,
    "upper layers dropped": upper_dropped,
    "least influential dropped": least_influential_dropped,
    "low rank": low_rank,
}
"""The rivals by name; each makes a student."""
