"""Compact exports in 8 bits: how far weights are from those that were exported, and their size."""

import pytest
import torch
from built_models import SOME_TIED, trained
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import gpt2, loss_of

from layer_tying import (
    DynamicTying,
    InputError,
    TiedLayers,
    export_compact,
    export_expanded,
    load,
    tie,
)
from layer_tying.saving.export import COMPACT
from layer_tying.saving.int8 import with_scales, without_scales

NUMBERS = st.floats(-1e4, 1e4, width=32)


@given(st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_weight_is_off_by_half_a_step_of_its_row_at_most(rows):
    weight = torch.tensor(rows).view(len(rows), 2, 3)
    stored = with_scales("w", weight)
    assert stored["w"].dtype == torch.int8 and stored["w"].shape == weight.shape
    step = weight.flatten(1).abs().amax(1) / 127
    off = (without_scales(stored)["w"] - weight).flatten(1).abs().amax(1)
    assert (off <= 0.5001 * step + 1e-37).all()


def test_vectors_and_integers_stay_as_they_are():
    for tensor in (torch.randn(5), torch.randn(5, 1), torch.tensor(1.0), torch.ones(2, 3).long()):
        stored = with_scales("w", tensor)
        assert stored.keys() == {"w"} and torch.equal(without_scales(stored)["w"], tensor)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_a_loaded_model_is_shared_and_near_and_a_quarter_of_the_size(kind, tmp_path):
    model = trained(kind, kind == "gpt2")
    export_compact(model, tmp_path / "whole")
    export_compact(model, tmp_path / "int8", torch.int8)
    loaded = load(tmp_path / "int8")
    assert TiedLayers(loaded).tying == SOME_TIED
    assert loaded.dtype == torch.float32 and loaded.config.dtype == torch.float32
    for name, parameter in model.named_parameters():
        steps = parameter.detach().abs().max() / 127.5
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=float(steps))
    files = {name: load_file(tmp_path / name / COMPACT) for name in ("whole", "int8")}
    data = {name: sum(t.nbytes for t in file.values()) for name, file in files.items()}
    scales = sum(4 * len(p) for p in model.parameters() if p.numel() > len(p))
    vectors = sum(p.nbytes for p in model.parameters() if p.numel() == len(p))
    assert data["int8"] == (data["whole"] - vectors) // 4 + vectors + scales


def test_a_model_in_half_precision_is_loaded_in_float32(tmp_path):
    """The scales are, and a layer whose vectors had another type would not compute."""
    model = gpt2()
    tie(model, "cycle", 2)
    export_compact(model.bfloat16(), tmp_path, torch.int8)
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loss_of(loaded).isfinite()


def test_mixtures_are_loaded_near_and_train_on(tmp_path):
    torch.manual_seed(0)
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tying = DynamicTying(model, optimizer, max_independent=2)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        tying.step()
    export_compact(model, tmp_path, torch.int8)
    loaded = load(tmp_path)
    assert loss_of(loaded).item() == pytest.approx(loss_of(model).item(), rel=1e-2)
    loss_of(loaded).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_an_expanded_export_in_8_bits_is_refused(tmp_path):
    with pytest.raises(InputError, match="compact exports only"):
        export_expanded(gpt2(), tmp_path, torch.int8)
