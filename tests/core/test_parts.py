"""Parts of layers that are tied each in its own way: attention one way, feed-forward another."""

import copy

import pytest
import torch
from tiny_models import gpt2
from torch import nn

from layer_tying.core.parts import parts_of
from layer_tying.core.patterns import pattern
from layer_tying.core.tie import tie
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.core.untied_copy import untied_copy
from layer_tying.dynamic import DynamicTying
from layer_tying.errors import InputError

pytestmark = pytest.mark.numerics

ATTENTION = ["mlp.*", "ln_2.*"]  # what a tying of attention leaves out, and of the rest
FEED_FORWARD = ["attn.*", "ln_1.*"]
OUTPUTS = ["attn.c_proj", "mlp.c_proj"]
IDS = torch.arange(10)[None] % 7


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def in_double() -> nn.Module:
    torch.manual_seed(0)
    return gpt2(6).double().eval()


def mixed_by_hand(model: nn.Module, plain: nn.Module, scaling: float) -> nn.Module:
    """An untied model whose matrices are sums over the sets, written out."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    plain.load_state_dict({n: p for n, p in stored.items() if not n.endswith("_mixture")}, False)
    with torch.no_grad():
        for i, block in enumerate(plain.transformer.h):
            for name, weight in block.named_parameters():
                number = 2 if name.startswith(("attn", "ln_1")) else 3
                sets = [stored[f"transformer.h.{m}.{name}"] for m in range(number)]
                if weight.ndim > 1:
                    c = stored[f"transformer.h.{i}.{name}_mixture"]
                    weight.copy_(sum(c[m] * each for m, each in enumerate(sets)))
                else:
                    weight.copy_(sets[i % number])
                if scaling and "c_proj" in name:
                    weight.mul_((number / 6) ** scaling)
    return plain


@pytest.mark.parametrize("scaling", [0.0, 1.0])
def test_each_part_mixes_its_own_number_of_sets(scaling):
    model = in_double()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"residual_scaling": scaling, "residual_outputs": OUTPUTS if scaling else []}
    parts = [
        tie(model, "cycle", 2, optimizer=optimizer, untied=ATTENTION, **options),
        tie(model, "cycle", 3, optimizer=optimizer, untied=FEED_FORWARD, **options),
    ]
    mixtures = [layers.mix() for layers in parts]
    for _ in range(3):  # the coefficients leave their one-hot start
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layers in parts:
        layers.verify()
    assert {len(c) for mixture in mixtures for c in mixture} == {2, 3}
    torch.testing.assert_close(logits(model), logits(mixed_by_hand(model, plain, scaling)))


def test_a_part_changes_and_the_other_stays():
    model = in_double()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS}
    attention = tie(model, "all", untied=ATTENTION, **options)
    rest = tie(model, "cycle", 3, untied=FEED_FORWARD, **options)
    attention.apply(pattern("cycle", 6, 2))
    for layers, number in ((attention, 2), (rest, 3)):
        layers.verify()
        assert layers.tying == pattern("cycle", 6, number)
    for layer in model.transformer.h:
        for module, uses in ((layer.attn.c_proj, 3), (layer.mlp.c_proj, 2)):
            x = torch.ones(1, len(module.weight), dtype=torch.double)
            expected = (x @ module.weight + module.bias) / uses
            torch.testing.assert_close(module(x), expected)


def test_what_a_part_was_tied_with_is_remembered_for_it():
    model = in_double()
    tie(model, "cycle", 2, untied=ATTENTION, optimizer_state="fresh").mix()
    rest = tie(model, "cycle", 3, untied=FEED_FORWARD)
    assert rest.mixtures is None  # the options of one part are not those of the other
    assert rest.settings.optimizer_state == "copy"
    again = TiedLayers(model, untied=ATTENTION)
    assert again.mixtures is not None
    assert again.settings.optimizer_state == "fresh"
    assert TiedLayers(model).tying.num_independent == 2  # the newest part
    assert len(parts_of(copy.deepcopy(model))) == 2


def test_an_untied_copy_computes_the_same():
    model = in_double()
    for untied, number in ((ATTENTION, 2), (FEED_FORWARD, 3)):
        layers = tie(model, "cycle", number, untied=untied)
        with torch.no_grad():
            for coefficients in layers.mix():
                coefficients.add_(0.1)
    plain = untied_copy(model)
    assert not parts_of(plain)
    assert TiedLayers(plain).tying == Tying.independent(6)
    assert not any(name.endswith("_mixture") for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), logits(model))


def test_policies_decide_over_parts():
    model = in_double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attention = DynamicTying(
        model, optimizer, "random", total_steps=20, every=2, untied=ATTENTION, initial="none"
    )
    rest = DynamicTying(model, optimizer, "mixture", max_independent=3, untied=FEED_FORWARD)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for tying in (attention, rest):
            tying.step(loss)
            tying.layers.verify()
    assert losses[-1] < losses[0]
    assert rest.tying == pattern("cycle", 6, 3)


def test_a_part_that_cannot_be_tied_leaves_the_others_as_they_were():
    model = in_double()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS}
    tie(model, "cycle", 2, untied=ATTENTION, **options).mix()
    before, expected = parts_of(model), logits(model)
    with pytest.raises(InputError, match="from 1 to 6, got 7"):
        tie(model, "cycle", 7, untied=FEED_FORWARD, **options)
    assert parts_of(model) == before
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert TiedLayers(model).mixtures is not None


def test_parts_have_no_module_in_common():
    model = in_double()
    tie(model, "cycle", 2, untied=["*.bias"])
    with pytest.raises(InputError, match=r"ln_1 has parameters in two parts"):
        tie(model, "cycle", 3, untied=["*.weight"])


def test_parts_become_one_again_unless_they_mix():
    model = in_double()
    tie(model, "cycle", 2, untied=ATTENTION)
    tie(model, "cycle", 2, untied=FEED_FORWARD)
    whole = tie(model, "cycle", 3, untied=[])
    whole.verify()
    assert len(parts_of(model)) == 1
    mixing = in_double()
    tie(mixing, "cycle", 2, untied=ATTENTION).mix()
    tie(mixing, "cycle", 2, untied=FEED_FORWARD)
    with pytest.raises(InputError, match="cannot become one part again"):
        TiedLayers(mixing, untied=[])
    assert len(parts_of(mixing)) == 2


@pytest.mark.parametrize("way", ["mixed", "scaled"])
def test_what_is_mixed_or_scaled_is_not_left_out_without_a_word(way):
    model = in_double()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS} if way == "scaled" else {}
    layers = tie(model, "cycle", 2, **options)
    if way == "mixed":
        layers.mix()
    before, expected = parts_of(model), logits(model)
    with pytest.raises(InputError, match=r"mlp.c_\w+ is mixed or scaled by the tying in force"):
        TiedLayers(model, untied=ATTENTION)
    assert parts_of(model) == before
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_one_part_mixes_and_the_others_gradients_are_its_owners():
    for order in ((ATTENTION, FEED_FORWARD), (FEED_FORWARD, ATTENTION)):
        model = in_double()
        for untied in order:
            if untied is ATTENTION:
                tie(model, "cycle", 2, untied=ATTENTION).mix()
            else:
                tie(model, "cycle", 3, untied=FEED_FORWARD, gradient="owner")
        assert TiedLayers(model, untied=ATTENTION).mixtures is not None
        assert TiedLayers(model, untied=FEED_FORWARD).settings.gradient == "owner"


@pytest.mark.parametrize("change", ["another parameter", "a frozen one"])
def test_a_part_whose_layers_are_no_longer_alike_keeps_its_scale(change):
    model = in_double()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS}
    tie(model, "all", untied=ATTENTION, **options)
    rest = tie(model, "cycle", 3, untied=FEED_FORWARD, **options)
    first = model.transformer.h[0].attn
    if change == "another parameter":
        first.extra = nn.Parameter(torch.ones(1))
    else:
        model.transformer.h[0].attn.c_attn = copy.deepcopy(first.c_attn).requires_grad_(False)
    rest.apply(pattern("cycle", 6, 2))
    assert len(parts_of(model)) == 2
    x = torch.ones(1, 16, dtype=torch.double)
    projection = model.transformer.h[3].attn.c_proj
    torch.testing.assert_close(projection(x), (x @ projection.weight + projection.bias) / 6)


def test_a_part_scales_whole_modules_and_the_other_leaves_them_alone():
    model = in_double()
    scaled = {"residual_scaling": 1.0, "residual_outputs": ["attn"]}
    attention = tie(model, "all", untied=ATTENTION, **scaled)
    expected = logits(model)
    rest = tie(model, "none", untied=FEED_FORWARD)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    rest.apply(pattern("cycle", 6, 2))
    attention.apply(pattern("cycle", 6, 2))
    with pytest.raises(InputError, match=r"scale of .*attn cannot be put into its weights"):
        untied_copy(model)


def test_residual_outputs_that_no_part_holds_are_refused():
    model = in_double()
    options = {"residual_scaling": 1.0, "residual_outputs": OUTPUTS}
    tie(model, "cycle", 2, untied=ATTENTION)
    with pytest.raises(InputError, match=r"mlp.c_proj is one of the residual outputs, and not of"):
        tie(model, "cycle", 3, untied=[*FEED_FORWARD, "mlp.c_proj.*"], **options)
    assert len(parts_of(model)) == 1
    model = in_double()
    tie(model, "cycle", 2, untied=ATTENTION, **options)
    tie(model, "none", untied=FEED_FORWARD)
    with pytest.raises(InputError, match=r"mlp.c_proj is one of the residual outputs, and not of"):
        TiedLayers(model, untied=[*FEED_FORWARD, "mlp.c_proj.*"])  # the first part's to scale, then


def test_scaling_that_is_switched_off_is_off_for_what_is_not_shared_too():
    model, plain = in_double(), in_double()
    options = {"untied": ATTENTION, "residual_outputs": OUTPUTS}
    tie(model, "cycle", 2, residual_scaling=1.0, **options)
    TiedLayers(model, untied=ATTENTION, residual_scaling=0.0)
    tie(plain, "cycle", 2, untied=ATTENTION)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)


def test_what_names_a_part_is_taken_from_such_layers():
    stacks = {
        name: nn.ModuleList(
            nn.ModuleDict({"n": nn.LayerNorm(4), "l": nn.Linear(4, 4)}) for _ in range(3)
        )
        for name in ("encoder", "decoder")
    }
    model = nn.ModuleDict(stacks)
    tie(model, "all", layers="encoder", untied=["l.*"])
    tie(model, "all", layers="decoder")
    assert [part.untied for part in parts_of(model)] == [("l.*",), ()]
    assert TiedLayers(model, layers="encoder").settings.untied == ("l.*",)


def test_a_list_that_was_found_and_is_named_later_is_the_same():
    model = in_double()
    tie(model, "cycle", 2, untied=["ln_*"])
    layers = TiedLayers(model, layers="transformer.h")
    assert layers.settings.untied == ("ln_*",)
    assert len(parts_of(model)) == 1


def test_layers_that_were_changed_since_go_on_as_they_were_tied():
    model = in_double()
    mixtures = tie(model, "cycle", 2).mix()
    with torch.no_grad():
        for coefficients in mixtures:
            coefficients.add_(0.1)
    expected = logits(model)
    model.transformer.h[0].extra = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match=r"extra is .* in one and absent in the other"):
        TiedLayers(model)
    layers = TiedLayers(model, untied=["extra"])
    assert layers.mixtures is not None
    assert len(parts_of(model)) == 1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_what_layers_share_cannot_be_left_out_of_the_tying():
    model = in_double()
    layers = tie(model, "all")
    with pytest.raises(InputError, match=r"h\.1\.ln_1\.weight is shared by the tying in force"):
        TiedLayers(model, untied=["ln_*"])
    layers.apply(Tying.independent(6))
    assert tie(model, "all", untied=["ln_*"]).tying == Tying.all_tied(6)
    blocks = model.transformer.h
    assert blocks[0].ln_1.weight is not blocks[1].ln_1.weight


def test_the_order_of_the_optimizers_parameters_is_that_of_the_tyings_alone():
    """Its state dict names parameters by their place, and may be loaded into another process."""
    orders = []
    for first in ("attention", "rest"):
        model = in_double()
        optimizer = torch.optim.AdamW(model.parameters())
        parts = {
            "attention": TiedLayers(model, optimizer, untied=ATTENTION),
            "rest": TiedLayers(model, optimizer, untied=FEED_FORWARD),
        }
        parts["attention"].apply(Tying.all_tied(6))
        for name in sorted(parts, key=lambda name, first=first: name != first):
            parts[name].apply(pattern("cycle", 6, 2))
        names = {id(p): name for name, p in model.named_parameters()}
        orders.append([names[id(p)] for p in optimizer.param_groups[0]["params"]])
    assert orders[0] == orders[1]
    assert len(orders[0]) == len(names)
