"""Finding the layers of a model, and refusing what cannot be shared."""

import pytest
import torch
import transformers
from tiny_models import Plain, gpt2, gpt_neo, llama, t5
from torch import nn

from layer_tying.core.find import find_layers
from layer_tying.core.tie import tie
from layer_tying.errors import InputError


def stack_of(*blocks: nn.Module, **others: nn.Module) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)
    for name, module in others.items():
        model.add_module(name, module)
    return model


@pytest.mark.parametrize(
    ("model", "container"),
    [
        (Plain(), "blocks"),
        (gpt2(), "transformer.h"),
        (llama(), "model.layers"),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
            "layers",
        ),
        (
            transformers.BertModel(
                transformers.BertConfig(
                    hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
                )
            ),
            "encoder.layer",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_one_list_of_equal_blocks_is_found(model, container):
    stack = find_layers(model)
    blocks = list(model.get_submodule(container))
    assert list(stack.blocks) == blocks
    assert stack.names == tuple(f"{container}.{i}" for i in range(len(blocks)))
    assert set(stack.kinds) == {0}
    for block, slots in zip(blocks, stack.slots, strict=True):
        assert {n: id(module._parameters[a]) for n, (module, a) in slots.items()} == {
            n: id(p) for n, p in block.named_parameters()
        }


def test_lists_of_unequal_modules_do_not_hide_the_one_of_equal_blocks():
    convolutions = nn.ModuleList([nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3)])
    model = stack_of(nn.Linear(8, 8), nn.Linear(8, 8), convolutions=convolutions)
    assert find_layers(model).names == ("blocks.0", "blocks.1")


def test_two_candidates_are_listed():
    more = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = stack_of(nn.Linear(2, 2), nn.Linear(2, 2), more=more)
    with pytest.raises(
        InputError, match=r"more than one.*layers=.*blocks \(2 x Linear\), more \(2"
    ):
        find_layers(model)
    assert find_layers(model, "more").names == ("more.0", "more.1")


def test_no_candidate_says_what_there_is():
    with pytest.raises(InputError, match=r"no list of equal blocks in Linear.*none"):
        find_layers(nn.Linear(2, 2))
    unequal = stack_of(
        nn.Linear(2, 2), nn.Linear(2, 3), more=nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
    )
    with pytest.raises(InputError, match=r"blocks \(2 x Linear\), more \(2 x Linear\)"):
        find_layers(unequal)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("nowhere", r"no module 'nowhere'.*blocks \(6 x Block\)"),
        ("head", r"'head' is a Linear, not a ModuleList.*blocks \(6 x Block\)"),
        ("blocks.0.feed_forward", "blocks.0.feed_forward.1 cannot share weights"),
        (["blocks", "blocks"], "blocks.0 and blocks.0 are one and the same module"),
    ],
)
def test_a_wrong_name_is_one_clear_error(layers, message):
    with pytest.raises(InputError, match=message) as error:
        find_layers(Plain(), layers)
    assert "\n" not in str(error.value)


def test_a_single_layer_has_nothing_to_tie():
    with pytest.raises(InputError, match="1 layer"):
        find_layers(stack_of(nn.Linear(2, 2)), "blocks")


