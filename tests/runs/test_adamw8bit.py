"""Moments in 8 bits: optional, smaller, kept in step with the tying, and saved."""

import sys

import pytest
from small_runs import lines_of, small, traces_of, write_text

from layer_tying.errors import InputError
from layer_tying.runs.train import train


def test_without_bitsandbytes_it_is_refused_in_one_line(tmp_path, monkeypatch):
    write_text(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match="adamw8bit needs bitsandbytes, pip install") as error:
        train(small(tmp_path, optimizer="adamw8bit"))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with moments of 32 and of 8 bits, of layers large enough to be quantised."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    configs = {
        optimizer: small(folder, exp=optimizer, optimizer=optimizer, emsize=128, log_every=1)
        for optimizer in ("adamw", "adamw8bit")
    }
    for config in configs.values():
        train(config)
    return configs


def test_they_take_a_quarter_of_the_memory_whatever_the_tying(runs):
    full, small_ones = (lines_of(c.folder / "metrics.jsonl") for c in runs.values())
    assert len({line["independent_layers"] for line in small_ones}) > 1
    for one, other in zip(full, small_ones, strict=True):
        if one["independent_layers"] == other["independent_layers"]:
            assert other["optimizer_state_bytes"] < 0.3 * one["optimizer_state_bytes"]
            assert other["parameter_bytes"] == one["parameter_bytes"]


def test_they_learn_about_as_well(runs):
    losses = [lines_of(c.folder / "metrics.jsonl")[-1]["loss"] for c in runs.values()]
    first = lines_of(runs["adamw"].folder / "metrics.jsonl")[0]["loss"]
    assert losses[1] < first - 0.5
    assert losses[1] == pytest.approx(losses[0], abs=0.3)


def test_a_run_with_them_goes_on_exactly(runs, tmp_path):
    write_text(tmp_path)
    whole = runs["adamw8bit"]
    folder = {"output_dir": str(tmp_path / "runs"), "dataset": str(tmp_path / "text.txt")}
    config = whole.replace(**folder)
    train(config)
    for file in (config.folder / "checkpoints").glob("step-00000024*/*"):
        file.unlink()  # so that it goes on from step 18
    train(config, resume=True)
    assert traces_of(config.folder) == traces_of(whole.folder)
