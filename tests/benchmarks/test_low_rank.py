"""The low-rank rival: what it computes, how many parameters it has, and that it trains."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from low_rank import cut_ranks  # noqa: E402
from quality_settings import SETTINGS, command_of, methods_of  # noqa: E402

from layer_tying.runs.config import TrainConfig  # noqa: E402


def test_a_matrix_of_low_rank_is_not_changed_by_cutting_it():
    torch.manual_seed(0)
    layer = nn.ModuleDict({"map": nn.Linear(12, 20)})
    layer["map"].weight.data = torch.randn(20, 3) @ torch.randn(3, 12)
    x = torch.randn(5, 12)
    before = layer["map"](x)
    thin = copy.deepcopy(layer)
    cut_ranks([thin], share=0.4)  # rank int(0.4 * 240 / 32) = 3
    assert [tuple(p.shape) for p in thin.parameters()] == [(3, 12), (20, 3), (20,)]
    torch.testing.assert_close(thin["map"](x), before, rtol=0, atol=1e-4)


def test_a_share_of_the_parameters_stays():
    layers = [nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 192, bias=False))]
    cut_ranks(layers, share=0.25)
    assert 0.23 < sum(p.numel() for p in layers[0].parameters()) / (64 * 64 + 64 * 192) <= 0.25


def test_the_rival_trains_with_as_many_parameters_as_two_layers(tmp_path):
    setting = SETTINGS["khop"]
    flags = {**setting.flags, "max_steps": 2, "eval_batches": 1, "eval_every": 1, "batch_size": 4}
    config = TrainConfig.from_flat(
        **flags | methods_of(setting)["low-rank-2"], output_dir=str(tmp_path), exp="run", lr=1e-3
    )
    (tmp_path / "run.json").write_text(config.to_json())
    command = [*command_of(setting, "low-rank-2"), "--config", str(tmp_path / "run.json")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CI": "1"})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 100_000 < summary["trainable_parameters_end"] < 108_224  # that of plain-2
    assert summary["independent_layers_end"] == 6
