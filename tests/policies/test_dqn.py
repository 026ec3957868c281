"""The agent: its pure functions by hand, its exploration, its update, and a toy it must solve."""

import copy
import io
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from ready_policies import dqn, ready

from layer_tying.core.tying import Rules, Tying
from layer_tying.policies.base import Policy
from layer_tying.policies.dqn import DQN, QNetwork, action_value, max_action_value, td_target
from layer_tying.policies.simple import RandomPolicy

pytestmark = pytest.mark.numerics

INF = float("inf")
Q = torch.tensor([[1.0, -INF, -INF], [2.0, 5.0, -INF], [0.0, 3.0, -1.0]])
STATES = [Tying((0, 0, 0, 0)), Tying((0, 1, 0, 1)), Tying((0, 1, 2, 0)), Tying((0, 0, 2, 3))]


def learn_a_little(agent: DQN, num_decisions: int = 5) -> list[tuple[int, ...]]:
    state, actions = STATES[0], []
    for step in range(num_decisions):
        actions.append(agent.act(state))
        next_state = Tying.from_action(actions[-1])
        agent.observe(state, actions[-1], -1.0 / (step + 1), next_state)
        state = next_state
    return actions


# Pure functions


@pytest.mark.parametrize(
    ("action", "value"),
    [((0, 0, 0), (1 + 2 + 0) / 3), ((0, 1, 2), (1 + 5 - 1) / 3), ((0, 1, 1), (1 + 5 + 3) / 3)],
)
def test_the_value_of_an_action_is_the_mean_of_the_entries_it_picks(action, value):
    assert float(action_value(Q, torch.tensor(action))) == pytest.approx(value)


def test_the_value_of_the_best_action_is_the_mean_of_the_rows_maxima():
    assert float(max_action_value(Q)) == pytest.approx((1 + 5 + 3) / 3)


def test_the_target_is_the_reward_and_the_discounted_value_of_the_best_next_action():
    assert float(td_target(-4.0, 0.99, Q)) == pytest.approx(-4 + 0.99 * 3)
    assert not td_target(-4.0, 0.99, Q.clone().requires_grad_()).requires_grad


# The network


def test_the_network_is_128_wide_and_lower_triangular():
    network = QNetwork(5)
    assert [tuple(p.shape) for p in network.parameters()] == [(128, 5), (128,), (15, 128), (15,)]
    q = network(Tying((0, 0, 2, 2, 4)))
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert torch.isneginf(q[above]).all()
    assert torch.isfinite(q[~above]).all()


def test_its_output_by_hand():
    """A ReLU layer on owners scaled to [0, 1]; rows are filled in order."""
    network = QNetwork(3, hidden=7)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in network.parameters())
    scaled = np.array([0, 1, 1]) / 2
    flat = w2 @ np.maximum(w1 @ scaled + b1, 0) + b2
    expected = [[flat[0], -INF, -INF], [flat[1], flat[2], -INF], [flat[3], flat[4], flat[5]]]
    np.testing.assert_allclose(network(Tying((0, 1, 1))).detach().numpy(), expected, rtol=1e-5)


# Exploration


def test_epsilon_starts_at_one_decays_and_keeps_a_floor():
    agent, seen = dqn(4), []
    for _ in range(60):
        action = agent.act(STATES[0])
        seen.append(agent.statistics()["epsilon"])
        agent.observe(STATES[0], action, None, Tying.from_action(action))
    assert seen == pytest.approx([max(0.95**n, 0.1) for n in range(60)])
    assert seen[-1] == 0.1


def test_with_epsilon_one_every_layer_explores_uniformly():
    agent = dqn(4)
    actions = [agent.act(STATES[1]) for _ in range(3000)]
    for layer in range(4):
        counts = Counter(action[layer] for action in actions)
        assert set(counts) == set(range(layer + 1))
        assert max(abs(n / 3000 - 1 / (layer + 1)) for n in counts.values()) < 0.04


def test_without_epsilon_every_layer_takes_its_most_valuable_choice():
    agent = dqn(4, epsilon=0.0)
    for state in STATES:
        q = agent.network(state)
        assert agent.act(state) == tuple(q.argmax(dim=1).tolist())
        kinds = Rules((0, 1, 0, 1), 4)
        allowed = [max(kinds.choices(i), key=lambda j, i=i: q[i, j]) for i in range(4)]
        assert dqn(kinds, epsilon=0.0).act(state) == tuple(allowed)


