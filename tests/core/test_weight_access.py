"""The two gradient modes, against untied copies of equal weights."""

import copy
import pickle
import random

import pytest
import torch
import transformers
from tiny_models import Plain, gpt2, llama, loss_of, random_tying, tokens
from tolerance import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying

pytestmark = pytest.mark.numerics

TYINGS = [Tying((0, 0, 0, 0, 0, 0)), Tying((0, 1, 0, 1, 4, 1)), Tying.independent(6)]
MODELS = [Plain, gpt2, llama]


def blocks_of(model: nn.Module) -> nn.Module:
    if isinstance(model, Plain):
        return model.blocks
    is_gpt2 = isinstance(model, transformers.GPT2LMHeadModel)
    return model.get_submodule("transformer.h" if is_gpt2 else "model.layers")


def tied_and_untied(make, tying: Tying, gradient: str, seed: int = 0):
    """A tied model, and one of the same weights in which each position has its own."""
    torch.manual_seed(seed)
    tied, untied = make().double(), make().double()
    TiedLayers(tied, gradient=gradient).apply(tying)
    untied.load_state_dict(tied.state_dict())
    return tied, untied


def assert_gradients(tied: nn.Module, untied: nn.Module, tying: Tying, contributes) -> None:
    """Each owner's gradient is the sum of those of the layers that contribute to it."""
    of = [dict(block.named_parameters()) for block in blocks_of(untied)]
    for owner, layers in tying.groups.items():
        for name, parameter in blocks_of(tied)[owner].named_parameters():
            expected = sum(of[i][name].grad for i in layers if contributes(i, owner))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-13)
    in_blocks = {id(p) for model in (tied, untied) for p in blocks_of(model).parameters()}
    rest = [[p for p in m.parameters() if id(p) not in in_blocks] for m in (tied, untied)]
    for p, q in zip(*rest, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)


def every_position(layer: int, owner: int) -> bool:
    return True


def the_owners_only(layer: int, owner: int) -> bool:
    return layer == owner


CONTRIBUTES = {"sum": every_position, "owner": the_owners_only}


@pytest.mark.parametrize("gradient", CONTRIBUTES)
@pytest.mark.parametrize("tying", TYINGS, ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_those_of_an_untied_copy(make, tying, gradient):
    tied, untied = tied_and_untied(make, tying, gradient)
    losses = loss_of(tied), loss_of(untied)
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[gradient])


@pytest.mark.parametrize("gradient", CONTRIBUTES)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_changes_nothing(make, gradient):
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(make, tying, gradient)
    tied.gradient_checkpointing_enable({"use_reentrant": False})
    tied.train()
    loss_of(tied).backward()
    loss_of(untied).backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[gradient])


@pytest.mark.parametrize("gradient", CONTRIBUTES)
@pytest.mark.parametrize("what", ["the block", "its forward"])
def test_torchs_own_checkpointing_changes_nothing(what, gradient):
    """Blocks with a bare parameter and a list of modules that is never called."""
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(Plain, tying, gradient)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    y = tied.embed(x)
    for block in tied.blocks:
        y = checkpoint(block if what == "the block" else block.forward, y, use_reentrant=False)
    tied.head(y).square().mean().backward()
    untied(x).square().mean().backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[gradient])


