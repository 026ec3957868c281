"""Exports make round trips: expanded through plain transformers, compact still shared in memory."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from built_models import CLASSES, NUM_LAYERS, SOME_TIED, inputs_for, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import small, write_text
from tiny_models import Plain, gpt2, loss_of, t5
from tolerance import assert_close, close_to
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer_tying import (
    InputError,
    TiedLayers,
    Tying,
    export_compact,
    export_expanded,
    load,
    tie,
)
from layer_tying.cli import main
from layer_tying.core.tying_settings import TyingSettings, remember_settings, settings_of
from layer_tying.data.tokenizer import read_tokenizer
from layer_tying.models.families import residual_outputs
from layer_tying.runs.train import train
from layer_tying.saving.export import COMPACT

pytestmark = pytest.mark.numerics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOW_TO = Path(__file__).parents[2] / "docs" / "howto-export.md"


def kinds_and_embeddings():
    for kind in CLASSES:
        for is_tied in (True, False):
            if kind != "vit" or not is_tied:  # it has no token embeddings
                yield pytest.param(kind, is_tied, id=f"{kind}-{'tied' if is_tied else 'untied'}")


FAMILIES = pytest.mark.parametrize(("kind", "embeddings_tied"), list(kinds_and_embeddings()))


def plain_copy(kind: str, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """An untied model of transformers' own with the same weights, in a type."""
    plain = CLASSES[kind](copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)  # unlike .to(dtype), leaves rotary buffers alone
    return plain


def logits(model: torch.nn.Module, kind: str) -> torch.Tensor:
    """What a model computes from its weights, in a precision that leaves little to rounding."""
    inputs = inputs_for(kind)
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"].double()}
    with torch.no_grad():
        return copy.deepcopy(model).double()(**inputs).logits


@FAMILIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_is_a_plain_folder_with_equal_logits(kind, embeddings_tied, dtype, tmp_path):
    model = trained(kind, embeddings_tied)
    plain = plain_copy(kind, model, DTYPES[dtype])
    export_expanded(model, tmp_path / "ours", DTYPES[dtype])
    loaded, info = CLASSES[kind].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), "a key is missing, unexpected or of another shape"
    assert loaded.dtype == DTYPES[dtype]
    assert_close(logits(loaded, kind), logits(plain, kind))
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert {f.name for f in ours.iterdir()} == {f.name for f in theirs.iterdir()}
    for name in ("config.json", "generation_config.json"):
        if (theirs / name).exists():
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    one, other = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@FAMILIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_is_loaded_still_shared(kind, embeddings_tied, dtype, tmp_path):
    model = trained(kind, embeddings_tied)
    export_compact(model, tmp_path, DTYPES[dtype])
    loaded = load(tmp_path)
    assert type(loaded) is CLASSES[kind] and not loaded.training
    assert_close(logits(loaded, kind), logits(plain_copy(kind, model, DTYPES[dtype]), kind))
    assert TiedLayers(loaded).tying == SOME_TIED
    before = dict(model.named_parameters())
    after = dict(loaded.named_parameters())
    assert before.keys() == after.keys(), "something is shared that was not, or the reverse"
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name].to(DTYPES[dtype]))
        assert parameter.dtype == DTYPES[dtype] and parameter.requires_grad
    if kind != "vit":
        embeddings = loaded.get_input_embeddings().weight
        assert (loaded.get_output_embeddings().weight is embeddings) == embeddings_tied
    buffers = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compact_file_holds_each_weight_once(dtype, tmp_path):
    model = trained("gpt2", True)
    export_compact(model, tmp_path, DTYPES[dtype])
    unique = sum(p.numel() for p in model.parameters())
    header = int.from_bytes((tmp_path / COMPACT).read_bytes()[:8], "little")
    data = (tmp_path / COMPACT).stat().st_size - 8 - header
    assert data == unique * DTYPES[dtype].itemsize
    with safe_open(tmp_path / COMPACT, "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        aliases = json.loads(file.metadata()["layer_tying"])
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert aliases.keys() == every - {name for name, _ in model.named_parameters()}


class Allocations(TorchDispatchMode):
    """Bytes of all storage that operations return, and the names of those that draw numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.random: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage
                if torch.Tag.nondeterministic_seeded in func.tags:
                    self.random.append(str(func))
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_loading_allocates_what_is_unique_and_draws_nothing(kind, tmp_path):
    export_compact(trained(kind, kind == "gpt2", Tying.all_tied(NUM_LAYERS)), tmp_path)
    with Allocations() as seen:
        loaded = load(tmp_path)
    assert not seen.random
    unique = sum(p.nbytes for p in loaded.parameters())
    of_a_layer = sum(p.nbytes for p in TiedLayers(loaded).parameters(0).values())
    small_change = sum(b.nbytes for b in loaded.buffers()) + 2000  # rotary angles, positions
    assert seen.bytes < unique + small_change < unique + of_a_layer


PARTS = {"attn.c_proj": ["mlp.*", "ln_2.*"], "mlp.c_proj": ["attn.*", "ln_1.*"]}  # and the others


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_layers_that_are_tied_by_parts_are_exported_as_they_compute(power, tmp_path):
    """One attention for all layers, and three feed-forward networks; with scaled outputs or not."""
    model = trained("gpt2", True, Tying.independent(NUM_LAYERS))
    for (output, others), tying in zip(PARTS.items(), (("all",), ("cycle", 3)), strict=True):
        tie(model, *tying, untied=others, residual_scaling=power, residual_outputs=[output])
    check_both_exports(model, tmp_path)


def test_parts_that_mix_different_numbers_of_sets_are_exported_as_they_compute(tmp_path):
    model = trained("gpt2", True, Tying.independent(NUM_LAYERS)).double()
    for others, number in zip(PARTS.values(), (2, 3), strict=True):
        options = {"untied": others, "residual_scaling": 1.0, "residual_outputs": [*PARTS]}
        layers = tie(model, "cycle", number, **options)
        with torch.no_grad():
            for coefficients in layers.mix():
                coefficients.add_(torch.randn(number))
    check_both_exports(model, tmp_path)
    loaded = load(tmp_path / "compact")
    for others, number in zip(PARTS.values(), (2, 3), strict=True):
        layers = TiedLayers(loaded, untied=others)
        assert layers.tying.num_independent == number
        assert layers.mixtures is not None


def check_both_exports(model: torch.nn.Module, folder: Path) -> None:
    export_expanded(model, folder / "expanded")
    plain = CLASSES["gpt2"].from_pretrained(folder / "expanded")
    assert_close(logits(plain, "gpt2"), logits(model, "gpt2"))
    export_compact(model, folder / "compact")
    loaded = load(folder / "compact")
    assert_close(logits(loaded, "gpt2"), logits(model, "gpt2"))
    assert num_parameters(loaded) == num_parameters(model) < num_parameters(plain)


def test_a_scaled_output_whose_weights_are_not_shared_is_scaled_in_an_expanded_export(tmp_path):
    model = trained("gpt2", True, Tying.independent(NUM_LAYERS))
    options = {"untied": ["mlp.c_proj.*"], "residual_outputs": ["mlp.c_proj"]}
    tie(model, "cycle", 2, residual_scaling=1.0, **options)
    export_expanded(model, tmp_path)
    assert_close(logits(CLASSES["gpt2"].from_pretrained(tmp_path), "gpt2"), logits(model, "gpt2"))


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_from_pretrained_refuses_a_compact_folder(tmp_path):
    """It would leave tied layers random, and only warn."""
    export_compact(trained("gpt2", True), tmp_path)
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_loaded_model_goes_on_training(tmp_path):
    torch.manual_seed(0)
    model = gpt2()
    TiedLayers(model).apply(Tying.from_labels("aabbcc"))
    export_compact(model, tmp_path)
    losses = {}
    for name, each in (("was", model), ("loaded", load(tmp_path))):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        layers = TiedLayers(each.eval(), optimizer)
        losses[name] = []
        for labels in ("aabbcc", "abbbbb", "abcdef"):
            layers.apply(Tying.from_labels(labels))
            loss = loss_of(each)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
            layers.verify()
    assert losses["loaded"] == close_to(losses["was"], layers=3 * 3 * 6)  # three training steps


# Any module, any sharing


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path):
    model, other = gpt2(), gpt2(num_layers=5)
    tie(model, "cycle", 2)
    export_compact(model, tmp_path)
    before = {name: id(p) for name, p in other.named_parameters()}
    with pytest.raises(InputError, match="is of another model"):
        load(tmp_path, other)
    assert {name: id(p) for name, p in other.named_parameters()} == before


def test_a_model_that_is_tied_otherwise_takes_the_tying_of_the_export(tmp_path):
    torch.manual_seed(0)
    model, other = Plain(), Plain()
    tie(model, "sequence", 3)
    tie(other, "cycle", 2)
    export_compact(model, tmp_path)
    assert TiedLayers(load(tmp_path, other)).tying == Tying.from_labels("aabbcc")
    assert_close(loss_of(other), loss_of(model))


def mixing(num_sets: int, **options) -> Plain:
    model = Plain()
    layers = tie(model, "cycle", num_sets, **options)
    with torch.no_grad():
        for vector in layers.mix():
            vector.add_(torch.randn(num_sets))
    return model


EXPORTED = {
    "untied": Plain,
    "tied": lambda: tie(Plain(), "cycle", 3).stack.model,
    "as many sets": lambda: mixing(2),
    "more sets": lambda: mixing(3),
    "scaled": lambda: mixing(3, residual_scaling=1.0, residual_outputs=["feed_forward.1"]),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_model_that_mixes_takes_any_export(name, tmp_path):
    torch.manual_seed(0)
    model, other = EXPORTED[name](), mixing(2)
    export_compact(model, tmp_path)
    assert load(tmp_path, other) is other
    assert_close(loss_of(other), loss_of(model))
    assert other.state_dict().keys() == model.state_dict().keys()
    assert settings_of(other) == settings_of(load(tmp_path, Plain()))
    assert TiedLayers(other).tying == TiedLayers(model).tying


def test_a_model_that_mixes_stays_as_it_was_where_an_export_does_not_fit(tmp_path):
    export_compact(Plain(num_layers=5), tmp_path)
    other = mixing(2)
    before = loss_of(other)
    with pytest.raises(InputError, match="is of another model"):
        load(tmp_path, other)
    assert torch.equal(loss_of(other), before)


def test_an_export_is_not_written_in_integers_without_scales(tmp_path):
    with pytest.raises(InputError, match=r"got torch\.int32"):
        export_compact(Plain(), tmp_path / "small", dtype=torch.int32)
    assert not (tmp_path / "small").exists()


def test_a_generation_config_that_transformers_refuses_is_one_line(tmp_path):
    model = trained("gpt2", True)
    model.generation_config.top_p = 0.6  # without do_sample
    for number, export in enumerate((export_compact, export_expanded)):
        with pytest.raises(InputError, match=r"cannot write the export .*do_sample"):
            export(model, tmp_path / str(number))


def test_a_model_that_is_not_transformers_is_passed_in(tmp_path):
    torch.manual_seed(0)
    model = Plain()
    TiedLayers(model).apply(Tying.from_labels("abab" + "cc"))
    export_compact(model, tmp_path)
    fresh = Plain()
    assert load(tmp_path, fresh) is fresh
    assert TiedLayers(fresh).tying == Tying.from_labels("abab" + "cc")
    assert_close(loss_of(fresh), loss_of(model))
    other = Plain()
    TiedLayers(other, gradient="owner").apply(Tying.from_labels("ababcd"))
    assert_close(loss_of(load(tmp_path, other)), loss_of(model))
    assert fresh.blocks[3].offset == 3, "buffers are each layer's own"
    with pytest.raises(InputError, match=r"Plain is not a model of transformers"):
        export_expanded(model, tmp_path)
    with pytest.raises(InputError, match=r"no config\.json.*load\(folder, model\)"):
        load(tmp_path)


def test_any_sharing_comes_back(tmp_path):
    """Two named lists, parts that stay untied, and transformers' own shared embeddings."""
    torch.manual_seed(0)
    model = t5().eval()
    options = {"layers": "encoder.block", "untied": ["*layer_norm*", "*relative_attention_bias*"]}
    TiedLayers(model, **options).apply(Tying.all_tied(3))
    TiedLayers(model, layers="decoder.block", untied=options["untied"]).apply(Tying((0, 1, 0)))
    export_compact(model, tmp_path / "compact")
    export_expanded(model, tmp_path / "expanded")
    inputs = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    wanted = model(**inputs).loss
    loaded = load(tmp_path / "compact")
    assert_close(loaded(**inputs).loss, wanted)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    plain = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "expanded")
    assert_close(plain(**inputs).loss, wanted)


