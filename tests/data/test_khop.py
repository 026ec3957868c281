"""k-hop induction: labels against the definition, and streams that go on where they stopped."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.data.batches import IGNORED
from layer_tying.data.khop import (
    ALPHABET,
    KhopBatches,
    held_out,
    hops_in,
    hops_of,
    is_khop,
    khop_batch,
    vocabulary_size,
)
from layer_tying.errors import InputError


def label_of(symbols: list[int], place: int, hops: int) -> int:
    """The definition, word for word: x[find^k(i)], find(i) the last j <= i with x[j-1] = x[i]."""
    for _ in range(hops):
        found = [j for j in range(1, place + 1) if symbols[j - 1] == symbols[place]]
        if not found:
            return IGNORED
        place = found[-1]
    return symbols[place]


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 40), st.integers(1, 7))
def test_labels_are_those_of_the_definition(seed, size, length, max_hops):
    inputs, labels = khop_batch(np.random.default_rng(seed), size, length, max_hops)
    assert inputs.shape == labels.shape == (size, length)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.min() >= 0 and inputs.max() < vocabulary_size(max_hops)
    assert (labels[:, 0] == IGNORED).all()
    assert (labels != IGNORED).any(axis=1).all(), "each sequence has a label"
    for row, of_row in zip(inputs.tolist(), labels.tolist(), strict=True):
        hops, symbols = row[0] - ALPHABET, row[1:]
        assert 0 <= hops <= max_hops
        assert all(a != b for a, b in pairwise(symbols))
        assert of_row[1:] == [label_of(symbols, i, hops) for i in range(len(symbols))]


def test_symbols_and_hops_are_uniform():
    inputs, _ = khop_batch(np.random.default_rng(0), 4000, 33, 3)
    assert np.bincount(inputs[:, 1:].ravel()) / (4000 * 32) == pytest.approx([0.25] * 4, abs=0.01)
    assert np.bincount(hops_in(inputs)) / 4000 == pytest.approx([0.25] * 4, abs=0.03)


@given(before=st.integers(0, 5))
def test_a_stream_goes_on_from_its_position(before):
    whole, resumed = (KhopBatches(20, 3, 4, seed=5) for _ in range(2))
    for _ in range(before):
        next(whole)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for _ in range(3):
        ours, theirs = next(whole), next(resumed)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_streams_differ_by_seed_and_position():
    one, other = KhopBatches(20, 3, 4, seed=0), KhopBatches(20, 3, 4, seed=1)
    first, second = next(one)[0], next(one)[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, next(other)[0])
    assert one.batches_per_epoch == 2500


def test_what_is_held_out_is_fixed():
    once, again = held_out("test", 30, 4), held_out("test", 30, 4)
    assert np.array_equal(once[0], again[0]) and np.array_equal(once[1], again[1])
    assert not np.array_equal(once[0][:1024], held_out("validation", 30, 4)[0])


@pytest.mark.parametrize("length", [1, 5])
def test_too_short_sequences_are_refused(length):
    with pytest.raises(InputError, match=f"bptt {length} is too short for 6 hops: take about 56"):
        held_out("test", length, 6)


def test_names():
    assert [hops_of(name) for name in ("khop", "khop:3")] == [6, 3]
    assert is_khop("khop") and is_khop("khop:x") and not is_khop("khops")
    for name in ("khop:", "khop:0", "khop:x", "khop:-1", f"khop:{10**20}"):
        with pytest.raises(InputError, match="expected khop:K with K from 1 to"):
            hops_of(name)