class Scattered(nn.Module):
    """A block that keeps weights in containers and calls parts of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
        self.gates = nn.ParameterDict({"a": torch.randn(4)})
        self.part = nn.Module()
        self.part.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.weights
        return x + torch.tanh(self.part.inner(x) @ first) @ second * self.gates["a"]


class ScatteredModel(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 4), nn.Linear(4, 5)
        self.blocks = nn.ModuleList(Scattered() for _ in range(6))


@pytest.mark.parametrize("gradient", CONTRIBUTES)
def test_weights_are_found_wherever_a_block_keeps_them(gradient):
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(ScatteredModel, tying, gradient)
    for model in (tied, untied):
        loss_of(model).backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[gradient])


def test_owner_mode_follows_the_tying_through_transitions():
    rng = random.Random(0)
    torch.manual_seed(0)
    tied, untied = gpt2().double(), gpt2().double()
    optimizer = torch.optim.AdamW(tied.parameters(), lr=1e-3)
    layers = TiedLayers(tied, optimizer, gradient="owner")
    for step in range(12):
        tying = random_tying(rng, 6)
        layers.apply(tying)
        layers.verify()
        untied.load_state_dict(tied.state_dict())
        untied.zero_grad()
        loss_of(tied, step).backward()
        loss_of(untied, step).backward()
        assert_gradients(tied, untied, tying, the_owners_only)
        optimizer.step()
        optimizer.zero_grad()
        layers.verify()


@pytest.mark.parametrize("make", MODELS)
def test_owner_mode_computes_no_weight_gradients_at_tied_positions(make):
    tying = Tying((0, 0, 0, 3, 3, 3))

    def backward_flops(gradient: str) -> int:
        tied, _ = tied_and_untied(make, tying, gradient)
        tied.float()
        loss = loss_of(tied)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    num_positions = 2 * 4 if make is Plain else tokens().numel()
    matrices = [p for p in blocks_of(make())[0].parameters() if p.ndim == 2]
    of_one_layer = 2 * num_positions * sum(p.numel() for p in matrices)
    assert backward_flops("sum") - backward_flops("owner") == 4 * of_one_layer


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("gradient", CONTRIBUTES)
def test_an_exception_inside_a_layer_leaves_nothing_behind(gradient, error):
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(gpt2, tying, gradient)
    layers = TiedLayers(tied, gradient=gradient)

    def hooks():
        return [[*m._forward_pre_hooks, *m._forward_hooks] for m in tied.modules()]

    def fail(*_):
        raise error

    before = hooks()
    handle = blocks_of(tied)[3].mlp.act.register_forward_hook(fail)
    with pytest.raises(error):
        loss_of(tied)
    handle.remove()
    layers.verify()
    assert all(isinstance(p, nn.Parameter) for p in tied.parameters())
    assert hooks() == before
    loss_of(tied).backward()
    loss_of(untied).backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[gradient])


@pytest.mark.parametrize("gradient", CONTRIBUTES)
def test_parameters_are_one_object_in_both_modes(gradient):
    tied, _ = tied_and_untied(Plain, TYINGS[0], gradient)
    names = [n for n, _ in tied.blocks[0].named_parameters()]
    assert [n for n, _ in tied.blocks[5].named_parameters()] == names
    for p, q in zip(tied.blocks[0].parameters(), tied.blocks[5].parameters(), strict=True):
        assert p is q
    assert sum(1 for _ in tied.parameters()) == 4 + len(names)


@pytest.mark.parametrize("first", CONTRIBUTES)
@pytest.mark.parametrize("second", CONTRIBUTES)
def test_a_second_tied_layers_on_the_same_model_takes_over(first, second):
    """Somebody runs a notebook's cell again, with another option."""
    tied, untied = tied_and_untied(Plain, Tying((0, 0, 0, 3, 3, 3)), first)
    tying = Tying((0, 1, 0, 1, 1, 5))
    TiedLayers(tied, gradient=second).apply(tying)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        loss_of(model).backward()
    assert_gradients(tied, untied, tying, CONTRIBUTES[second])


@pytest.mark.parametrize("gradient", CONTRIBUTES)
def test_a_deep_copy_is_a_model_of_its_own(gradient):
    """As for an exponential moving average of the weights."""
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(gpt2, tying, gradient)
    twin = copy.deepcopy(tied)
    loss_of(twin).backward()
    loss_of(untied).backward()
    assert all(p.grad is None for p in tied.parameters())
    assert_gradients(twin, untied, tying, CONTRIBUTES[gradient])


