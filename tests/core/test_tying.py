"""The algebra of tying: canonical form, Eq. 1, groups and counts."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.core.tying import Tying
from layer_tying.errors import InputError

BELL = [1, 1, 2, 5, 15, 52, 203, 877]

actions = st.integers(1, 48).flatmap(
    lambda n: st.tuples(*(st.integers(0, i) for i in range(n))).map(tuple)
)


@given(actions)
def test_from_action_is_canonical_and_idempotent(action):
    tying = Tying.from_action(action)
    assert tying.owners[0] == 0
    assert all(tying.owners[o] == o <= i for i, o in enumerate(tying.owners))
    assert Tying.from_action(tying.owners) == tying


@given(actions)
def test_layers_share_an_owner_exactly_when_a_chain_of_ties_joins_them(action):
    def root(i):
        return i if action[i] == i else root(action[i])

    assert Tying.from_action(action).owners == tuple(root(i) for i in range(len(action)))


@pytest.mark.parametrize("num_layers", range(1, 8))
def test_the_reachable_states_are_the_set_partitions(num_layers):
    every = itertools.product(*(range(i + 1) for i in range(num_layers)))
    assert len({Tying.from_action(a) for a in every}) == BELL[num_layers]


@pytest.mark.parametrize(
    ("action", "owners"),
    [
        ((0,), (0,)),
        ((0, 0, 1), (0, 0, 0)),  # a chain: 2 uses 1 while 1 uses 0
        ((0, 1, 1, 2), (0, 1, 1, 1)),  # a chain that ends at an independent layer
        ((0, 0, 1, 2, 4, 4), (0, 0, 0, 0, 4, 4)),  # an owner that is itself re-tied takes its users
        ((0, 0, 2, 2), (0, 0, 2, 2)),  # after 0 1 1 1: the owner 1 leaves and 2 leads what is left
    ],
)
def test_hand_worked_actions(action, owners):
    assert Tying.from_action(action).owners == owners


def test_groups_and_counts():
    tying = Tying((0, 1, 0, 1, 4))
    assert tying.groups == {0: (0, 2), 1: (1, 3), 4: (4,)}
    assert tying.independent_layers == (0, 1, 4)
    assert (tying.num_layers, tying.num_independent) == (5, 3)
    assert Tying.all_tied(4).num_independent == 1
    assert Tying.independent(4).num_independent == 4
    assert Tying.from_labels("abba").owners == (0, 1, 1, 0)


@given(actions)
def test_groups_partition_the_layers(action):
    tying = Tying.from_action(action)
    members = sorted(i for group in tying.groups.values() for i in group)
    assert members == list(range(tying.num_layers))
    assert tuple(tying.groups) == tying.independent_layers


@pytest.mark.parametrize("owners", [(), (1,), (0, 2, 2), (0, 0, 1), (0, -1), (0, 1, 3)])
def test_owners_that_are_not_canonical_are_refused(owners):
    with pytest.raises(InputError, match=r"canonical|at least one"):
        Tying(owners)


@pytest.mark.parametrize("action", [(1,), (0, 2), (0, -1)])
def test_actions_that_point_forward_are_refused(action):
    with pytest.raises(InputError, match="cannot use the weights"):
        Tying.from_action(action)


def test_owners_are_plain_integers_in_a_tuple_whatever_they_came_as():
    """A list would not equal the same tying, and numpy's integers are not JSON."""
    for owners in ([0, 0, 2], np.array([0, 0, 2]), (0, np.int64(0), 2)):
        tying = Tying(owners)
        assert tying == Tying((0, 0, 2))
        assert hash(tying) == hash(Tying((0, 0, 2)))
        assert json.loads(json.dumps(tying.owners)) == [0, 0, 2]
    assert json.dumps(Tying.from_action(np.array([0, 1, 1])).owners) == "[0, 1, 1]"
    with pytest.raises(InputError, match=r"whole numbers: got \(0, 0.5\)"):
        Tying((0, 0.5))