def test_epsilon_is_the_share_of_layers_that_explore():
    agent = dqn(4, epsilon=0.4)
    greedy = dqn(4, epsilon=0.0).act(STATES[2])
    actions = [agent.act(STATES[2]) for _ in range(4000)]
    for layer in range(1, 4):
        off = sum(action[layer] != greedy[layer] for action in actions) / len(actions)
        assert off == pytest.approx(0.4 * layer / (layer + 1), abs=0.04)


def test_the_budget_is_kept_while_exploring():
    rules = Rules((0, 1) * 4, 3)
    agent = dqn(rules)
    for _ in range(200):
        rules.check(Tying.from_action(agent.act(Tying.all_tied(8))))


def test_statistics_are_the_rows_of_q_and_can_be_logged():
    agent = dqn(4)
    agent.act(STATES[1])
    logged = json.loads(json.dumps(agent.statistics()))
    assert [len(row) for row in logged["q"]] == [1, 2, 3, 4]
    q = agent.network(STATES[1])
    assert logged["q"][2] == pytest.approx(q[2, :3].tolist(), abs=1e-5)


def test_it_has_its_own_random_numbers(monkeypatch):
    """A run with an agent draws the same dropout and the same batches as one without."""

    def forbidden(*_):
        raise AssertionError("the accelerator's random numbers were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one = learn_a_little(dqn(4, seed=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    torch.rand(3)
    assert one == learn_a_little(dqn(4, seed=1))
    assert one != learn_a_little(dqn(4, seed=2))
    weights = [next(dqn(4, seed=seed).network.parameters()) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_stays_on_the_cpu_in_single_precision():
    """Whatever scripts set as torch's defaults for their models."""
    with torch.device("meta"):
        expected = learn_a_little(dqn(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert learn_a_little(dqn(4)) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert learn_a_little(dqn(4)) == expected == learn_a_little(dqn(4))
    finally:
        torch.set_default_dtype(torch.float32)


# Learning


def test_an_update_is_one_adamw_step_on_the_squared_error():
    """Against the same step done by hand, with a target that carries no gradient."""
    state, action, next_state = STATES[1], (0, 0, 2, 1), STATES[2]
    agent = dqn(4)
    network = copy.deepcopy(agent.network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    with torch.no_grad():
        q = network(next_state)
        target = -3.0 + 0.99 * sum(float(q[i, : i + 1].max()) for i in range(4)) / 4

    def predicted(network: QNetwork) -> torch.Tensor:
        q = network(state)
        return (q[0, 0] + q[1, 0] + q[2, 2] + q[3, 1]) / 4

    before = float(predicted(network).detach())
    (predicted(network) - target).square().backward()
    optimizer.step()
    agent.observe(state, action, -3.0, next_state)
    for p, q in zip(agent.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    after = float(predicted(agent.network).detach())
    assert abs(after - target) < abs(before - target)


def test_repeated_updates_without_a_future_end_at_the_reward():
    agent = dqn(4, discount=0.0)
    for _ in range(300):
        agent.observe(STATES[1], (0, 1, 1, 2), -2.5, STATES[2])
    q = agent.network(STATES[1])
    assert float(action_value(q, torch.tensor((0, 1, 1, 2))).detach()) == pytest.approx(
        -2.5, abs=0.01
    )


def test_the_best_next_action_is_one_that_the_rules_allow():
    """Values of ties between kinds are never trained: the target must not rest on them."""
    agent = dqn(Rules((0, 1, 0), 3), discount=0.5)
    with torch.no_grad():
        agent.network.body[2].bias[[1, 4]] = 1000.0  # layer 1 using 0, and layer 2 using 1
    action = agent.act(Tying((0, 1, 0)))
    value = float(agent.network(Tying((0, 1, 0))).detach()[range(3), list(action)].mean())
    assert abs(value) < 1
    for _ in range(200):
        agent.observe(Tying((0, 1, 0)), action, 0.0, Tying((0, 1, 0)))
    value = float(agent.network(Tying((0, 1, 0))).detach()[range(3), list(action)].mean())
    assert abs(value) < 1


@pytest.mark.parametrize("reward", [None, float("nan"), INF, -INF, 1e300, -1e300, -3e38, 1e25])
def test_a_reward_that_cannot_be_learned_from_changes_nothing_but_epsilon(reward):
    agent, same = dqn(4), dqn(4)
    action = agent.act(STATES[0])
    agent.observe(STATES[0], action, reward, STATES[1])
    assert agent.epsilon == 0.95
    for p, q in zip(agent.network.parameters(), same.network.parameters(), strict=True):
        assert torch.equal(p, q)
    agent.observe(STATES[0], action, -1.0, STATES[1])
    assert all(torch.isfinite(p).all() for p in agent.network.parameters())


@pytest.mark.parametrize("reward", [-50_000.0, 1e12, -1e14])
def test_large_rewards_never_make_q_infinite(reward):
    agent = dqn(4)
    for state in STATES * 5:
        agent.observe(state, agent.act(state), reward, STATES[1])
    state = agent.optimizer.state_dict()["state"]
    assert all(torch.isfinite(p).all() for p in agent.network.parameters())
    assert all(torch.isfinite(moment).all() for s in state.values() for moment in s.values())


def test_a_saved_agent_goes_on_exactly():
    agent = dqn(4, seed=3)
    learn_a_little(agent, 20)
    saved = agent.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    uninterrupted = learn_a_little(agent, 20)
    file.seek(0)
    for state in (saved, torch.load(file, weights_only=True)):  # going on did not change it
        resumed = dqn(4, seed=4)
        resumed.load_state_dict(state)
        assert learn_a_little(resumed, 20) == uninterrupted
        assert resumed.epsilon == agent.epsilon
        for p, q in zip(resumed.network.parameters(), agent.network.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_saved_agent_still_knows_which_ties_are_forbidden():
    """The reward of its last decision comes after it was loaded."""
    rules = Rules((0, 1, 0, 1), 4)
    agent, resumed = dqn(rules, seed=3), dqn(rules, seed=4)
    action = agent.act(Tying.independent(4))
    resumed.load_state_dict(agent.state_dict())
    for each in (agent, resumed):
        each.observe(Tying.independent(4), action, -1.0, Tying.from_action(action))
    for p, q in zip(resumed.network.parameters(), agent.network.parameters(), strict=True):
        assert torch.equal(p, q)


# A toy with a known optimum


def check_that_it_finds_the_tying(policy: Policy, goal: Tying, num_decisions: int = 700) -> None:
    """The reward counts the layers that are tied as in the goal.

    A layer that names its owner in the goal scores whatever the others do, so a sum over layers
    represents what is best.
    """
    state = Tying.all_tied(goal.num_layers)
    ready(policy, goal.num_layers, state)
    rewards, states = [], []
    for _ in range(num_decisions):
        action = policy.act(state)
        next_state = Tying.from_action(action)
        pairs = zip(next_state.owners, goal.owners, strict=True)
        rewards.append(float(np.mean([mine == its for mine, its in pairs])))
        policy.observe(state, action, rewards[-1], next_state)
        state = next_state
        states.append(state)
    assert np.mean(rewards[-100:]) > 0.8
    assert Counter(states[-100:]).most_common(1)[0][0] == goal


@pytest.mark.parametrize("owners", [(0, 1, 0, 1, 4, 4), (0, 0, 2, 3, 2, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_agent_solves_a_toy_tying_problem(owners, seed):
    """Without a discounted future: the toy has none, and values are then soon what they will be."""
    check_that_it_finds_the_tying(DQN(seed=seed, discount=0.0), Tying(owners))


@pytest.mark.parametrize("owners", [(0, 1, 0, 1, 4, 4), (0, 0, 2, 3, 2, 0)])
def test_the_random_policy_does_not(owners):
    with pytest.raises(AssertionError):
        check_that_it_finds_the_tying(RandomPolicy(), Tying(owners))


def test_it_learns_where_the_caller_has_switched_gradients_off():
    """As in an evaluation function under torch.no_grad(), which calls learn."""
    expected = learn_a_little(dqn(4))
    with torch.no_grad():
        assert learn_a_little(dqn(4)) == expected
    with torch.inference_mode():
        assert learn_a_little(dqn(4)) == expected
