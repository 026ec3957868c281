"""The benchmark of exports, on a run that takes seconds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from exports import measure
from performance_tables import exports_table
from small_runs import small, write_text

from layer_tying.runs.train import train
from layer_tying.saving.export_run import export_run


def test_each_type_is_measured_on_what_is_loaded(tmp_path):
    write_text(tmp_path)
    run = tmp_path / "runs" / "one"
    train(small(tmp_path, exp="one", policy="cycle", groups=2, max_steps=12))
    rows = {row["dtype"]: row for row in measure(run, run, None)}
    summary = json.loads((run / "summary.json").read_text())
    assert rows["fp32"]["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-5)
    assert rows["int8"]["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-2)
    assert rows["int8"]["perplexity"] != rows["fp32"]["perplexity"]
    assert rows["int8"]["bytes"] < rows["bf16"]["bytes"] < rows["fp32"]["bytes"]
    again = tmp_path / "again"
    export_run(run, again, "compact")
    (fp32, *_) = measure(again, run, None)
    assert fp32 == rows["fp32"] | {"run": "again"}
    assert "| `one` |" in exports_table([*rows.values()])
