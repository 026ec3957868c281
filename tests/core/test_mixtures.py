"""Learned mixtures against the sums written out, and against tying, from which they start."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from tiny_models import Plain, gpt2, llama, loss_of, t5
from torch import nn

from layer_tying.core.mix import mix
from layer_tying.core.mixtures import FACTOR_KEY
from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.weight_access import weights_as_read
from layer_tying.errors import InputError

MODELS = [Plain, gpt2, llama]
CYCLE = Tying((0, 1, 0, 1, 0, 1))


def mixed_and_untied(make, seed: int = 0) -> tuple[nn.Module, TiedLayers, nn.Module]:
    """A model with random mixtures, and one of its own weights for each layer, equal to them."""
    torch.manual_seed(seed)
    model, untied = make().double(), make().double()
    layers = tie(model, CYCLE)
    with torch.no_grad():
        for vector in layers.mix():
            vector.copy_(torch.randn(2))
    state = {n: p for n, p in model.state_dict().items() if not n.endswith("_mixture")}
    untied.load_state_dict(state | dict(weights_as_read(layers.stack)))
    return model, layers, untied


def with_integers() -> nn.Module:
    model = Plain()
    for block in model.blocks:
        codes = torch.ones(2, 2, dtype=torch.int8)
        block.codes = nn.Parameter(codes, requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # these numbers are exact
def test_mixing_and_its_gradients_by_hand(dtype):
    as_leaf = {"dtype": dtype, "requires_grad": True}
    coefficients = torch.tensor([2.0, -1.0], **as_leaf)
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]], **as_leaf)
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0]], **as_leaf)
    mixed = mix(coefficients, one, other)
    assert mixed.tolist() == [[2.0, 3.0], [5.0, 8.0]]
    (mixed * torch.tensor([[1.0, 0.0], [0.0, 10.0]])).sum().backward()
    assert coefficients.grad.tolist() == [41.0, 0.0]
    assert one.grad.tolist() == [[2.0, 0.0], [0.0, 20.0]]
    assert other.grad.tolist() == [[-1.0, 0.0], [0.0, -10.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_in_float64(dtype):
    coefficients = torch.randn(3, dtype=dtype, requires_grad=True)
    sets = [torch.randn(4, 2, dtype=dtype, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(mix, (coefficients, *sets))
    assert torch.autograd.gradgradcheck(mix, (coefficients, *sets))  # gradient penalties need it


class Perceptron(nn.Module):
    """All of its operations have rules for all transforms of torch.func."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_the_transforms_of_torch_func_go_through_mixtures():
    model, _, untied = mixed_and_untied(Perceptron)
    x, tangent = torch.randn(2, 3, 8, dtype=torch.float64)
    for each, other in zip(
        (*torch.func.jvp(model, (x,), (tangent,)), torch.func.vmap(model)(x)),
        (*torch.func.jvp(untied, (x,), (tangent,)), torch.func.vmap(untied)(x)),
        strict=True,
    ):
        torch.testing.assert_close(each, other)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(of_samples[name].sum(0), parameter.grad)


@pytest.mark.parametrize("make", MODELS)
def test_it_starts_as_the_tied_model(make):
    torch.manual_seed(0)
    model = make().double()
    layers = tie(model, CYCLE)
    before = loss_of(model)
    layers.mix()
    torch.testing.assert_close(loss_of(model), before, rtol=1e-12, atol=0)
    assert layers.tying == CYCLE
    layers.verify()


@pytest.mark.parametrize("make", MODELS)
def test_it_computes_what_an_untied_model_of_the_mixed_weights_does(make):
    model, layers, untied = mixed_and_untied(make)
    mixtures = layers.mixtures
    losses = loss_of(model), loss_of(untied)
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    for loss in losses:
        loss.backward()
    of = dict(untied.named_parameters(remove_duplicate=False))
    names = layers.stack.names
    for name, coefficients in mixtures.coefficients[0].items():
        for m in range(2):
            expected = sum(
                mixtures.coefficients[i][name][m].detach() * of[f"{layer}.{name}"].grad
                for i, layer in enumerate(names)
            )
            owner = layers.parameters(m)[name]
            torch.testing.assert_close(owner.grad, expected, rtol=1e-8, atol=1e-12)
        expected = [
            (of[f"{names[0]}.{name}"].grad * layers.parameters(m)[name]).sum() for m in range(2)
        ]
        torch.testing.assert_close(coefficients.grad, torch.stack(expected), rtol=1e-8, atol=1e-12)


