"""Batches: seeded, endless, and resumable from two numbers.

Facts:
- Examples are reshuffled each epoch by a generator derived from (seed, epoch) alone, so (epoch,
  position) is the whole state: a run that restores it continues with exactly the batches that
  would have come. Another seed gives another, unrelated stream over the same examples.
- Text is cut into windows that share their boundary token: the label at the end of a window is the
  true next token, and each token but the first is predicted exactly once.
- Label -100 means: not predicted (PyTorch's cross-entropy leaves it out).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from layer_tying.data.tokenizer import Tokenizer
from layer_tying.errors import InputError

T = TypeVar("T")
IGNORED = -100
REWARD_SEED = 1_000_003  # added to a run's seed for the agent's batches, to keep them apart


class Stream(Protocol):
    """An endless, resumable stream of batches: whatever arrays its task understands."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Where the stream is: JSON-able."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from there."""
        ...


class ShuffledBatches(ABC, Generic[T]):
    """An endless iterator of batches of `batch_size`; a batch may straddle two epochs.

    `batches_per_epoch` is the number of batches after which each example has been seen.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        if num_examples < 1:
            raise InputError("there is no example to make batches of")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: must be at least 1")
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.batches_per_epoch = -(-num_examples // batch_size)
        self._start_epoch(0)

    @abstractmethod
    def examples(self, indices: np.ndarray) -> T:
        """The batch of the examples with these indices, int64 [batch_size]."""

    def __iter__(self) -> "ShuffledBatches[T]":
        return self

    def __next__(self) -> T:
        indices: list[np.ndarray] = []
        missing = self.batch_size
        while missing:
            if self._position == self.num_examples:
                self._start_epoch(self._epoch + 1)
            indices.append(self._order[self._position : self._position + missing])
            self._position += len(indices[-1])
            missing -= len(indices[-1])
        return self.examples(np.concatenate(indices))

    def state(self) -> dict[str, int]:
        """Where the stream stands; goes through JSON."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from `state`, taken of a stream over the same examples with the same seed.

        Raises InputError where the state cannot be one of this stream.
        """
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position <= self.num_examples:
            raise InputError(f"data position {state}: not one of {self.num_examples} examples")
        self._start_epoch(epoch)
        self._position = position

    def _start_epoch(self, epoch: int) -> None:
        self._epoch: int = epoch
        self._position: int = 0
        self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)


def rows_of_rank(batch: Any, rank: int, world_size: int) -> tuple[Any, float]:
    """One process's rows of a batch that several processes share, and what they weigh.

    Args:
        batch: arrays of equally many rows: (inputs, labels), or a dict that has ``labels``.
        rank, world_size: row i goes to process i modulo ``world_size``.

    Returns:
        The rows, and a weight such that the mean over processes of weight times the mean over a
        process's predictions is the mean over the predictions of the whole batch.
    """
    rows = slice(rank, None, world_size)
    if isinstance(batch, dict):
        labels, mine = batch["labels"], {name: array[rows] for name, array in batch.items()}
    else:
        labels, mine = batch[1], tuple(array[rows] for array in batch)
    predicted = labels != IGNORED
    return mine, float(world_size * predicted[rows].sum() / predicted.sum())


class Batches(ShuffledBatches[tuple[np.ndarray, np.ndarray]]):
    """Training batches of a text: (inputs, labels), int64 [batch_size, length] each.

    `tokens` [N] is cut into (N - 1) // length windows; labels are the inputs' true next tokens.
    Raises InputError where the text is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int):
        _check_length(length)
        if len(tokens) < length + 1:
            raise InputError(
                f"the text is shorter than one sequence ({len(tokens)} tokens of {length + 1}): "
                "use a longer text or a shorter sequence"
            )
        self.tokens, self.length = tokens, length
        super().__init__((len(tokens) - 1) // length, batch_size, seed)

    def examples(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows with these indices, and their next tokens."""
        places = indices[:, None] * self.length + np.arange(self.length + 1)
        windows = self.tokens[places].astype(np.int64)
        return windows[:, :-1], windows[:, 1:]


def evaluation_windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All of a text, in order: inputs and labels, int64 [ceil((N - 1) / length), length] each.

    Every token but the first is a label exactly once; the last window is filled up with input 0 and
    label -100. Raises InputError for a text of fewer than two tokens.
    """
    _check_length(length)
    if len(tokens) < 2:
        raise InputError(f"nothing to predict in {len(tokens)} token(s): use a longer text")
    num_windows = -(-(len(tokens) - 1) // length)
    inputs = np.zeros(num_windows * length, np.int64)
    labels = np.full(num_windows * length, IGNORED, np.int64)
    inputs[: len(tokens) - 1] = tokens[:-1]
    labels[: len(tokens) - 1] = tokens[1:]
    return inputs.reshape(num_windows, length), labels.reshape(num_windows, length)


def mask_tokens(
    inputs: np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer, probability: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (Devlin et al. 2019): (masked inputs, labels), int64 [B, T] each.

    Of the ordinary tokens each is chosen with `probability`, and at least one in every row; chosen
    tokens become the mask in 80 % of cases, a random token in 10 %, and stay in 10 %. Labels are
    the chosen tokens, -100 elsewhere. Raises InputError where the tokenizer has no mask token.
    """
    if tokenizer.mask_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has no mask token, which a masked language model needs: "
            "use bytes, bpe:N or bert-base-uncased"
        )
    ordinary = ~np.isin(inputs, list(tokenizer.special_ids))
    draws = np.where(ordinary, rng.random(inputs.shape), np.inf)
    chosen = draws < probability
    rows = np.arange(len(inputs))
    first = draws.argmin(axis=1)
    chosen[rows, first] = ordinary[rows, first]  # a row of special tokens only has none to choose

    labels = np.where(chosen, inputs, IGNORED).astype(np.int64)
    kinds = rng.random(inputs.shape)
    random_tokens = rng.integers(tokenizer.vocab_size, size=inputs.shape)
    masked = inputs.astype(np.int64)
    masked[chosen & (kinds < 0.8)] = tokenizer.mask_id
    swapped = chosen & (kinds >= 0.8) & (kinds < 0.9)
    masked[swapped] = random_tokens[swapped]
    return masked, labels


class MaskedBatches:
    """Batches for masked-token prediction: BERT's masks, drawn each time."""

    def __init__(self, batches: Batches, tokenizer: Tokenizer, seed: int) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        inputs, _ = next(self._batches)
        return mask_tokens(inputs, self._rng, self._tokenizer)

    def state(self) -> dict[str, Any]:
        """The place in the data, and the state of the random numbers."""
        return {"batches": self._batches.state(), "rng": self._rng.bit_generator.state}

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned."""
        self._batches.restore(state["batches"])
        self._rng.bit_generator.state = state["rng"]


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"sequence length {length}: must be at least 1")
