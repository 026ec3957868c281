"""Size and quality of compact exports, by the type of the stored weights.

    python benchmarks/exports.py runs/small/gpt2-subwords-*
    layer-tying compress runs/compress/bert --layers 4 --steps 500 --lr 2e-3 --data wiki2 \\
        --output bert-4-layers
    python benchmarks/exports.py bert-4-layers --data-of runs/compress/bert

Results go to benchmarks/results/exports.json, and docs/performance.md is written anew.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import RESULTS, Case, rows_so_far, write_results
from performance_page import write_page
from transformers import PreTrainedModel

from layer_tying.runs.config import read_config
from layer_tying.runs.tasks import task_of
from layer_tying.saving.export import DTYPES
from layer_tying.saving.export_run import export_run
from layer_tying.saving.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="runs, or compressed models")
    parser.add_argument("--data-of", type=Path, help="the run that a compressed model was")
    parser.add_argument("--data-dir", help="where local data sets lie (else $LAYER_TYING_DATA)")
    parser.add_argument("--output", type=Path, default=RESULTS / "exports.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = {model.name for model in options.models}
    rows = [row for row in rows_so_far(options.output) if row["run"] not in names]
    for model in options.models:
        rows += measure(model, options.data_of or model, options.data_dir)
        write_results(options.output, rows)
    print(write_page(options.output.parent))


def measure(source: Path, run: Path, data_dir: str | None) -> list[Case]:
    """A row for each type: bytes of the file, and the test perplexity of what is loaded from it.

    Args:
        source: a run, or an export.
        run: whose data it is scored on.
        data_dir: where local data sets lie.
    """
    config = read_config(run)
    task = task_of(config.replace(data_dir=data_dir) if data_dir else config, run)
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            export = export_run(source, Path(folder), "compact", dtype)
            model = load(folder).float()
        assert isinstance(model, PreTrainedModel)  # as all that runs train
        with torch.no_grad():
            perplexity = task.scores(model, "test")["perplexity"]
        rows.append(
            {
                "run": source.name,
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