def test_each_stored_tensor_is_shown_once():
    model = gpt2()
    tie(model, "cycle", 2).mix()
    names = dict(model.named_parameters())
    assert len(names) == len({p.data_ptr() for p in names.values()})
    assert len([name for name in names if name.endswith("_mixture")]) == 6 * 4
    assert all(p.shape == (2,) for name, p in names.items() if name.endswith("_mixture"))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_checkpointing_makes_the_mixture_again(make):
    model, _, untied = mixed_and_untied(make)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss_of(model).backward()
    loss_of(untied).backward()
    gradients = (
        [p.grad for p in model.transformer.wte.parameters()]
        if make is gpt2
        else [p.grad for p in model.model.embed_tokens.parameters()]
    )
    expected = [p.grad for p in untied.get_input_embeddings().parameters()]
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    model, _, _ = mixed_and_untied(llama)
    other = copied(model)
    assert torch.equal(loss_of(other), loss_of(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.equal(loss_of(other), loss_of(model))


def test_the_coefficients_learn_faster_and_are_not_decayed():
    torch.manual_seed(0)
    model = gpt2()
    layers = TiedLayers(model, optimizer := torch.optim.AdamW(model.parameters(), lr=1e-3))
    layers.apply(CYCLE)
    mixtures = layers.mix()
    group = optimizer.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group[FACTOR_KEY]) == (5e-3, 0.0, 5.0)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(mixtures.matrices()["mlp.c_proj.weight"][0], torch.tensor([1.0, 0.0]))
    layers.verify()


def test_a_state_dict_makes_a_round_trip():
    model, _, _ = mixed_and_untied(gpt2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = gpt2().double()
    tie(other, CYCLE).mix()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loss_of(other), loss_of(model))


def test_another_tying_is_refused_while_layers_mix():
    layers = tie(gpt2(), CYCLE)
    layers.mix()
    with pytest.raises(InputError, match="the layers mix the shared weights"):
        layers.apply(Tying.all_tied(6))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tie(gpt2(), "all"), "needs two independent layers or more, got 1"),
        (
            lambda: tie(t5(), "none", layers=["encoder.block", "decoder.block"], by_kind=True),
            "layers of this model differ",
        ),
        (lambda: tie(with_integers(), "cycle", 2), "blocks.0.codes holds integers"),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make().mix()


def test_a_model_that_is_tied_again_goes_on_mixing():
    model, layers, _ = mixed_and_untied(gpt2)
    before = loss_of(model)
    again = TiedLayers(model)
    assert torch.equal(loss_of(model), before)
    assert again.mixtures is not None and layers.mixtures is not None
    assert [*again.mixtures] == [*layers.mixtures]


def test_mixtures_go_with_residual_scaling_and_both_are_exported():
    torch.manual_seed(0)
    model, untied = gpt2().double(), gpt2().double()
    options = {"residual_scaling": 1.0, "residual_outputs": ["attn.c_proj", "mlp.c_proj"]}
    layers = tie(model, CYCLE, **options)
    with torch.no_grad():
        for vector in layers.mix():
            vector.add_(torch.randn(2))
    state = {n: p for n, p in model.state_dict().items() if not n.endswith("_mixture")}
    untied.load_state_dict(state | dict(weights_as_read(layers.stack)))
    torch.testing.assert_close(loss_of(model), loss_of(untied), rtol=1e-6, atol=0)


def groups_with_coefficients(layers: TiedLayers) -> list[dict]:
    ours = {id(p) for p in layers.mix()}
    groups = [group for optimizer in layers.optimizers for group in optimizer.param_groups]
    return [group for group in groups if any(id(p) in ours for p in group["params"])]


@pytest.mark.parametrize("is_named", [False, True])
def test_a_new_optimizer_of_a_model_that_mixes_gives_coefficients_their_own_rate(is_named):
    model = gpt2()
    tie(model, CYCLE).mix()
    parameters = model.named_parameters() if is_named else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(2):  # the second finds them as they should be
        layers = TiedLayers(model, optimizer)
        (group,) = groups_with_coefficients(layers)
        assert (group["lr"], group["weight_decay"]) == (5e-3, 0.0)
        assert {id(p) for p in group["params"]} == {id(p) for p in layers.mix()}
        held = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
    layers.verify()


@pytest.mark.parametrize("is_named", [False, True])
def test_coefficients_join_an_optimizer_of_named_parameters(is_named):
    model = gpt2()
    parameters = model.named_parameters() if is_named else model.parameters()
    layers = tie(model, CYCLE, optimizer=torch.optim.AdamW(parameters, lr=1e-3))
    layers.mix()
    (group,) = groups_with_coefficients(layers)
    assert ("param_names" in group) == is_named
    assert group["lr"] == 5e-3


def test_an_optimizer_without_a_learning_rate_takes_the_coefficients():
    model = Plain()
    optimizer = transformers.Adafactor(model.parameters())  # its steps have sizes of their own
    layers = tie(model, CYCLE, optimizer=optimizer)
    mixtures = layers.mix()
    assert optimizer.param_groups[-1]["lr"] is None
    loss_of(model).backward()
    optimizer.step()
    layers.verify()
    assert len({vector[0].item() for vector in mixtures}) > 2


def test_of_several_optimizers_the_coefficients_join_one_that_takes_vectors():
    model = gpt2()
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is each for each in matrices)]
    muon, adamw = torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-3)
    layers = tie(model, CYCLE, optimizer=[muon, adamw])
    layers.mix()
    assert groups_with_coefficients(layers) == [adamw.param_groups[-1]]
    loss_of(model).backward()
    muon.step()
    adamw.step()


def test_gradients_of_the_owner_only_do_not_go_with_mixtures():
    with pytest.raises(InputError, match="gradient 'owner'"):
        tie(gpt2(), CYCLE, gradient="owner").mix()


def test_coefficients_learn_by_the_rate_of_the_matrices_that_they_mix():
    model = Plain()
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks")]
    groups = [{"params": rest, "lr": 1e-5}, {"params": model.blocks.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    tie(model, "cycle", 2, optimizer=optimizer).mix()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-2, 5e-2]
