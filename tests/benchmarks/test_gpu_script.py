"""benchmarks/gpu.sh with tiny numbers, on whatever device there is: all parts run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_all_parts_run_and_agree_with_the_cpu(tmp_path):
    command = [str(SCRIPT), "--tiny", "--output", str(tmp_path / "gpu.json")]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=500, env=environment)
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["measure"] for row in rows} == {"numerics", "memory", "speed", "training"}
    assert not [row["error"] for row in rows if "error" in row]
    for row in rows:
        if row["measure"] == "numerics":
            assert row["largest_loss_difference"] < 1e-3
            assert row["relative_weight_difference"] < 1e-2
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "## On a GPU" in page
