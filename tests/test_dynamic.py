"""The two-line interface: when it decides, what it records, and that it goes on exactly."""

import copy
import dataclasses
import io
import random

import pytest
import torch
from tiny_models import Plain, gpt2, gpt_neo, loss_of
from torch import nn

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Rules, Tying
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.policies.dqn import DQN
from layer_tying.policies.simple import RandomPolicy

pytestmark = pytest.mark.numerics


class Script(RandomPolicy):
    """A policy that plays the actions it was given, and notes what it is told."""

    def __init__(self, *actions: tuple[int, ...], learns: bool = True) -> None:
        super().__init__()
        self.actions = list(actions)
        self.learns = learns
        self.told: list[tuple] = []

    def act(self, state, rules):
        return self.actions.pop(0)

    def observe(self, state, action, reward, next_state):
        self.told.append((state, action, reward, next_state))

    def statistics(self):
        return {"told": len(self.told)}


def never() -> float:
    raise AssertionError("a reward was measured")


def make(model: nn.Module | None = None, **options) -> DynamicTying:
    model = model or Plain()
    return DynamicTying(model, torch.optim.SGD(model.parameters(), lr=0.01), **options)


def test_it_decides_at_steps_0_k_and_2k():
    tying = make(every=3)
    due, decided = [], []
    for _ in range(8):
        due.append(tying.decision_is_due)
        decided.append(tying.step(lambda: -1.0))
    assert due == [decision is not None for decision in decided]
    assert [i for i, decision in enumerate(decided) if decision] == [0, 3, 6]
    assert [d.step for d in decided if d] == [1, 4, 7]  # optimizer steps that had been done
    assert tying.num_steps == 8


def test_a_decision_says_what_was_done():
    """The reward is measured on the new tying, and the policy hears of both states."""
    action = (0, 0, 1, 3, 3, 5)
    policy = Script(action)
    tying = make(policy=policy)
    seen = []

    def reward() -> float:
        seen.append(tying.tying)
        tying.layers.verify()
        return torch.tensor(-2.5)

    decision = tying.step(reward)
    after = Tying((0, 0, 0, 3, 3, 5))
    assert decision == Decision(1, action, after.owners, -2.5, None, {"told": 1})
    assert seen == [after] and tying.tying == after
    assert policy.told == [(Tying.all_tied(6), action, -2.5, after)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.reward = 0.0


def test_no_reward_is_measured_for_a_policy_that_does_not_learn():
    policy = Script((0, 1, 0, 1, 0, 1), learns=False)
    decision = make(policy=policy).step(never)
    assert (decision.reward, decision.event) == (None, None)
    assert policy.told[0][2] is None
    assert make(policy=RandomPolicy(), every=1).step(never).statistics == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e300])
def test_a_reward_that_is_not_finite_is_an_event_and_nothing_is_learned(value):
    policy = Script((0,) * 6)
    decision = make(policy=policy).step(lambda: value)
    assert decision.reward is None
    assert decision.event == f"the reward was {value}: nothing learned"
    assert policy.told[0][2] is None
    agent = make(seed=1)
    agent.step(lambda: value)
    assert agent.policy.epsilon == 0.95
    assert all(torch.isfinite(p).all() for p in agent.policy.network.parameters())


@pytest.mark.parametrize(
    ("initial", "owners"),
    [
        ("all", (0, 0, 0, 0, 0, 0)),
        ("none", (0, 1, 2, 3, 4, 5)),
        ("keep", (0, 0, 2, 3, 3, 3)),
        (Tying((0, 1, 1, 0, 0, 5)), (0, 1, 1, 0, 0, 5)),
    ],
)
def test_the_tying_to_start_from(initial, owners):
    model = Plain()
    TiedLayers(model).apply(Tying((0, 0, 2, 3, 3, 3)))
    tying = make(model, initial=initial)
    assert tying.tying == Tying(owners)
    tying.layers.verify()


