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
import os
import subprocess
import sys
import time
from pathlib import Path

from layer_tying.files import write_text_whole
from layer_tying.paper.results import (
    is_done,
    reason_of,
    reasons_so_far,
    results_of,
    write_results,
)
from layer_tying.paper.rows import recipes, runs_first
from layer_tying.report.results import results_page
from layer_tying.runs.config import TrainConfig

SCALE = "small"
MOST_PROCESSES = 2
REPOSITORY = Path(__file__).resolve().parent.parent
Rows = dict[str, TrainConfig]


def main() -> int:
    options = arguments()
    rows = recipes(SCALE, options.output_dir)
    unknown = [name for name in options.rows if name not in rows]
    if unknown:
        print(f"unknown row {unknown[0]}: see layer-tying recipe --list", file=sys.stderr)
        return 2
    chosen = options.rows or list(rows)
    waiting = [name for name in chosen if not is_done(rows[name])]
    print(f"{len(chosen)} rows, {len(chosen) - len(waiting)} of them done")
    reasons = reasons_so_far(options.results)
    write(rows, reasons, options)
    return train_rows(rows, waiting, reasons, options)


def train_rows(
    rows: Rows, waiting: list[str], reasons: dict[str, str], options: argparse.Namespace
) -> int:
    """Train what waits, each row after the one that it starts from; the exit code."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            for name in list(waiting):
                is_ready = runs_first(rows[name]) not in (*waiting, *running)
                if is_ready and len(running) < options.processes:
                    waiting.remove(name)
                    running[name] = start(name, rows[name], options)
            time.sleep(1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                failed = running.pop(name).returncode != 0
                if failed:
                    reasons[name] = reason_of(log_of(name, rows[name]), options.data_dir)
                outcome = reasons[name] if failed else "done"
                print(f"{name}: {outcome}; {len(waiting)} left", flush=True)
                write(rows, reasons, options)
    except KeyboardInterrupt:  # the rows got it too
        for process in running.values():
            process.wait()
        return 130
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


def start(name: str, row: TrainConfig, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Train a row in a process of one thread, from where it stopped if it did."""
    command = [sys.executable, "-m", "layer_tying", "recipe", name, "--scale", SCALE]
    command += ["--output-dir", options.output_dir]
    for flag, value in (("--data-dir", options.data_dir), ("--max-steps", options.max_steps)):
        command += [flag, str(value)] if value else []
    if any(row.folder.glob("checkpoints/step-*")):
        command.append("--resume")
    elif (row.folder / "config.json").exists():
        command.append("--overwrite")  # it was stopped before it saved anything
    log_of(name, row).parent.mkdir(parents=True, exist_ok=True)
    with log_of(name, row).open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def log_of(name: str, row: TrainConfig) -> Path:
    return row.folder.with_name(f"{name}.log")


def write(rows: Rows, reasons: dict[str, str], options: argparse.Namespace) -> None:
    """The results so far: of every row that is done, whether it was chosen this time or not."""
    results = results_of(rows, reasons, SCALE)
    write_results(options.results, results)
    write_text_whole(options.page, results_page(results))


if __name__ == "__main__":
    sys.exit(main())
