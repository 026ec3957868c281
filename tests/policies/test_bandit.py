"""The bandit: its filter against plain conditioning, its moves, what it finds, going on exactly."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ready_policies import ready
from small_runs import crashed_at, lines_of, small, traces_of, write_text
from tiny_models import gpt2

from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Rules, Tying
from layer_tying.dynamic import DynamicTying
from layer_tying.errors import InputError
from layer_tying.policies import bandit
from layer_tying.policies.bandit import Bandit
from layer_tying.runs.train import train
from layer_tying.runs.trainer import Trainer


def test_the_filter_is_conditioning_a_joint_gaussian_on_all_rewards():
    """All of it written out at once: worths, and a level and a slope for every decision."""
    num_layers, num_rewards = 5, 7
    rng = np.random.default_rng(0)
    tyings = [
        Tying.from_labels(np.cumsum([0, *rng.integers(0, 2, num_layers - 1)]).tolist())
        for _ in range(num_rewards)
    ]
    rewards = rng.normal(-5, 0.1, num_rewards)

    # Every quantity is a linear function of independent Gaussian sources.
    worths = np.eye(num_layers - 1) * bandit.WORTH
    sources = num_layers - 1 + 2 + 2 * num_rewards + num_rewards
    level = np.zeros(sources)
    slope = np.zeros(sources)
    level[num_layers - 1], slope[num_layers] = bandit.UNKNOWN
    rows = []
    for t, tying in enumerate(tyings):
        level = level + slope
        level[num_layers + 1 + 2 * t] += bandit.LEVEL
        slope = slope.copy()
        slope[num_layers + 2 + 2 * t] += bandit.SLOPE
        row = level.copy()
        for layer in tying.independent_layers[1:]:
            row[: num_layers - 1] += worths[layer - 1]
        row[num_layers + 1 + 2 * num_rewards + t] = bandit.NOISE
        rows.append(row)
    design = np.array(rows)
    prior = np.zeros(num_layers)
    prior[1] += bandit.FIRST
    prior[-1] += bandit.LAST
    expected = [sum(prior[i] for i in tying.independent_layers[1:]) for tying in tyings]
    of_worths = np.hstack([worths, np.zeros((num_layers - 1, sources - num_layers + 1))])
    posterior = prior[1:] + of_worths @ design.T @ np.linalg.solve(
        design @ design.T, rewards - expected
    )

    policy = ready(Bandit(), num_layers, num_decisions=99)
    for tying, reward in zip(tyings, rewards, strict=True):
        policy.observe(tying, tying.owners, reward, tying)
    assert policy.worth()[1:] == pytest.approx(posterior, abs=1e-5)


def play(policy: Bandit, worth: np.ndarray, start: Tying, seed: int) -> list[Tying]:
    """A model in training whose loss falls, with noise, and by what its tying is worth."""
    rng = np.random.default_rng(seed)
    state, states = start, []
    for t in range(policy.num_decisions + 3):
        after = Tying.from_action(policy.act(state))
        merit = sum(worth[i] for i in after.independent_layers)
        reward = -2 - 4 / (1 + t / 10) + merit + rng.normal(0, bandit.NOISE)
        policy.observe(state, after.owners, reward, after)
        state = after
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("seed", "best"), [(0, (0, 1, 8, 9)), (1, (0, 1, 4, 8)), (2, (0, 1, 4, 8))]
)
def test_it_finds_the_layers_that_are_worth_it(seed, best):
    """Three borders are worth 1.2 at most, and 1.15 where none gains by moving one layer."""
    worth = np.array([0, 0.5, 0, 0.1, 0.25, 0.1, 0, 0.2, 0.4, 0.3, 0.1, 0])
    start = pattern("sandwich", 12, 4)
    policy = ready(Bandit(seed=seed), Rules((0,) * 12, 4), start, num_decisions=80)
    states = play(policy, worth, start, seed)
    assert states[-1].independent_layers == best
    assert len({state.owners for state in states[-4:]}) == 1  # it is kept


@pytest.mark.parametrize("seed", range(3))
def test_a_price_decides_how_many_there_are(seed):
    worth = np.zeros(12)
    worth[[1, 5, 9]] = 0.5, 0.2, 0.2
    sizes = []
    for price in (0.1, 0.35, 0.8):
        start = pattern("sandwich", 12)
        policy = ready(Bandit(price=price, seed=seed), 12, start, num_decisions=110)
        states = play(policy, worth, start, seed)
        sizes.append(states[-1].independent_layers)
    assert sizes == [(0, 1, 5, 9), (0, 1), (0,)]


@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=50)
def test_it_keeps_within_the_budget_and_moves_one_border_at_a_time(num_layers, budget, seed):
    rng = np.random.default_rng(seed)
    budget = min(budget, num_layers)
    rules = Rules((0,) * num_layers, budget)
    price = rng.choice([None, 0.0])
    state = pattern("sandwich", num_layers, budget)
    policy = ready(Bandit(price=price, seed=seed), rules, state, num_decisions=12)
    for decision in range(1, 16):
        after = Tying.from_action(policy.act(state))
        rules.check(after)
        one, other = set(state.independent_layers), set(after.independent_layers)
        if decision != 12:  # the last one goes to what is best
            assert len(one - other) <= 1
            assert len(other - one) <= 1
        assert price == 0.0 or len(one) == len(other)
        assert all(owner in (i, after.owners[i - 1]) for i, owner in enumerate(after.owners))
        policy.observe(state, after.owners, float(rng.normal()), after)
        state = after


def test_layers_of_two_kinds_are_never_tied():
    rules = Rules((0, 1, 0, 1, 0, 1), 6)
    policy = ready(Bandit(price=0.0), rules, rules.tightest, num_decisions=30)
    state = rules.tightest
    for t in range(30):
        state = Tying.from_action(policy.act(state))
        rules.check(state)
        policy.observe(state, state.owners, -float(t), state)


@pytest.mark.parametrize("budget", range(3, 7))
def test_it_starts_within_a_budget_where_layers_are_of_two_kinds(budget):
    rules = Rules((0, 1, 0, 1, 0, 1), budget)
    policy = Bandit()
    start = policy.start(rules)
    rules.check(start)
    policy.reset(start, rules, num_decisions=8)  # refuses a start without a border to move


def test_no_reward_teaches_nothing():
    policy = ready(Bandit(), 4, num_decisions=9)
    state = Tying.all_tied(4)
    before = policy.worth()
    for reward in (None, float("nan"), float("inf"), 1e300):
        policy.observe(state, state.owners, reward, state)
    assert (policy.worth() == before).all()


def test_it_goes_on_from_its_saved_state():
    def trace(policy: Bandit, state: Tying, start: int) -> list[Tying]:
        states = []
        for t in range(start, 12):
            state = Tying.from_action(policy.act(state))
            policy.observe(state, state.owners, -5.0 + 0.1 * (t % 3), state)
            states.append(state)
        return states

    one = ready(Bandit(price=0.0, seed=3), 8, Tying.all_tied(8), num_decisions=10)
    whole = trace(one, Tying.all_tied(8), 0)
    two = ready(Bandit(price=0.0, seed=3), 8, Tying.all_tied(8), num_decisions=10)
    state = Tying.all_tied(8)
    for t in range(5):
        state = Tying.from_action(two.act(state))
        two.observe(state, state.owners, -5.0 + 0.1 * (t % 3), state)
    three = ready(Bandit(price=0.0, seed=99), 8, Tying.all_tied(8), num_decisions=10)
    three.load_state_dict(json.loads(json.dumps(two.state_dict())))
    assert trace(three, state, 5) == whole[5:]


def test_a_run_learns_from_its_losses_settles_and_goes_on_exactly(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    configs = []
    for folder in (whole, stopped):
        folder.mkdir()
        write_text(folder)
        options = {
            "policy": "bandit",
            "budget_layers": 3,
            "nlayers": 6,
            "settle": 0.4,
            "every": 2,
            "seed": 1,
        }
        options |= {"eval_every": 24, "save_every": 8, "log_every": 1}
        configs.append(small(folder, **options))
    train(configs[0])
    crashed_at(configs[1], 11)
    train(configs[1], resume=True)
    assert traces_of(configs[0].folder) == traces_of(configs[1].folder)
    lines = lines_of(configs[0].folder / "tying.jsonl")
    assert lines[0]["state"] == [0, 1, 1, 1, 1, 5]
    assert [line["step"] for line in lines] == [0, *range(1, 16, 2)]  # of 24: the last 40 % without
    assert len({tuple(line["state"]) for line in lines}) > 1
    assert all(len(set(line["state"])) <= 3 for line in lines)
    rewards = [line.get("previous_reward") for line in lines[1:]]
    losses = [line["loss"] for line in lines_of(configs[0].folder / "metrics.jsonl")]
    assert rewards[0] is None  # no decision was made before
    assert rewards[1:] == pytest.approx(
        [-(losses[i] + losses[i + 1]) / 2 for i in range(1, 14, 2)], rel=1e-4
    )


def test_a_loss_that_is_not_finite_is_an_event(tmp_path, monkeypatch):
    write_text(tmp_path)
    run = Trainer.train_step
    nan = torch.tensor(float("nan"))

    def diverge(self):
        self.last_loss = run(self) if self.step < 8 else run(self) * nan
        return self.last_loss

    monkeypatch.setattr(Trainer, "train_step", diverge)
    config = small(tmp_path, policy="bandit", nlayers=6, settle=0.4, every=2)
    train(config)
    lines = lines_of(config.folder / "tying.jsonl")
    events = {line["step"]: line["event"] for line in lines if "event" in line}
    assert events == dict.fromkeys((9, 11, 13, 15), "the reward was nan: nothing learned")


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(InputError, match="layer_price goes with policy bandit, not with dqn"):
        small(tmp_path, layer_price=0.1)
    with pytest.raises(InputError, match=r"settle is between 0 and 1, got 1\.5"):
        small(tmp_path, settle=1.5)
    assert small(tmp_path, policy="bandit").replace(settle=0.25).tying.settle == 0.25


@pytest.mark.parametrize(
    ("start", "price", "said"),
    [
        (Tying.all_tied(4), None, "there is none in 0 0 0 0: start from"),
        (Tying.from_labels("abab"), None, "neighbouring layers: .* from 0 1 0 1;"),
        (Tying.from_labels("abab"), 0.1, "neighbouring"),
    ],
)
def test_a_start_that_it_can_do_nothing_with_is_refused(start, price, said):
    model = gpt2(4)
    with pytest.raises(InputError, match=said):
        DynamicTying(model, None, Bandit(price=price), 10, every=1, initial=start)
    assert len({id(p) for p in model.parameters()}) == len(list(gpt2(4).parameters()))


@pytest.mark.parametrize(
    ("start", "price", "most"), [("aaaa", 0.1, 4), ("aaaa", None, 1), ("abcd", None, 4)]
)
def test_a_start_with_a_price_or_with_all_that_the_budget_allows_will_do(start, price, most):
    initial = Tying.from_labels(start)
    policy = Bandit(price=price)
    tying = DynamicTying(gpt2(4), None, policy, 10, every=1, initial=initial, max_independent=most)
    assert tying.tying == initial


def test_it_asks_for_the_length_of_the_run():
    with pytest.raises(InputError, match=r"DynamicTying\(\.\.\., total_steps=\.\.\.\)"):
        DynamicTying(gpt2(4), None, "bandit")


@pytest.mark.parametrize(
    ("rules", "owners"),
    [
        (Rules.free(12), (0, *[1] * 10, 11)),
        (Rules.free(24), pattern("sandwich", 24, 6).owners),
        (Rules((0,) * 12, 2), (0, *[1] * 11)),
        (Rules((0, 1) * 3, 6), (0, 1, 2, 1, 2, 5)),
        (Rules((0, 1) * 3, 2), (0, 1) * 3),
    ],
)
def test_its_start_is_a_quarter_of_the_layers_or_what_the_rules_allow(rules, owners):
    assert Bandit().start(rules).owners == owners