def test_all_means_one_layer_of_each_kind():
    assert make(gpt_neo(), by_kind=True).tying == Tying((0, 1, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every .* got 0"),
        ({"initial": "some"}, "initial is .* got 'some'"),
        ({"initial": Tying.all_tied(5)}, "5 layers does not fit a model of 6"),
        (
            {"initial": "none", "max_independent": 3},
            "6 independent layers are over the budget of 3",
        ),
        ({"max_independent": 0}, "budget of 0 .* too small"),
        ({"layers": "nowhere"}, "no module 'nowhere'"),
        ({"gradient": "mean"}, "gradient is"),
        ({"policy": DQN(4)}, "4 layers.* 6"),
    ],
)
def test_bad_input_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message) as error:
        make(**options).step(lambda: 0.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", [DQN, lambda num_layers: RandomPolicy()], ids=["dqn", "random"])
def test_the_budget_is_never_exceeded(policy):
    rng = random.Random(0)
    model = Plain()
    tying = make(model, every=1, max_independent=2, policy=policy(6))
    for _ in range(200):
        decision = tying.step(lambda: -rng.random())
        assert len(set(decision.state)) <= 2
        parameters = {id(p) for block in model.blocks for p in block.parameters()}
        assert len(parameters) == len(set(decision.state)) * len(list(model.blocks[0].parameters()))


@pytest.mark.parametrize("gradient", ["sum", "owner"])
def test_it_trains_torchs_own_transformer_encoder(gradient):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, every=2, gradient=gradient)
    x = torch.randn(4, 5, 8)
    losses = []

    def loss() -> torch.Tensor:
        return (model(x) - x.roll(1, dims=1)).square().mean()

    def reward() -> float:
        model.eval()
        with torch.no_grad():
            value = -float(loss())
        model.train()
        return value

    for _ in range(40):
        current = loss()
        current.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(current.item())
        tying.step(reward)
        tying.layers.verify()
    assert losses[-1] < 0.8 * losses[0]


class Run:
    """A training run that can be saved and gone on with: model, optimizer, tying."""

    def __init__(self, make_model, gradient: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = make_model()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.tying = DynamicTying(self.model, self.optimizer, every=2, seed=seed, gradient=gradient)

    def train(self, first: int, last: int) -> list:
        history = []
        for step in range(first, last):
            loss = loss_of(self.model, step)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            value = loss.item()
            history.append((value, self.tying.step(lambda value=value: -value)))
        return history

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = (self.tying, self.model, self.optimizer)
        torch.save([part.state_dict() for part in state], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        tying, model, optimizer = torch.load(file, weights_only=True)
        self.tying.load_state_dict(tying)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.tying.layers.verify()


@pytest.mark.parametrize("gradient", ["sum", "owner"])
@pytest.mark.parametrize("make_model", [Plain, gpt2])
def test_a_run_that_was_saved_goes_on_exactly(make_model, gradient):
    left_alone = Run(make_model, gradient, seed=0)
    left_alone.train(0, 9)
    file = left_alone.save()
    expected = left_alone.train(9, 20)
    resumed = Run(make_model, gradient, seed=1)
    resumed.load(file)
    assert resumed.train(9, 20) == expected
    assert resumed.tying.tying == left_alone.tying.tying
    for p, q in zip(resumed.model.parameters(), left_alone.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    tying = make(policy=RandomPolicy())
    for saved, message in [
        (make(Plain(4), policy=RandomPolicy()).state_dict(), "4 layers does not fit a model of 6"),
        (make().state_dict(), "another policy"),
        ({**tying.state_dict(), "owners": [0, 2, 1, 0, 0, 0]}, "not canonical"),
    ]:
        before = copy.deepcopy(tying.state_dict())
        with pytest.raises(InputError, match=message):
            tying.load_state_dict(saved)
        assert tying.state_dict() == before


def test_layers_that_come_prepared_are_of_this_model_and_optimizer():
    model, other = gpt2(4), gpt2(4)
    optimizer = torch.optim.AdamW(model.parameters())
    prepared = TiedLayers(model, optimizer)
    assert DynamicTying(model, optimizer, layers=prepared).layers is prepared
    with pytest.raises(InputError, match="of another model"):
        DynamicTying(other, optimizer, layers=prepared)
    for given, layers in ((optimizer, TiedLayers(other)), (None, prepared)):
        with pytest.raises(InputError, match=r"prepared with [01] optimizer.* not the [01]"):
            DynamicTying(layers.stack.model, given, layers=layers)
    with pytest.raises(InputError, match=r"gradient='owner' comes too late: give it to TiedLayers"):
        DynamicTying(model, optimizer, layers=prepared, gradient="owner")


def test_a_policy_cannot_break_the_rules():
    tying = make(policy=Script((0, 1, 2, 3, 4, 5)), max_independent=3)
    with pytest.raises(InputError, match="over the budget of 3"):
        tying.step(never)
    assert tying.tying == Tying.all_tied(6)
    assert tying.rules == Rules((0,) * 6, 3)
