"""A run whose layers mix shared weights: trained, resumed exactly, evaluated and exported."""

import numpy as np
import pytest
import torch
from small_runs import crashed_at, lines_of, small, traces_of, write_text

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.errors import InputError
from layer_tying.runs.evaluate import evaluate_run
from layer_tying.runs.train import train
from layer_tying.saving.load import load

MIXTURE = {"policy": "mixture", "initial": "cycle", "groups": 2, "nlayers": 4, "family": "llama"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_text(folder)
    return folder


def test_a_run_of_mixtures_goes_on_exactly(folder):
    left_alone, crashed = (small(folder, exp=name, **MIXTURE) for name in ("alone", "crashed"))
    summary = train(left_alone)
    crashed_at(crashed, 17)
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(left_alone.folder)
    assert summary["independent_layers_end"] == 2
    assert len(lines_of(left_alone.folder / "tying.jsonl")) == 1, "nothing is decided"
    lines = lines_of(left_alone.folder / "metrics.jsonl")
    saved = [line["coefficients"] for line in lines if "coefficients" in line]
    assert len(saved) == sum("validation_perplexity" in line for line in lines)
    assert np.shape(saved[-1]["mlp.down_proj.weight"]) == (4, 2)


def test_it_is_evaluated_and_loaded_as_it_was_trained(folder):
    config = small(folder, exp="scored", **MIXTURE)
    summary = train(config)
    scores = evaluate_run(config.folder, "test")
    assert scores["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-6)
    layers = TiedLayers(load(config.folder))
    assert layers.mixtures is not None
    assert layers.settings.residual_scaling == 1.0
    moved = [c for c in layers.mixtures if not torch.equal(c, c.round())]
    assert moved, "the coefficients have learned"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vectors_can_be_each_layers_own(family, folder):
    vectors = ("*norm*",) if family == "llama" else ("ln_*", "*bias")
    options = {**MIXTURE, "family": family, "untied": ",".join(vectors)}
    left_alone, crashed = (
        small(folder, exp=f"{name}-{family}", **options) for name in ("own", "own-crashed")
    )
    summary = train(left_alone)
    crashed_at(crashed, 17)
    train(crashed, resume=True)
    assert traces_of(crashed.folder) == traces_of(left_alone.folder)
    layers = TiedLayers(load(left_alone.folder))
    assert layers.settings.untied == vectors
    norm = {"llama": "input_layernorm", "gpt2": "ln_1"}[family]
    own = {getattr(block, norm).weight for block in layers.stack.blocks}
    assert len(own) == 4
    scores = evaluate_run(left_alone.folder, "test")
    assert scores["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-6)


def test_a_pattern_that_matches_nothing_is_refused(folder):
    with pytest.raises(InputError, match=r"untied 'norms' is the name of nothing in"):
        train(small(folder, exp="nothing", untied="norms", **MIXTURE))


def test_uses_are_scaled_in_the_forward_pass_of_any_pattern(folder):
    fixed = {"policy": "cycle", "groups": 2, "nlayers": 4, "max_steps": 6, "every": 5}
    plain = train(small(folder, exp="plain", **fixed))
    scaled = train(small(folder, exp="scaled", residual_scaling=1.0, **fixed))
    assert scaled["test_perplexity"] != plain["test_perplexity"]
    again = evaluate_run(small(folder, exp="scaled", **fixed).folder, "test")
    assert again["perplexity"] == pytest.approx(scaled["test_perplexity"], rel=1e-6)


def test_gradients_of_the_owner_only_are_refused_before_anything_is_written(folder):
    config = small(folder, exp="owner", **MIXTURE, gradient="owner")
    with pytest.raises(InputError, match="gradient 'owner'"):
        train(config)
    assert not config.folder.exists() or not any(config.folder.glob("*.json"))
