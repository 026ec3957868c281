"""The two-line interface: when it decides, what it records, and that it goes on exactly."""

import copy
import dataclasses
import io
import random

import pytest
import torch
from tiny_models import FromLosses, Plain, gpt2, gpt_neo, loss_of
from torch import nn

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Rules, Tying
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.policies.dqn import DQN
from layer_tying.policies.simple import RandomPolicy

pytestmark = pytest.mark.numerics


class Script(RandomPolicy):
    """A policy that plays the actions it was given, and notes what it is told."""

    def __init__(self, *actions: tuple[int, ...], reward: str | None = "evaluation") -> None:
        super().__init__()
        self.actions = list(actions)
        self.reward = reward
        self.told: list[tuple] = []

    def act(self, state):
        return self.actions.pop(0)

    def observe(self, state, action, reward, next_state):
        self.told.append((state, action, reward, next_state))

    def statistics(self):
        return {"told": len(self.told)}


def never() -> float:
    raise AssertionError("a reward was measured")


def make(model: nn.Module | None = None, **options) -> DynamicTying:
    model = model or Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return DynamicTying(model, optimizer, **({"policy": "dqn"} | options))


def test_it_decides_at_steps_0_k_and_2k():
    tying = make(every=3)
    due, decided = [], []
    for _ in range(8):
        due.append(tying.decision_is_due)
        decided.append(tying.step(reward=lambda: -1.0))
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

    def reward() -> torch.Tensor:
        seen.append(tying.tying)
        tying.layers.verify()
        return torch.tensor(-2.5)

    decision = tying.step(reward=reward)
    after = Tying((0, 0, 0, 3, 3, 5))
    assert decision == Decision(1, action, after.owners, -2.5, None, None, {"told": 1})
    assert seen == [after] and tying.tying == after
    assert policy.told == [(Tying.all_tied(6), action, -2.5, after)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.reward = 0.0


def test_no_reward_is_measured_for_a_policy_that_does_not_learn():
    policy = Script((0, 1, 0, 1, 0, 1), reward=None)
    decision = make(policy=policy).step(reward=never)
    assert (decision.reward, decision.event) == (None, None)
    assert policy.told[0][2] is None
    assert make(policy=RandomPolicy(), every=1).step(reward=never).statistics == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e300])
def test_a_reward_that_is_not_finite_is_an_event_and_nothing_is_learned(value):
    policy = Script((0,) * 6)
    decision = make(policy=policy).step(reward=lambda: value)
    assert decision.reward is None
    assert decision.event == f"the reward was {value}: nothing learned"
    assert policy.told[0][2] is None
    agent = make(seed=1)
    agent.step(reward=lambda: value)
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
        ({"initial": "some"}, "unknown pattern 'some'"),
        ({"initial": Tying.all_tied(5)}, "5 layers does not fit a model of 6"),
        (
            {"initial": "none", "max_independent": 3},
            "6 independent layers are over the budget of 3",
        ),
        ({"max_independent": 0}, "budget of 0 .* too small"),
        ({"layers": "nowhere"}, "no module 'nowhere'"),
        ({"gradient": "mean"}, "gradient is"),
        (
            {"policy": "best"},
            "unknown policy 'best'; the known ones are dqn, mixture, random",
        ),
    ],
)
def test_bad_input_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message) as error:
        make(**options).step(reward=lambda: 0.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["dqn", "random"])
def test_the_budget_is_never_exceeded(policy):
    rng = random.Random(0)
    model = Plain()
    tying = make(model, every=1, max_independent=2, policy=policy)
    for _ in range(200):
        decision = tying.step(reward=lambda: -rng.random())
        assert len(set(decision.state)) <= 2
        parameters = {id(p) for block in model.blocks for p in block.parameters()}
        assert len(parameters) == len(set(decision.state)) * len(list(model.blocks[0].parameters()))


@pytest.mark.parametrize("gradient", ["sum", "owner"])
def test_it_trains_torchs_own_transformer_encoder(gradient):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, "dqn", every=2, gradient=gradient)
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
        tying.step(reward=reward)
        tying.layers.verify()
    assert losses[-1] < 0.8 * losses[0]


class Run:
    """A training run that can be saved and gone on with: model, optimizer, tying."""

    def __init__(self, make_model, make_policy, seed: int, **options) -> None:
        torch.manual_seed(seed)
        self.model = make_model()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        policy = make_policy(seed=seed)
        self.tying = DynamicTying(self.model, self.optimizer, policy, 16, every=2, **options)

    def train(self, first: int, last: int) -> list:
        history = []
        for step in range(first, last):
            loss = loss_of(self.model, step)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            value = loss.item()
            history.append((value, self.tying.step(loss, lambda value=value: -value)))
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


CASES = [
    (DQN, {"gradient": "sum"}),
    (DQN, {"gradient": "owner"}),
    (FromLosses, {}),
]


@pytest.mark.parametrize(("policy", "options"), CASES)
@pytest.mark.parametrize("make_model", [Plain, gpt2])
def test_a_run_that_was_saved_goes_on_exactly(make_model, policy, options):
    left_alone = Run(make_model, policy, seed=0, **options)
    left_alone.train(0, 9)
    file = left_alone.save()
    expected = left_alone.train(9, 20)
    resumed = Run(make_model, policy, seed=1, **options)
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


