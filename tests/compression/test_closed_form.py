"""The best mixtures, against numpy's singular value decomposition of the weighted matrices."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import gpt2, llama, tokens

from layer_tying import InputError, TiedLayers, pattern
from layer_tying.compression.closed_form import (
    _second_moments,
    best_mixtures,
    start_from_closed_form,
)
from layer_tying.compression.outcome import outcome_of
from layer_tying.compression.settings import HealingSettings
from layer_tying.core.find import find_layers

BATCHES = [{"input_ids": tokens(4)}]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_no_mixtures_of_so_many_sets_are_nearer(number, is_weighted):
    torch.manual_seed(0)
    matrices = [torch.randn(4, 6, dtype=torch.float64) for _ in range(5)]
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([9, 1, 1, 1, 1, 0.1]).double()
    moment = x.T @ x if is_weighted else None
    coefficients, sets = best_mixtures(matrices, number, moment)
    root = np.linalg.cholesky(moment.numpy()) if is_weighted else np.eye(6)
    flat = np.stack([(w.numpy() @ root).ravel() for w in matrices])
    singular = np.linalg.svd(flat, compute_uv=False)
    mixed = torch.einsum("lm,moi->loi", coefficients, torch.stack(sets))
    error = sum(np.sum(((w - m).numpy() @ root) ** 2) for w, m in zip(matrices, mixed, strict=True))
    assert error == pytest.approx(np.sum(singular[number:] ** 2), rel=1e-6, abs=1e-9)
    lengths = coefficients.norm(dim=0)
    torch.testing.assert_close(lengths, torch.full_like(lengths, (5 / number) ** 0.5))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_with_as_many_sets_as_layers_nothing_is_lost(make):
    """Weights stored as [in, out] and as [out, in]; norms are equal at the start."""
    torch.manual_seed(0)
    teacher = make().eval()
    student = copy.deepcopy(teacher)
    layers = TiedLayers(student)
    layers.mix()
    start_from_closed_form(layers, find_layers(teacher), BATCHES, outcome_of)
    with torch.no_grad():
        found, wanted = student(tokens(4)).logits, teacher(tokens(4)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_second_moments_are_those_of_what_a_map_reads():
    torch.manual_seed(0)
    model = gpt2(num_layers=2).eval()
    seen = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = _second_moments(find_layers(model), BATCHES, outcome_of)["attn.c_attn.weight"]
    x = torch.cat([each.detach().reshape(-1, 16) for each in seen])
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-4)


def test_fewer_sets_than_layers_are_the_mixtures_of_all_layers():
    torch.manual_seed(0)
    teacher = gpt2().eval()
    student = copy.deepcopy(teacher)
    layers = TiedLayers(student)
    layers.apply(pattern("cycle", 6, 2))
    layers.mix()
    start_from_closed_form(layers, find_layers(teacher), BATCHES, outcome_of)
    name = "mlp.c_fc.weight"
    matrices = [layer.mlp.c_fc.weight.detach().T for layer in teacher.transformer.h]
    moment = _second_moments(find_layers(teacher), BATCHES, outcome_of)[name]
    coefficients, sets = best_mixtures(matrices, 2, moment)
    for layer, block in enumerate(student.transformer.h):
        mixed = sum(coefficients[layer, m] * sets[m] for m in range(2)).T
        torch.testing.assert_close(block.mlp.c_fc.weight.detach(), mixed, rtol=1e-4, atol=1e-6)


def test_it_is_for_mixtures_only():
    with pytest.raises(InputError, match="closed-form"):
        HealingSettings(sharing="tied", start="closed-form")
