"""Golden losses: four small runs, as they were recorded once.

They guard the arithmetic of fixed seeds. Kernels differ between machines, so losses are compared
with a tolerance; tyings and rewards of a machine alike follow from them.
"""

import json
from pathlib import Path

import pytest
import torch
from small_runs import lines_of, small, write_text

from layer_tying.runs.train import train

pytestmark = pytest.mark.numerics

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
CONFIGS = {
    "gpt2-dqn": {"family": "gpt2", "policy": "dqn"},
    "llama-mixture": {"family": "llama", "policy": "mixture", "nlayers": 6, "emsize": 32},
    "bert-random": {"family": "bert", "policy": "random", "nlayers": 4},
    "vit-sequence": {
        **{"family": "vit", "policy": "sequence", "groups": 2, "dataset": "digits", "nlayers": 4}
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fixed_seed_gives_the_recorded_losses(name, tmp_path):
    if CONFIGS[name]["family"] == "vit" and torch.__version__ < "2.13":
        pytest.skip("older versions of torch draw truncated normal numbers in another way")
    write_text(tmp_path)
    config = small(tmp_path, **({"log_every": 1} | CONFIGS[name]))
    summary = train(config)
    metrics = lines_of(config.folder / "metrics.jsonl")
    decisions = lines_of(config.folder / "tying.jsonl")
    golden = GOLDEN[name]
    assert [line["loss"] for line in metrics] == pytest.approx(golden["losses"], rel=1e-3)
    assert summary["test_perplexity"] == pytest.approx(golden["test_perplexity"], rel=1e-3)
    assert summary["trainable_parameters_mean"] == golden["trainable_parameters_mean"]
    assert [line["state"] for line in decisions] == golden["owners"]
