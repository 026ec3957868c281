"""Exports of a sharded model, made by two processes, against those of one that holds it whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from many_processes import on_ranks
from safetensors.torch import load_file

from layer_tying import InputError, TiedLayers, load, shard_tied_layers
from layer_tying.core.gather import put
from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import FAMILIES, TextInput
from layer_tying.saving.export import export_compact, export_expanded


def exported(folder: Path, mixes: bool) -> int:
    """Export a GPT-2 of five layers both ways."""
    torch.manual_seed(0)
    config = transformers_config(ModelConfig("gpt2", 5, 2, 16), TextInput(19, 8))
    model = build_model(config, Tying.independent(5))
    layers = TiedLayers(model)
    if dist.get_world_size() > 1:
        shard_tied_layers(layers)
    scaled = {"residual_scaling": 1.0, "residual_outputs": FAMILIES["gpt2"].residual_outputs}
    layers = TiedLayers(model, **(scaled if mixes else {}))
    layers.apply(pattern("cycle", 5, 2))
    if mixes:
        for number, vector in enumerate(layers.mix()):
            put(vector, torch.tensor([0.5, 0.25 * (number % 5)]))
    export_compact(model, folder / "compact")
    export_expanded(model, folder / "expanded", torch.bfloat16)
    return dist.get_rank()


@pytest.mark.parametrize("mixes", [False, True])
def test_a_sharded_model_is_exported_as_one_that_is_whole(mixes, tmp_path):
    assert on_ranks(2, exported, tmp_path / "sharded", mixes) == [0, 1]
    assert on_ranks(1, exported, tmp_path / "whole", mixes) == [0]
    for name in ("compact/compact.safetensors", "expanded/model.safetensors"):
        ours, theirs = (load_file(tmp_path / way / name) for way in ("sharded", "whole"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], msg=lambda m, key=key: f"{key}: {m}")
    ids = torch.arange(8)[None]
    logits = [
        load(tmp_path / way / "compact")(input_ids=ids).logits for way in ("sharded", "whole")
    ]
    torch.testing.assert_close(*logits)


def exported_nowhere(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers_config(ModelConfig("gpt2", 2, 2, 16), TextInput(19, 8))
    model = build_model(config, Tying.independent(2))
    shard_tied_layers(TiedLayers(model))
    export_compact(model, folder / "file" / "inside")


def test_what_cannot_be_written_is_refused_on_every_process(tmp_path):
    (tmp_path / "file").touch()
    for error in on_ranks(2, exported_nowhere, tmp_path):
        assert isinstance(error, InputError) and "cannot write the export" in str(error)