def test_a_saved_and_loaded_module_is_the_same_model(tmp_path):
    tying = Tying((0, 1, 0, 1, 4, 1))
    tied, untied = tied_and_untied(gpt2, tying, "owner")
    torch.save(tied, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loss_of(loaded).backward()
    loss_of(untied).backward()
    assert_gradients(loaded, untied, tying, CONTRIBUTES["owner"])


def test_blocks_are_still_what_they_were_called():
    tied, untied = tied_and_untied(Plain, TYINGS[0], "owner")
    assert repr(tied) == repr(untied)
    assert all(isinstance(b.norm, nn.LayerNorm) for b in tied.blocks)
    assert tied.state_dict().keys() == untied.state_dict().keys()


def test_untied_parameters_learn_at_every_position_in_owner_mode():
    torch.manual_seed(0)
    model = Plain()
    TiedLayers(model, untied=["norm.*"], gradient="owner").apply(Tying.all_tied(6))
    loss_of(model).backward()
    assert all(block.norm.weight.grad.abs().sum() > 0 for block in model.blocks)


# Residual scaling

OUTPUTS = {
    Plain: ["attention", "feed_forward.1"],
    gpt2: ["attn.c_proj", "mlp.c_proj"],
    llama: ["self_attn.o_proj", "mlp.down_proj"],
}


@pytest.mark.parametrize("gradient", CONTRIBUTES)
@pytest.mark.parametrize("make", MODELS)
def test_scaled_outputs_are_those_of_an_untied_copy_with_divided_weights(make, gradient):
    """A linear map whose output is multiplied by 1/n is one whose weights were divided by n."""
    torch.manual_seed(0)
    tying = Tying((0, 1, 0, 1, 4, 4))  # two uses each: 1/2 is exact
    scaled, divided = make().double(), make().double()
    options = {"gradient": gradient, "residual_scaling": 1.0, "residual_outputs": OUTPUTS[make]}
    layers = TiedLayers(scaled, **options)
    layers.apply(tying)
    layers.verify()
    divided.load_state_dict(scaled.state_dict())
    names = ["attention.out_proj", "feed_forward.1"] if make is Plain else OUTPUTS[make]
    with torch.no_grad():
        for block in blocks_of(divided):
            for name in names:
                for parameter in block.get_submodule(name).parameters():
                    parameter.div_(2)
    losses = loss_of(scaled), loss_of(divided)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    of = [dict(block.named_parameters()) for block in blocks_of(divided)]
    for owner, users in tying.groups.items():
        for name, parameter in blocks_of(scaled)[owner].named_parameters():
            share = 0.5 if name.rpartition(".")[0] in names else 1.0
            contributing = [i for i in users if CONTRIBUTES[gradient](i, owner)]
            expected = sum(share * of[i][name].grad for i in contributing)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-13)


def test_the_factor_follows_the_tying_and_the_power():
    model = gpt2()
    plain = copy.deepcopy(model)
    layers = TiedLayers(model, residual_scaling=0.5, residual_outputs=OUTPUTS[gpt2])
    layers.apply(Tying((0, 0, 0, 0, 4, 5)))
    projection = model.transformer.h[2].mlp.c_proj
    x = torch.randn(3, 64)
    expected = plain.transformer.h[0].mlp.c_proj(x) / 2  # four uses, to the power 0.5
    torch.testing.assert_close(projection(x), expected)
    layers.apply(Tying.independent(6))
    assert torch.equal(projection(x), plain.transformer.h[0].mlp.c_proj(x))
    assert len(projection._forward_hooks) == 1, "no more of them at every transition"


@pytest.mark.parametrize("outputs", [["attn.c_proj", "mlp.c_proj"], ["attn", "mlp"]])
def test_scaling_can_be_switched_off(outputs):
    """Also where what is scaled is a module without parameters of its own."""
    model = gpt2()
    tie(model, "cycle", 2)
    before = loss_of(model)
    TiedLayers(model, residual_scaling=1.0, residual_outputs=outputs)
    assert loss_of(model) != before
    TiedLayers(model, residual_scaling=0.0)
    assert loss_of(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_scaled_model_computes_the_same(copied):
    model = llama()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS[llama], "gradient": "owner"}
    TiedLayers(model, **options).apply(Tying((0, 1, 0, 1, 0, 1)))
    assert torch.equal(loss_of(copied(model)), loss_of(model))
    assert {*dict(copied(model).named_parameters())} == {*dict(model.named_parameters())}


def test_scaling_holds_in_torchs_fast_path_for_inference():
    """``TransformerEncoderLayer`` computes without calling its parts, unless they have hooks."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4)
    options = {"residual_scaling": 1.0, "residual_outputs": ["self_attn", "linear2"]}
    TiedLayers(model, **options).apply(Tying.all_tied(4))
    x = torch.randn(2, 3, 8)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
