"""Size and quality of a run's compact exports, by the type of the stored weights.

    python benchmarks/exports.py runs/small/gpt2-subwords-*

Results go to benchmarks/results/exports.json, and docs/performance.md is written anew.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import RESULTS, Case, write_results
from performance_page import write_page
from transformers import PreTrainedModel

from layer_tying.runs.config import read_config
from layer_tying.runs.tasks import task_of
from layer_tying.saving.export import DTYPES
from layer_tying.saving.export_run import export_run
from layer_tying.saving.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="where local data sets lie (else $LAYER_TYING_DATA)")
    parser.add_argument("--output", type=Path, default=RESULTS / "exports.json")
    options = parser.parse_args()
    rows = [row for run in options.runs for row in measure(run, options.data_dir)]
    write_results(options.output, rows)
    print(write_page(options.output.parent))


def measure(run: Path, data_dir: str | None) -> list[Case]:
    """A row for each type: bytes of the file, and the test perplexity of what is loaded from it."""
    config = read_config(run)
    task = task_of(config.replace(data_dir=data_dir) if data_dir else config, run)
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            export = export_run(run, Path(folder), "compact", dtype)
            model = load(folder).float()
        assert isinstance(model, PreTrainedModel)  # as all that runs train
        with torch.no_grad():
            perplexity = task.scores(model, "test")["perplexity"]
        rows.append(
            {
                "run": run.name,
                "dtype": dtype,
                "bytes": export.num_bytes,
                "parameters": export.num_unique,
                "independent_layers": export.tying.num_independent,
                "perplexity": perplexity,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
