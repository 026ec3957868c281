"""The searches for groups, against all the groupings there are."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.compression import grouping

NUM_LAYERS = 5


@st.composite
def costs(draw):
    """What it costs that layer i reads layer j's weights; its own cost nothing."""
    number = st.floats(0, 10, allow_nan=False)
    rows = draw(st.lists(st.lists(number, min_size=5, max_size=5), min_size=5, max_size=5))
    return [[0.0 if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]


numbers = st.integers(1, NUM_LAYERS)


def all_readings_of_neighbours(number):
    """Every cut into groups of neighbours, with every choice of a source in each."""
    for borders in combinations(range(1, NUM_LAYERS), number - 1):
        ends = (0, *borders, NUM_LAYERS)
        groups = [range(ends[i], ends[i + 1]) for i in range(number)]
        for sources in product(*groups):
            yield tuple(
                source for group, source in zip(groups, sources, strict=True) for _ in group
            )


@given(costs(), numbers)
def test_neighbours_are_the_cheapest_of_all_cuts(table, number):
    reading = grouping.neighbours(table, number)
    assert reading in set(all_readings_of_neighbours(number))
    least = min(grouping.cost(table, each) for each in all_readings_of_neighbours(number))
    assert grouping.cost(table, reading) == pytest.approx(least)


@given(costs(), numbers)
def test_no_exchange_of_a_kept_layer_is_cheaper_than_the_free_partition(table, number):
    reading = grouping.free(table, number)
    kept = set(reading)
    assert len(kept) == number
    for out, into in product(kept, set(range(NUM_LAYERS)) - kept):
        others = kept - {out} | {into}
        cheapest = sum(
            0 if i in others else min(table[i][j] for j in others) for i in range(NUM_LAYERS)
        )
        assert grouping.cost(table, reading) <= cheapest + 1e-9


def test_the_free_partition_is_found_where_it_is_plain():
    """Layers 0, 2 and 4 are alike, and so are 1 and 3."""
    table = [[0.0 if i % 2 == j % 2 else 5.0 for j in range(5)] for i in range(5)]
    reading = grouping.free(table, 2)
    assert reading[0] == reading[2] == reading[4]
    assert reading[1] == reading[3] != reading[0]


@given(costs(), numbers)
def test_a_cycle_repeats_and_reads_a_layer_of_each_group(table, number):
    reading = grouping.cycle(table, number)
    assert len(set(reading)) == number
    for layer, source in enumerate(reading):
        assert source % number == layer % number
        assert reading[layer % number] == source
    best = min(sum(table[i][j] for i in range(0, 5, number)) for j in range(0, 5, number))
    assert sum(table[i][reading[0]] for i in range(0, 5, number)) == pytest.approx(best)


@given(costs(), numbers)
def test_grown_groups_take_the_best_of_the_measured_mergers(table, number):
    """With every merger measured, each step is the cheapest one; with one layer less, it is it."""
    measured = []

    def measure(reading):
        measured.append(reading)
        return grouping.cost(table, reading)

    reading = grouping.grown(table, number, measure, width=100)
    assert len(set(reading)) == number
    if number == NUM_LAYERS - 1:
        least = min(table[i][j] for i, j in product(range(5), range(5)) if i != j)
        assert grouping.cost(table, reading) == pytest.approx(least)
    assert all(len(set(each)) >= number for each in measured)


@given(costs(), numbers, st.randoms(use_true_random=False))
def test_refining_never_makes_it_worse_nor_changes_the_number(table, number, rng):
    kept = rng.sample(range(NUM_LAYERS), number)
    reading = tuple(i if i in kept else rng.choice(kept) for i in range(NUM_LAYERS))
    refined = grouping.refined(reading, lambda each: grouping.cost(table, each))
    assert set(refined) == set(reading)
    nearest = sum(0 if i in kept else min(table[i][j] for j in kept) for i in range(NUM_LAYERS))
    assert grouping.cost(table, refined) == pytest.approx(nearest)
