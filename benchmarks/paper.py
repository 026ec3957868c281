"""Every row of the paper at small scale: trains what is not done yet, and writes the results.

A finished row is left alone; one that was stopped goes on from its newest checkpoint. At most two
rows train at once, one thread each. After every row benchmarks/results/paper-small.json
and docs/results.md are written anew, so that what was done counts when it is stopped (Ctrl-C
lets the running rows save).

    python benchmarks/paper.py
    python benchmarks/paper.py --rows gpt2-wiki2-conventional gpt2-wiki2-dynamic

A row takes one to three minutes on a CPU thread that nothing else is using: all 31 take about half
an hour on two such cores, an hour on one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from layer_tying.errors import InputError
from layer_tying.files import write_text_whole
from layer_tying.paper.reproduce import as_asked, jobs_of, train_rows
from layer_tying.paper.results import (
    is_done,
    reasons_so_far,
    results_of,
    without_place,
    write_results,
)
from layer_tying.paper.rows import recipes
from layer_tying.report.results import results_page
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.processes import Ended, Job

SCALE = "small"
MOST_PROCESSES = 2
INTERRUPTED = 130  # exit code
REPOSITORY = Path(__file__).resolve().parent.parent
Rows = dict[str, TrainConfig]


def main() -> int:
    options = arguments()
    rows = recipes(SCALE, options.output_dir)
    asked = {name: as_asked(row, options.data_dir, options.max_steps) for name, row in rows.items()}
    reasons = reasons_so_far(options.results)

    def on_end(job: Job, ended: Ended) -> None:
        if ended.code == INTERRUPTED:
            return
        if ended.code:
            reasons[job.name] = without_place(ended.reason, options.data_dir)
        print(f"{job.name}: {reasons[job.name] if ended.code else 'done'}", flush=True)
        write(rows, reasons, options)

    try:
        jobs = jobs_of(asked, options.rows or list(rows))
        print(f"{len(jobs)} rows, {sum(is_done(job.config) for job in jobs)} of them done")
        write(rows, reasons, options)
        train_rows(jobs, options.processes, Path(options.output_dir), on_end)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--output-dir", default=f"runs/{SCALE}", help="where the runs lie")
    parser.add_argument("--data-dir", help="where local data sets lie (else $LAYER_TYING_DATA)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=MOST_PROCESSES)
    parser.add_argument("--max-steps", type=int, help="of every row, to try them out")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / f"benchmarks/results/paper-{SCALE}.json"
    )
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs/results.md")
    return parser.parse_args()


def write(rows: Rows, reasons: dict[str, str], options: argparse.Namespace) -> None:
    """The results so far: of every row that is done, whether it was chosen this time or not."""
    results = results_of(rows, reasons, SCALE)
    write_results(options.results, results)
    write_text_whole(options.page, results_page(results))


if __name__ == "__main__":
    sys.exit(main())