def test_the_gradient_mode_makes_no_difference(tmp_path):
    model = trained("gpt2", True)
    TiedLayers(model, gradient="owner")
    export_compact(model, tmp_path / "compact")
    export_expanded(model, tmp_path / "expanded")
    plain = CLASSES["gpt2"].from_pretrained(tmp_path / "expanded")
    assert_close(logits(load(tmp_path / "compact"), "gpt2"), logits(plain, "gpt2"))


# What goes with a model


def test_a_compact_export_says_how_the_layers_were_tied(tmp_path):
    model = trained("gpt2", True)
    outputs = ("attn.c_proj", "mlp.c_proj")
    said = TyingSettings(
        optimizer_state="fresh", gradient="owner", residual_scaling=0.5, residual_outputs=outputs
    )
    remember_settings(model, said)
    export_compact(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert replace(settings_of(loaded), owners=()) == said
    export_compact(loaded, tmp_path / "two")
    with safe_open(tmp_path / "two" / COMPACT, "pt") as file:
        again = TyingSettings.from_json(file.metadata()["layer_tying_settings"])
    assert replace(again, owners=()) == said


def test_a_model_that_nothing_was_said_of_has_the_defaults(tmp_path):
    export_compact(trained("gpt2", True), tmp_path)
    assert settings_of(load(tmp_path)) == TyingSettings(owners=SOME_TIED.owners)


def test_an_expanded_export_has_residual_scaling_in_its_weights(tmp_path):
    model = trained("gpt2", True)
    TiedLayers(model, residual_scaling=1.0, residual_outputs=["attn.c_proj", "mlp.c_proj"])
    export_expanded(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    uses = {0: 3, 1: 3, 2: 1, 3: 3}
    for layer, number in uses.items():
        for name in ("attn.c_proj.weight", "mlp.c_proj.bias", "attn.c_attn.weight"):
            ours = model.get_parameter(f"transformer.h.{layer}.{name}")
            factor = 1 / number if "c_proj" in name else 1
            assert_close(stored[f"transformer.h.{layer}.{name}"], ours * factor)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mixtures_and_residual_scaling_are_exported_both_ways(family, tmp_path):
    model = trained(family, False)
    outputs = residual_outputs(family)
    layers = tie(model, "cycle", 2, residual_scaling=1.0, residual_outputs=outputs)
    torch.manual_seed(0)
    with torch.no_grad():
        for coefficients in layers.mix():
            coefficients.add_(0.3 * torch.randn(2))
    export_compact(model, tmp_path / "compact")
    export_expanded(model, tmp_path / "expanded")
    expected = logits(model, family)
    loaded = load(tmp_path / "compact")
    assert_close(logits(loaded, family), expected)
    assert TiedLayers(loaded).mixtures is not None, "it goes on mixing"
    plain, info = CLASSES[family].from_pretrained(tmp_path / "expanded", output_loading_info=True)
    assert not any(info.values())
    # Stored in float32, a mixed weight is rounded once more.
    torch.testing.assert_close(logits(plain, family), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixes", [False, True])
def test_layers_that_were_compiled_apart_are_exported_under_their_own_names(mixes, tmp_path):
    model = trained("llama", False)
    layers = tie(model, "cycle", 2)
    if mixes:
        layers.mix()
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    export_compact(model, tmp_path / "compact")
    export_expanded(model, tmp_path / "expanded")
    expected = logits(model, "llama")
    assert_close(logits(load(tmp_path / "compact"), "llama"), expected)
    plain = CLASSES["llama"].from_pretrained(tmp_path / "expanded")
    assert_close(logits(plain, "llama"), expected)


def test_settings_make_a_round_trip_through_json():
    settings = TyingSettings(("encoder", "decoder"), ("*norm*",), True, "owner", owners=(0, 0, 2))
    assert TyingSettings.from_json(settings.to_json()) == settings
    older = {**json.loads(settings.to_json()), "inherit": "majority"}  # an option that is no more
    assert TyingSettings.from_json(json.dumps(older)) == settings
    for text in ("{", '{"colour": 1}'):
        with pytest.raises(InputError, match="not the settings of a tying"):
            TyingSettings.from_json(text)


def test_a_folder_holds_one_model(tmp_path):
    """Of two formats one reader would take the one, and another the other."""
    for first, then in ((export_compact, export_expanded), (export_expanded, export_compact)):
        folder = tmp_path / first.__name__
        first(gpt2(), folder)
        first(gpt2(), folder)  # of the same format it is replaced
        with pytest.raises(InputError, match="of a model that this export would not replace"):
            then(gpt2(), folder)


@pytest.mark.parametrize("export", [export_compact, export_expanded])
def test_a_model_in_several_files_is_not_replaced(export, tmp_path):
    """Those are never ours, and transformers would delete some of them and leave others."""
    gpt2().save_pretrained(tmp_path, max_shard_size="20KB")
    before = {file.name for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds model.safetensors.index.json, of a model that"):
        export(gpt2(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("export", [export_compact, export_expanded])
def test_weights_are_readable_for_whom_other_files_are(export, tmp_path):
    export(gpt2(), tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


# What is broken or foreign


def break_nothing(folder: Path) -> None:
    """A folder that is fine."""


def cut_short(folder: Path) -> None:
    data = (folder / COMPACT).read_bytes()
    (folder / COMPACT).write_bytes(data[: len(data) // 2])


def without_map(folder: Path) -> None:
    save_file(load_file(folder / COMPACT), folder / COMPACT)


def without_a_weight(folder: Path) -> None:
    with safe_open(folder / COMPACT, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / COMPACT)
    del tensors["transformer.wpe.weight"]
    save_file(tensors, folder / COMPACT, metadata)


def config_is(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def changed_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_nothing, None),
        (cut_short, "is damaged"),
        (without_map, "says nothing of shared weights"),
        (without_a_weight, "transformer.wpe.weight is in one of them only"),
        (lambda folder: (folder / COMPACT).unlink(), "neither a run .* nor a compact export"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (config_is("{"), "config.json cannot be used"),
        (config_is("{}"), "config.json cannot be used"),
        (changed_config(architectures=["NoSuchModel"]), "name NoSuchModel, which transformers"),
        (changed_config(architectures=None), "name no class"),
        (changed_config(n_layer="x"), "config.json cannot be used"),
        (changed_config(n_head=7), "config.json cannot be used"),
        (
            changed_config(n_layer=2),
            r"another model: transformer.h.2\S+ is in one of them only",
        ),
        (changed_config(n_embd=64), "has shape"),
    ],
)
def test_a_broken_folder_is_one_line(damage, says, tmp_path):
    export_compact(trained("gpt2", True), tmp_path)
    damage(tmp_path)
    if says is None:
        load(tmp_path)
        return
    with pytest.raises(InputError, match=says) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for export in (export_compact, export_expanded):
        with pytest.raises(InputError, match="cannot write the export") as caught:
            export(gpt2(), tmp_path / "file" / "below")
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="cannot write the export"):
            export(gpt2(), tmp_path / "file")


# From a run, by the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_text(folder)
    config = small(folder, tokenizer="bpe:300", policy="random", eval_every=24)
    train(config)
    return config.folder


def test_a_run_is_loaded_by_its_best_weights(run):
    loaded = load(run)
    saved = load_file(run / "checkpoints" / "best" / "model.safetensors")
    assert {name: p.tolist() for name, p in loaded.named_parameters()} == {
        name: tensor.tolist() for name, tensor in saved.items()
    }
    owners = json.loads((run / "checkpoints" / "best" / "state.json").read_text())["owners"]
    assert TiedLayers(loaded).tying.owners == tuple(owners)
    assert loaded.config.use_cache, "training turns it off"


@pytest.mark.parametrize("name", ["expanded", "compact"])
def test_the_command_exports_with_the_tokenizer_and_says_the_sizes(name, run, tmp_path, capsys):
    flags = ["--format", name, "--output", str(tmp_path / name), "--export-dtype", "bf16"]
    assert main(["export", str(run), *flags]) == 0
    printed = capsys.readouterr().out
    loaded = load(run)
    unique = sum(p.numel() for p in loaded.parameters())
    file = next((tmp_path / name).glob("*.safetensors"))
    assert f"{file.stat().st_size:,} bytes" in printed and f"{unique:,} unique" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    text = "the cat sat, and <|endoftext|> 12 ran"
    ours = read_tokenizer(run / "tokenizer")
    assert tokenizer.decode(tokenizer("the old tree").input_ids) == "the old tree"
    assert tokenizer("the old tree").input_ids == ours.encode("the old tree").tolist()
    assert tokenizer(text).input_ids != [] and len(tokenizer) == ours.vocab_size
    if name == "expanded":
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = torch.tensor([ours.encode("the old tree").tolist()])
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        assert_close(again.double()(ids).logits, loaded.double()(ids).logits)


def test_what_the_command_refuses(run, tmp_path, capsys):
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert main(["export", str(run), "--output", str(run)]) == 2
    shutil.copytree(run, tmp_path / "old")
    state_file = tmp_path / "old" / "checkpoints" / "best" / "state.json"
    shutil.rmtree(state_file.parent)
    assert main(["export", str(tmp_path / "old"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "into itself" in said[1]


# The snippet in the documentation


def test_the_snippet_loads_a_compact_export_with_torch_and_safetensors_only(tmp_path):
    torch.manual_seed(0)
    model = gpt2().eval()
    TiedLayers(model).apply(Tying.from_labels("aabbab"))
    export_compact(model, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = (block for block in blocks if "def load_compact" in block)
    assert len(snippet.strip().splitlines()) <= 15
    assert set(re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)) <= {
        *("json", "torch", "safetensors"),
    }
    namespace: dict[str, object] = {}
    exec(snippet, namespace)
    fresh = gpt2().eval()
    namespace["load_compact"](fresh, tmp_path)
    x = torch.arange(8)[None]
    assert_close(fresh(x).logits, model(x).logits)
    assert len(list(fresh.parameters())) == len(list(model.parameters())), "still shared"
