"""Hard limits on a model's size: never exceeded, and no smaller than they have to be."""

import random

import pytest
import torch
from small_runs import lines_of, small, write_text
from tiny_models import Plain, gpt2, gpt_neo, loss_of, t5

from layer_tying import DQN, DynamicTying, InputError, RandomPolicy, TiedLayers, Tying
from layer_tying.cli import main
from layer_tying.core.budget import max_independent
from layer_tying.core.find import find_layers
from layer_tying.core.patterns import pattern
from layer_tying.runs.train import train
from layer_tying.saving.export import COMPACT, export_compact

SLACK = 30  # bytes a tensor that the bound on the file may be above the real one
T5 = {"layers": ["encoder.block", "decoder.block"], "untied": ["*relative_attention_bias*"]}
MODELS = {
    "gpt2": (gpt2, {}),
    "plain": (lambda: Plain(width=16), {}),
    "gpt2 but norms": (gpt2, {"untied": ["ln_*"]}),
    "two kinds": (gpt_neo, {"by_kind": True}),
    "two kinds of unequal size": (t5, {**T5, "by_kind": True}),
}


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def compact_bytes(model: torch.nn.Module, folder, dtype: torch.dtype | None = None) -> int:
    export_compact(model, folder, dtype)
    return (folder / COMPACT).stat().st_size


def tyings_of(rng: random.Random, kinds: tuple[int, ...]) -> Tying:
    """Layers are tied to layers of their kind only."""
    action = []
    for layer, kind in enumerate(kinds):
        action.append(rng.choice([j for j in range(layer + 1) if kinds[j] == kind]))
    return Tying.from_action(action)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", MODELS)
def test_no_tying_within_the_number_is_over_the_limit(name, dtype, tmp_path):
    """Real counts and real files, against the numbers of layers that limits allow."""
    torch.manual_seed(0)
    make, options = MODELS[name]
    rng = random.Random(0)
    model = make()
    layers = TiedLayers(model, **options)
    stack = find_layers(make(), **options)
    largest: dict[int, tuple[int, int]] = {}
    for _ in range(40):
        layers.apply(tyings_of(rng, stack.kinds))
        size = (num_parameters(model), compact_bytes(model, tmp_path, dtype))
        number = layers.tying.num_independent
        largest[number] = tuple(map(max, size, largest.get(number, (0, 0))))
    assert len(largest) >= 3
    for number, (parameters, size) in largest.items():
        if number > len(set(stack.kinds)):
            assert max_independent(stack, num_parameters=parameters - 1) < number
            assert max_independent(stack, num_bytes=size - 1, dtype=dtype) < number
        if name != "two kinds of unequal size":  # there the worst tying counts
            assert max_independent(stack, num_parameters=parameters) == number
            slack = SLACK * len(model.state_dict())
            assert max_independent(stack, num_bytes=size + slack, dtype=dtype) == number


@pytest.mark.parametrize("number", [2, 3])
def test_the_coefficients_of_mixtures_count(number, tmp_path):
    layers = TiedLayers(gpt2())
    stack = find_layers(gpt2())
    layers.apply(pattern("cycle", len(stack.names), number))
    layers.mix()
    model = layers.stack.model
    parameters, size = num_parameters(model), compact_bytes(model, tmp_path)
    slack = SLACK * len(model.state_dict())
    assert max_independent(stack, num_parameters=parameters, mixes=True) == number
    assert max_independent(stack, num_bytes=size + slack, mixes=True) == number
    for limit in ({"num_parameters": parameters - 1}, {"num_bytes": size - 1}):
        if number > 2:
            assert max_independent(stack, **limit, mixes=True) == number - 1
            continue
        with pytest.raises(InputError, match=r"with two layers to mix \(.* needs [\d,]+$"):
            max_independent(stack, **limit, mixes=True)


def test_the_least_of_several_limits_counts():
    stack = find_layers(gpt2())
    assert max_independent(stack) == 6
    assert max_independent(stack, num_layers=4) == 4
    assert max_independent(stack, num_layers=9) == 6
    allowed = max_independent(stack, num_parameters=num_parameters(gpt2()) - 1)
    assert allowed == 5
    assert max_independent(stack, num_layers=3, num_parameters=10**9, num_bytes=10**9) == 3


@pytest.mark.parametrize("unit", ["num_parameters", "num_bytes"])
@pytest.mark.parametrize(("make", "options"), [(gpt2, {}), (gpt_neo, {"by_kind": True})])
def test_too_small_a_limit_says_the_least_that_is_possible(make, options, unit):
    stack = find_layers(make(), **options)
    with pytest.raises(InputError, match=r"too small.*the least that is possible") as caught:
        max_independent(stack, **{unit: 10})
    assert "\n" not in str(caught.value)
    least = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    assert max_independent(stack, **{unit: least}) == len(set(stack.kinds))
    with pytest.raises(InputError):
        max_independent(stack, **{unit: least - 1})


def test_fewer_layers_than_kinds_cannot_be():
    with pytest.raises(InputError, match="2 kinds of layer"):
        max_independent(find_layers(gpt_neo(), by_kind=True), num_layers=1)