def test_prepared_layers_keep_their_tying():
    model = gpt2(4)
    layers = tie(model, "sequence", 2)
    tying = DynamicTying.over(layers, DQN())
    assert tying.layers is layers
    assert tying.tying == Tying((0, 0, 2, 2))


def test_a_policy_cannot_break_the_rules():
    tying = make(policy=Script((0, 1, 2, 3, 4, 5)), max_independent=3)
    with pytest.raises(InputError, match="over the budget of 3"):
        tying.step(reward=never)
    assert tying.tying == Tying.all_tied(6)
    assert tying.rules == Rules((0,) * 6, 3)


# What a policy brings by its name


def test_a_policy_that_learns_from_training_losses_gets_their_means_and_settles():
    torch.manual_seed(0)
    model = gpt2(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, FromLosses(), total_steps=40, every=2)
    decisions, losses = [], []
    for step in range(40):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if decision := tying.step(loss):
            decisions.append(decision)
        tying.layers.verify()
    assert [d.step for d in decisions] == list(range(1, 21, 2)), "half of the run is settled"
    expected = [-(losses[i] + losses[i + 1]) / 2 for i in range(1, 18, 2)]
    assert [d.previous_reward for d in decisions[1:]] == pytest.approx(expected)


def test_a_model_whose_residual_outputs_are_unknown_names_them():
    model = Plain()
    with pytest.raises(InputError, match=r"residual_outputs names the modules .* out of norm, att"):
        DynamicTying(model, None)
    assert len({id(p) for p in model.blocks.parameters()}) == 6 * len(
        list(model.blocks[0].parameters())
    )
    outputs = ["attention", "feed_forward.1"]
    tying = DynamicTying(model, None, residual_outputs=outputs)
    assert tying.tying == Tying((0, 1, 0, 1, 0, 1))


def test_a_policy_that_learns_from_losses_asks_for_them():
    tying = DynamicTying(gpt2(), None, FromLosses(), total_steps=100)
    says = r"FromLosses learns from the training losses: call step\(loss\)"
    with pytest.raises(InputError, match=says):
        tying.step()


def test_a_reward_that_never_comes_is_said():
    tying = make(every=2)
    tying.step()
    tying.step()
    with pytest.warns(UserWarning, match="none came for its last decision"):
        tying.step()
    assert tying.learn(-1.0) == (-1.0, None)
    assert tying.learn(-1.0) == (None, None), "it is learned from once"


def test_a_mixture_learns_by_gradient_and_never_decides():
    torch.manual_seed(0)
    model = gpt2(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tying = DynamicTying(model, optimizer, "mixture")
    assert tying.tying == Tying((0, 1) * 4)
    assert tying.layers.settings.residual_scaling == 1.0
    for step in range(3):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert tying.step(loss) is None
        tying.layers.verify()
    moved = [vector for vector in tying.layers.mixtures if set(vector.tolist()) != {0.0, 1.0}]
    assert len(moved) == 8 * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_independent": 1}, "two independent layers or more.* another policy"),
        ({"initial": "all"}, "two independent layers or more"),
        ({"scheduled": True}, "make the scheduler afterwards"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_anything_changes(options, says):
    model = gpt2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    if options.pop("scheduled", False):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(InputError, match=says):
        DynamicTying(model, optimizer, **options)
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert len(optimizer.param_groups) == 1


# Options


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("mixture", {"every": 0}),
        ("mixture", {"gradient": "owner"}),
        ("mixture", {"initial": "all"}),
        ("dqn", {"max_independent": 0, "gradient": "owner"}),
        ("dqn", {"residual_scaling": 1.0, "residual_outputs": ["drop*"], "initial": "twist"}),
    ],
)
def test_what_is_refused_leaves_no_option_behind(policy, options):
    """The model is then read, and tied later, as if nothing had been tried."""
    model, untouched = gpt2(), gpt2()
    untouched.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(InputError):
        DynamicTying(model, optimizer, policy, **options)
    layers = tie(model, "cycle", 3, optimizer=optimizer)
    assert (layers.settings.residual_scaling, layers.settings.gradient) == (0.0, "sum")
    tie(untouched, "cycle", 3)
    assert loss_of(model) == loss_of(untouched)


def test_residual_scaling_knows_where_gpt2_writes():
    tying = make(gpt2(), residual_scaling=1.0)
    assert tying.layers.settings.residual_outputs == ("attn.c_proj", "mlp.c_proj")
    other = make(Plain(), residual_scaling=1.0, residual_outputs=["attention"])
    assert other.layers.settings.residual_outputs == ("attention",)
    with pytest.raises(InputError, match="residual_outputs names the modules"):
        make(Plain(), residual_scaling=1.0)


def test_a_state_of_more_layers_than_are_allowed_is_refused():
    saved = make(policy=RandomPolicy(), initial="none").state_dict()
    tying = make(policy=RandomPolicy(), max_independent=2)
    with pytest.raises(InputError, match="over the budget of 2"):
        tying.load_state_dict(saved)
    assert tying.tying == Tying.all_tied(6)


def test_losses_of_low_precision_are_averaged_in_float32():
    losses = [3.0, 3.015625, 3.03125, 3.046875]  # bf16 has these, and not their mean
    script = Script((0,) * 6, (0,) * 6, reward="training_loss")
    tying = make(policy=script, every=4)
    tying.step(torch.tensor(3.0))
    for loss in losses:
        tying.step(torch.tensor(loss, dtype=torch.bfloat16))
    assert script.told[-1][2] == -sum(losses) / 4