def test_a_module_that_is_used_at_two_positions_is_refused():
    """Not silently counted once: the user would get half the layers that the model has."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for blocks in ([one, one, other, other], [one, one]):
        with pytest.raises(InputError, match=r"blocks.0 and blocks.1 are one and the same module"):
            find_layers(stack_of(*blocks))


def test_blocks_that_differ_are_refused_with_the_difference():
    with pytest.raises(InputError, match=r"weight is \(2, 2\).*in one and \(3, 2\)"):
        find_layers(stack_of(nn.Linear(2, 2), nn.Linear(2, 3)), "blocks")
    frozen = stack_of(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(InputError, match=r"weight is .* in one and .* frozen in the other"):
        find_layers(frozen)
    with pytest.raises(InputError, match=r"bias is .* in one and absent in the other"):
        find_layers(stack_of(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    with pytest.raises(InputError, match="one is a Linear, the other a Identity"):
        find_layers(stack_of(nn.Linear(2, 2), nn.Identity()), "blocks")


def test_alternating_attention_is_refused_precisely_or_tied_within_its_kinds():
    model = gpt_neo()
    with pytest.raises(
        InputError,
        match=r"transformer.h.0 and transformer.h.1 cannot share weights: "
        r"attn.attention_type is global in one and local in the other.*by_kind=True",
    ):
        find_layers(model)
    assert find_layers(model, by_kind=True).kinds == (0, 1, 0, 1)


def test_layers_of_which_no_two_are_alike_are_refused_even_by_kind():
    unequal = stack_of(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 3))
    with pytest.raises(InputError, match="cannot share weights"):
        find_layers(unequal, by_kind=True)


def test_t5_is_named_as_two_lists():
    model = t5()
    lists = ["encoder.block", "decoder.block"]
    with pytest.raises(InputError, match=r"encoder.block \(3 x T5Block\), decoder.block \(3"):
        find_layers(model)
    with pytest.raises(InputError, match="relative_attention_bias"):
        find_layers(model, "encoder.block")
    pattern = ["*relative_attention_bias*"]
    assert find_layers(model, "encoder.block", pattern).kinds == (0, 0, 0)
    with pytest.raises(InputError, match=r"encoder.block.0 and decoder.block.0 cannot share"):
        find_layers(model, lists, pattern)
    stack = find_layers(model, lists, pattern, by_kind=True)
    assert stack.kinds == (0, 0, 0, 3, 3, 3)
    assert not any("relative_attention_bias" in name for slots in stack.slots for name in slots)


def test_untied_patterns_leave_parameters_out():
    stack = find_layers(Plain(), untied=["norm.*", "*bias"])
    assert set(stack.slots[0]) == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "feed_forward.0.weight",
        "feed_forward.1.weight",
        "scale",
    }
    with pytest.raises(InputError, match="no parameters to share"):
        find_layers(Plain(), untied=["*"])


def test_a_parameter_shared_with_the_rest_of_the_model_is_left_out():
    model = Plain()
    for block in model.blocks:
        block.norm.weight = model.blocks[0].norm.weight
    model.final_norm = nn.LayerNorm(8)
    model.final_norm.weight = model.blocks[0].norm.weight
    assert all("norm.weight" not in slots for slots in find_layers(model).slots)


def test_a_module_shared_with_the_rest_of_the_model_is_left_out():
    model = Plain()
    model.norm = model.blocks[0].norm
    for block in model.blocks:
        block.norm = model.norm
    assert all("norm.weight" not in slots for slots in find_layers(model).slots)


def test_a_second_name_for_the_blocks_does_not_make_them_shared_with_the_rest():
    model = Plain()
    model.alias = nn.Module()
    model.alias.body = model.blocks
    assert set(find_layers(model).slots[0]) == {n for n, _ in model.blocks[0].named_parameters()}


def test_meta_tensors_will_do():
    with torch.device("meta"):
        assert len(find_layers(Plain()).blocks) == 6


def test_what_is_untied_and_matches_nothing_is_refused():
    with pytest.raises(InputError, match=r"untied 'norms\.\*' is the name of nothing in blocks\.0"):
        find_layers(Plain(), untied=["scale", "norms.*"])


def test_a_model_that_is_itself_the_list_of_its_layers_is_told_so():
    with pytest.raises(InputError, match="the model is itself a Sequential: hold the list"):
        find_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    found = find_layers(
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    )
    assert found.names == ("1.0", "1.1")


@pytest.mark.parametrize("layer", [0, 3])
def test_a_part_of_one_layer_with_a_second_name_is_refused_and_nothing_changes(layer):
    model = Plain(4)
    model.watched = model.blocks[layer].norm
    optimizer = torch.optim.AdamW(model.parameters())
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(InputError, match=rf"blocks.{layer}.norm.bias is used elsewhere"):
        tie(model, "all", optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
    assert tie(model, "all", untied=["norm.*"]).tying.num_independent == 1


def test_a_small_list_is_not_taken_for_the_layers_where_these_differ():
    model = stack_of(nn.Linear(4, 4), nn.Linear(4, 4))
    model.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    model.blocks[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="heads are equal, but blocks is larger, and its blocks 0"):
        find_layers(model)
    assert find_layers(model, "heads").names == ("heads.0", "heads.1")


def test_layers_that_were_compiled_apart_are_found():
    model = Plain(4)
    plain = find_layers(model)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    found = find_layers(model)
    assert found.blocks == plain.blocks and found.slots == plain.slots
    assert set(dict(model.named_modules())) >= set(found.names)