class Greedy(DQN):
    """An agent that finds every layer of its own worth the most."""

    def act(self, state):
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.zero_()
            rows, columns = torch.tril_indices(6, 6)
            self.network.body[-1].bias.copy_((rows == columns).float())
        self.epsilon = 0.0
        return super().act(state)


@pytest.mark.parametrize("make_policy", [Greedy, DQN, RandomPolicy])
@pytest.mark.parametrize("most", [1, 3])
def test_the_file_is_within_the_bytes_at_every_decision(make_policy, most, tmp_path):
    torch.manual_seed(0)
    model = gpt2()
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stack = find_layers(model)
    trial = gpt2()
    TiedLayers(trial).apply(Tying.from_labels([min(i, most - 1) for i in range(6)]))
    limit = compact_bytes(trial, tmp_path, torch.bfloat16) + SLACK * len(model.state_dict())
    number = max_independent(stack, num_bytes=limit, dtype=torch.bfloat16)
    assert number == most
    tying = DynamicTying(model, optimizer, every=1, policy=make_policy(), max_independent=number)
    seen = set()
    for step in range(25):
        if step % 5 == 0:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        tying.step(reward=rng.random)
        seen.add(tying.tying.num_independent)
        assert compact_bytes(model, tmp_path, torch.bfloat16) <= limit
    assert max(seen) == most, "and it is used"


def test_a_policy_that_does_not_obey_is_stopped():
    class Disobedient(RandomPolicy):
        def act(self, state):
            return tuple(range(state.num_layers))

    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    tying = DynamicTying(model, optimizer, policy=Disobedient(), max_independent=2)
    with pytest.raises(InputError, match="6 independent layers are over the budget of 2"):
        tying.step(reward=lambda: 0.0)
    assert tying.tying == Tying.all_tied(6)
    with pytest.raises(InputError, match="over the budget of 2"):
        DynamicTying(gpt2(), None, "dqn", max_independent=2, initial="none")


# A whole run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("budget")
    write_text(made)
    return made


@pytest.mark.parametrize(
    ("policy", "budget"), [("random", 31_000), ("dqn", 31_000), ("mixture", 36_000)]
)
def test_a_run_never_exceeds_its_budget(policy, budget, folder, tmp_path, capsys):
    free = small(folder, nlayers=6, policy=policy, log_every=1, every=2, eval_every=24)
    # two layers of the six in fp16: 16-wide layers have 3,280 parameters, the rest about 5,000, and
    # a mixture has 48 coefficients, each with a name of its own
    config = free.replace(budget_bytes=budget, export_dtype="fp16", exp=policy)
    train(config)
    lines = lines_of(config.folder / "metrics.jsonl")
    assert len(lines) == 24
    most = max(line["independent_layers"] for line in lines)
    assert 1 < most < 6, "the limit is in reach, and below what is free"
    exported = tmp_path / "export"
    flags = ["--format", "compact", "--output", str(exported)]
    assert main(["export", str(config.folder), *flags]) == 0
    size = (exported / COMPACT).stat().st_size
    assert size <= budget - 1_000, "in the type that the run was trained for"
    assert f"{size:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget_layers": 2, "policy": "none"}, "over the budget of 2"),
        ({"budget_layers": 2, "policy": "sandwich"}, "3 independent layers are over the budget"),
        ({"budget_layers": 2, "policy": "fixed", "owners": "0,1,2"}, "over the budget of 2"),
        ({"budget_layers": 2, "initial": "none"}, "over the budget of 2"),
        ({"budget_layers": 2, "policy": "all", "activate_at": 0.5}, "over the budget of 2"),
        ({"budget_parameters": 100}, "budget of 100 parameters is too small.*needs 7,728"),
        ({"budget_bytes": 100}, "budget of 100 bytes is too small"),
    ],
)
def test_what_cannot_keep_within_the_budget_is_refused_before_it_trains(changes, says, folder):
    config = small(folder, exp="refused", **changes)
    with pytest.raises(InputError, match=says) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not config.folder.exists()


def test_a_pattern_within_the_budget_is_fine(folder):
    config = small(folder, exp="fine", policy="all", budget_layers=1, max_steps=6)
    assert train(config)["independent_layers_end"] == 1


def test_a_recorded_run_over_the_budget_is_refused(folder):
    source = small(folder, exp="source", policy="random", seed=1)
    train(source)
    replay = {"policy": "recorded", "source": str(source.folder), "exp": "replay"}
    with pytest.raises(InputError, match="over the budget of 1"):
        train(small(folder, **replay, budget_layers=1))
    states = [line["state"] for line in lines_of(source.folder / "tying.jsonl")]
    assert max(Tying(tuple(state)).num_independent for state in states) > 1


def test_a_run_starts_from_a_pattern_within_its_budget(folder):
    start = {"policy": "random", "initial": "cycle", "groups": 2, "budget_layers": 2}
    config = small(folder, exp="pattern", nlayers=4, max_steps=6, **start)
    train(config)
    states = [line["state"] for line in lines_of(config.folder / "tying.jsonl")]
    assert states[0] == [0, 1, 0, 1]
    assert all(Tying(tuple(state)).num_independent <= 2 for state in states)
