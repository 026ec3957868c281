"""k-hop induction, a generated task that needs depth (Sanford et al. 2024, arXiv 2402.09268).

Facts:
- A sequence holds k, from 0 to K, and then symbols of an alphabet of four, no two neighbours alike.
- With find(i) the last j <= i such that x[j-1] = x[i], the label of position i is x[find^k(i)]: one
  hop is what induction heads do, and k hops need about log2(k) + 2 layers. Where a hop leads
  nowhere there is no label.
- Training sequences are always fresh, and derived from (seed, position) alone. The validation and
  test sequences are the same in all runs of one K and length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layer_tying.data.batches import IGNORED
from layer_tying.errors import InputError

NAME = "khop"
USUAL_HOPS = 6
ALPHABET = 4
HELD_OUT = {"validation": 1024, "test": 2048}  # sequences
EPOCH = 10_000  # sequences that count as a pass over the data, which never repeat
Pair = tuple[np.ndarray, np.ndarray]  # inputs and labels, int64 [B, T] each


def is_khop(dataset: str) -> bool:
    """Whether a name means this task: ``khop``, or ``khop:K``."""
    return dataset.partition(":")[0] == NAME


MOST_HOPS = 1000


def hops_of(dataset: str) -> int:
    """K, the most hops, of a name: 6 for ``khop``.

    Raises:
        InputError: if it is not a number of at least 1.
    """
    _, colon, number = dataset.partition(":")
    if not colon:
        return USUAL_HOPS
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MOST_HOPS):
        raise InputError(
            f"data set {dataset!r}: expected {NAME}:K with K from 1 to {MOST_HOPS:,}, as {NAME}:6"
        )
    return int(number)


def vocabulary_size(max_hops: int) -> int:
    """The symbols, then one token for each k."""
    return ALPHABET + max_hops + 1


def hops_in(inputs: np.ndarray) -> np.ndarray:
    """k of each sequence of a batch, int64 [B]."""
    return inputs[:, 0] - ALPHABET


def khop_batch(rng: np.random.Generator, size: int, length: int, max_hops: int) -> Pair:
    """Random sequences and their labels, -100 where there is none.

    Each sequence has a label somewhere: where its k hops lead nowhere from any position, k is 0.

    Args:
        rng: what they are drawn from.
        size: B, their number.
        length: T, that of a sequence, with k at its start.
        max_hops: K.
    """
    hops = rng.integers(max_hops + 1, size=size)
    steps = rng.integers(1, ALPHABET, size=(size, length - 1))  # from a symbol to another one
    steps[:, 0] = rng.integers(ALPHABET, size=size)
    symbols = steps.cumsum(axis=1) % ALPHABET
    places = hop(symbols, hops)
    nowhere = (places < 0).all(axis=1)
    hops[nowhere] = 0
    places[nowhere] = np.arange(length - 1)
    found = np.take_along_axis(symbols, places.clip(0), axis=1)
    inputs = np.concatenate([hops[:, None] + ALPHABET, symbols], axis=1)
    labels = np.full_like(inputs, IGNORED)
    labels[:, 1:] = np.where(places < 0, IGNORED, found)
    return inputs, labels


def hop(symbols: np.ndarray, hops: np.ndarray) -> np.ndarray:
    """Where k hops lead from each position of symbols [B, N]: int64 [B, N], -1 for nowhere.

    hops: k of each row, [B].
    """
    length = symbols.shape[1]
    once = np.full(symbols.shape, -1)
    for symbol in range(ALPHABET):
        is_here = symbols == symbol
        after = np.where(is_here, np.arange(1, length + 1), -1)  # where a hop to it would lead
        latest = np.maximum.accumulate(after, axis=1)
        once[:, 1:] = np.where(is_here[:, 1:], latest[:, :-1], once[:, 1:])
    places = np.broadcast_to(np.arange(length), symbols.shape).copy()
    for done in range(int(hops.max(initial=0))):
        further = np.where(places < 0, -1, np.take_along_axis(once, places.clip(0), axis=1))
        places = np.where(hops[:, None] > done, further, places)
    return places


def held_out(split: str, length: int, max_hops: int) -> Pair:
    """The validation or test sequences.

    Raises:
        InputError: if sequences are too short for that many hops.
    """
    if length >= 2:
        rng = np.random.default_rng([2, list(HELD_OUT).index(split)])
        inputs, labels = khop_batch(rng, HELD_OUT[split], length, max_hops)
        if len(np.unique(hops_in(inputs))) == max_hops + 1:
            return inputs, labels
    raise InputError(
        f"bptt {length} is too short for {max_hops} hops: take about {8 * (max_hops + 1)}"
    )


class KhopBatches:
    """An endless stream of fresh batches, each derived from the seed and its position."""

    def __init__(self, length: int, max_hops: int, batch_size: int, seed: int) -> None:
        self._shape = (batch_size, length, max_hops)
        self._seed = seed
        self._position = 0
        self.batches_per_epoch = -(-EPOCH // batch_size)

    def __next__(self) -> Pair:
        rng = np.random.default_rng([1, self._seed, self._position])
        self._position += 1
        return khop_batch(rng, *self._shape)

    def state(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._position = int(state["position"])
