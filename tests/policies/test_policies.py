"""Static patterns by hand, random choice, and the budget that no action exceeds."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ready_policies import ready

from layer_tying.core.patterns import PATTERNS, pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.policies.base import within_budget
from layer_tying.policies.simple import RandomPolicy


@pytest.mark.parametrize(
    ("name", "num_layers", "num_groups", "owners"),
    [
        ("none", 6, None, (0, 1, 2, 3, 4, 5)),
        ("all", 6, None, (0, 0, 0, 0, 0, 0)),
        ("repeat", 6, None, (0, 0, 2, 2, 4, 4)),
        ("repeat", 5, None, (0, 0, 2, 2, 4)),
        ("sandwich", 6, None, (0, 1, 1, 1, 1, 5)),
        ("sandwich", 2, None, (0, 1)),
        ("sandwich", 1, None, (0,)),
        ("sandwich", 6, 1, (0, 0, 0, 0, 0, 0)),
        ("sandwich", 6, 2, (0, 1, 1, 1, 1, 1)),
        ("sandwich", 6, 4, (0, 1, 1, 3, 3, 5)),
        ("sandwich", 6, 6, (0, 1, 2, 3, 4, 5)),
        # Takase and Kiyono 2021, figure 1: M = 3 and N = 6
        ("sequence", 6, 3, (0, 0, 2, 2, 4, 4)),
        ("cycle", 6, 3, (0, 1, 2, 0, 1, 2)),
        ("cycle-reverse", 6, 3, (0, 1, 2, 2, 1, 0)),
        # and longer ones
        ("sequence", 12, 4, (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9)),
        ("sequence", 6, 4, (0, 0, 2, 3, 3, 5)),
        ("cycle", 12, 5, (0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1)),
        ("cycle-reverse", 12, 4, (0, 1, 2, 3, 0, 1, 2, 3, 3, 2, 1, 0)),
        ("cycle-reverse", 12, 5, (0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 3)),
        ("cycle-reverse", 6, 6, (0, 1, 2, 3, 4, 5)),
        ("cycle-reverse", 6, 1, (0, 0, 0, 0, 0, 0)),
        ("middle-loop", 6, 3, (0, 1, 1, 1, 1, 5)),
        ("middle-loop", 6, 4, (0, 1, 2, 1, 2, 5)),
        ("middle-loop", 12, 8, (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 10, 11)),
        ("middle-loop", 6, 2, (0, 1, 0, 1, 0, 1)),
        ("middle-loop", 6, 6, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_patterns_worked_out_by_hand(name, num_layers, num_groups, owners):
    assert pattern(name, num_layers, num_groups) == Tying(owners)


def takase_and_kiyono(num_layers: int, num_groups: int) -> list[int]:
    """CYCLE (REV) as their algorithm 1 states it, with layers counted from 1."""
    n, m = num_layers, num_groups
    uses = {}
    for i in range(1, n + 1):
        if i <= m:
            uses[i] = i
        elif i <= m * (-(-n // m) - 1):
            uses[i] = (i - 1) % m + 1
        else:
            uses[i] = m - (i - 1) % m
    return [uses[i] for i in range(1, n + 1)]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_cycle_reverse_is_that_of_the_paper(sizes):
    num_layers, num_groups = sizes
    expected = Tying.from_labels(takase_and_kiyono(num_layers, num_groups))
    assert pattern("cycle-reverse", num_layers, num_groups) == expected


@given(
    st.sampled_from(["sequence", "cycle", "cycle-reverse", "middle-loop"]),
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)
def test_the_number_of_groups_is_the_number_of_independent_layers(name, sizes):
    num_layers, num_groups = sizes
    assert pattern(name, num_layers, num_groups).num_independent == num_groups


def test_errors_name_the_value_and_what_is_known():
    with pytest.raises(InputError, match=r"unknown pattern 'spiral'.*cycle-reverse"):
        pattern("spiral", 6, 2)
    for num_groups in (None, 0, 7, 2.5):
        with pytest.raises(InputError, match=f"from 1 to 6, got {num_groups}"):
            pattern("cycle", 6, num_groups)
    assert {pattern(name, 6, 3).num_layers for name in PATTERNS} == {6}


# The random policy


def test_the_random_policy_draws_every_allowed_layer_equally_often():
    policy, state = ready(RandomPolicy(seed=0), 4), Tying.all_tied(4)
    actions = [policy.act(state) for _ in range(4000)]
    for layer in range(4):
        counts = Counter(action[layer] for action in actions)
        assert set(counts) == set(range(layer + 1))
        assert max(abs(n / 4000 - 1 / (layer + 1)) for n in counts.values()) < 0.03


@pytest.mark.parametrize(("num_layers", "printed"), [(12, 3.10), (48, 4.46)])
def test_its_expected_number_of_independent_layers_is_the_harmonic_number(num_layers, printed):
    harmonic = float(sum(Fraction(1, i + 1) for i in range(num_layers)))
    assert round(harmonic, 2) == printed
    policy, state = ready(RandomPolicy(), num_layers), Tying.all_tied(num_layers)
    drawn = [
        Tying.from_action(policy.act(state)).num_independent for _ in range(36_000 // num_layers)
    ]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert abs(np.mean(drawn) - harmonic) < 4 * error


def test_the_same_seed_draws_the_same_and_a_saved_state_goes_on():
    state, rules = Tying.all_tied(6), Rules((0,) * 6, 4)
    one, same, other = (ready(RandomPolicy(seed), rules) for seed in (1, 1, 2))
    drawn = [one.act(state) for _ in range(10)]
    assert drawn == [same.act(state) for _ in range(10)]
    assert drawn != [other.act(state) for _ in range(10)]
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.act(state) for _ in range(10)] == [other.act(state) for _ in range(10)]


# Budgets


@st.composite
def budgets(draw):
    """Kinds of layers, a budget that they fit in, an action within the kinds, and values."""
    num_layers = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, 3), min_size=num_layers, max_size=num_layers))
    kinds = Tying.from_labels(labels).owners
    rules = Rules(kinds, draw(st.integers(len(set(kinds)), num_layers)))
    action = tuple(draw(st.sampled_from(rules.choices(i))) for i in range(num_layers))
    value = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(num_layers, num_layers))
    return action, value, rules


@given(budgets())
def test_a_budget_is_never_exceeded_and_kinds_are_respected(budget):
    action, value, rules = budget
    kept = within_budget(action, value, rules)
    rules.check(Tying.from_action(kept))  # raises
    asked = Tying.from_action(action).num_independent
    assert Tying.from_action(kept).num_independent == min(asked, rules.max_independent)


@given(budgets())
def test_layers_are_tied_in_the_order_of_what_their_independence_is_worth(budget):
    action, value, rules = budget
    kept = within_budget(action, value, rules)

    def best(layer):
        return max(value[layer, j] for j in rules.choices(layer)[:-1])

    may_tie = [i for i, a in enumerate(action) if a == i and len(rules.choices(i)) > 1]
    tied = [i for i in may_tie if kept[i] != i]
    worth = {i: value[i, i] - best(i) for i in may_tie}
    assert all(worth[i] <= worth[j] for i in tied for j in may_tie if j not in tied)
    for layer, choice in enumerate(kept):
        if layer in tied:
            assert value[layer, choice] == best(layer)
        else:
            assert choice == action[layer]


def test_a_random_policy_keeps_the_budget():
    rules = Rules((0, 1, 0, 1, 0, 1, 0, 1), 3)
    policy = ready(RandomPolicy(), rules)
    for _ in range(300):
        tying = Tying.from_action(policy.act(Tying.all_tied(8)))
        rules.check(tying)
