"""A benchmark of sharing where depth pays: quality against parameters, time and memory.

In a setting (see `quality_settings.py`) all methods train on the same data in the same order for
the same steps; only what is shared differs. Conventional training of all layers, of as few as the
shared ones have parameters, and the learned mixture have three learning rates each (or more, where
the best is at an end; one where a method makes no errors), chosen on validation; the other methods
have the mixture's. The page lists the rates that its rows have. Test figures are only reported.

Runs are resumed where they stopped, and a run whose row is in the results is left alone. After
every run the results are written, so that what was done counts when it is stopped; docs/quality.md
and its pictures follow at the end.

    python benchmarks/quality.py                      # a day or two of one thread: see the page
    python benchmarks/quality.py --settings khop --methods plain-6 plain-2 mixture-2
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import QUICK
from quality_page import write_page
from quality_rows import NAMES, Run, best_rate, row_of, with_step_seconds
from quality_settings import (
    SETTINGS,
    Setting,
    by_default,
    claimed,
    command_of,
    methods_of,
    tuned,
)

from layer_tying.errors import InputError
from layer_tying.files import write_text_whole
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.interrupt import INTERRUPTED
from layer_tying.runs.processes import Ended, Job, train_all

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/quality.json"


def main() -> int:
    options = arguments()
    try:
        for name in options.settings:
            benchmark(name, SETTINGS[name], options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:  # a text that is not there, or a run that failed
        print(error, file=sys.stderr)
        return 2
    finally:
        is_committed = options.results.resolve() == RESULTS
        folder = REPOSITORY / "docs" if is_committed else options.results.parent
        write_page(with_step_seconds(rows_so_far(options.results)), folder)
    return 0


def benchmark(name: str, setting: Setting, options: argparse.Namespace) -> None:
    """Everything of a setting, what tells most first: a stop leaves the most."""
    chosen = options.methods or by_default(setting)
    first, *others = options.seeds
    middle = options.rates[0] if options.rates else setting.rates[1]
    rates = options.rates or setting.rates

    def these(methods: Iterable[str]) -> list[str]:
        return [method for method in methods if method in chosen]

    def train(methods: Iterable[str], rates: Sequence[float], seeds: Sequence[int]) -> None:
        runs = [(name, m, rate, seed) for seed in seeds for rate in rates for m in these(methods)]
        train_runs(runs, options)

    def rate_of(method: str) -> float:
        rows = rows_so_far(options.results)
        source = method if method in tuned(setting) else f"mixture-{setting.sets[0]}"
        return best_rate(rows, name, source) or middle

    train(claimed(setting), [middle], [first])
    train(tuned(setting), rates, [first])
    for method in these(methods_of(setting)):
        train([method], [rate_of(method)], [first])
    for method in these(claimed(setting)):
        train([method], [rate_of(method)], others)


def train_runs(runs: Iterable[Run], options: argparse.Namespace) -> None:
    """Train what is not done yet, several at a time."""
    known = {tuple(row[name] for name in NAMES) for row in rows_so_far(options.results)}
    left = {slug(run): run for run in runs if run not in known}
    for name in {run[0] for run in left.values()}:
        cut, folder = SETTINGS[name].cut, options.folder / "data" / name
        if cut and not (folder / "test.txt").exists():
            cut(folder)

    def on_end(job: Job, ended: Ended) -> None:
        if ended.code not in (0, INTERRUPTED):
            raise InputError(f"{job.name}: {ended.reason}")
        if not ended.code:
            report(left[job.name], job, options)

    jobs = [
        Job(config_of(run, options), name, command=command_of(SETTINGS[run[0]], run[1]))
        for name, run in left.items()
    ]
    logs = options.folder / "logs"
    train_all(jobs, options.processes, options.threads, on_end=on_end, resume=True, logs=logs)


def report(run: Run, job: Job, options: argparse.Namespace) -> None:
    """Add the row of a run that has ended to the results."""
    rows = rows_so_far(options.results)
    rows.append(row_of(run, job.config.folder))
    print(job.name, f"{rows[-1]['validation_perplexity']:.4f}", flush=True)
    shutil.rmtree(job.config.folder / "checkpoints", ignore_errors=True)
    result = {"command": "python benchmarks/quality.py", "rows": rows}
    write_text_whole(options.results, json.dumps(result, indent=1) + "\n")


def config_of(run: Run, options: argparse.Namespace) -> TrainConfig:
    name, method, rate, seed = run
    setting = SETTINGS[name]
    flags: dict[str, Any] = {"exp": slug(run), "output_dir": str(options.folder)}
    flags |= {**setting.flags, **methods_of(setting)[method], "lr": rate, "seed": seed}
    if setting.cut:
        flags["dataset"] = str(options.folder / "data" / name)
    if options.max_steps:
        flags |= {"max_steps": options.max_steps, "eval_every": options.max_steps}
    return TrainConfig.from_flat(**flags)


def slug(run: Run) -> str:
    """A run's folder within that of all runs, such as wiki2-bytes/mixture-3-0.002-0."""
    name, method, rate, seed = run
    return f"{name}/{method.replace(', ', '-').replace('/', '')}-{rate:g}-{seed}"


def rows_so_far(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; they may be of several machines."""
    if not path.exists():
        return []
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = list(dict.fromkeys(m for setting in SETTINGS.values() for m in methods_of(setting)))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=every,
        help="default: all in the first setting, in others what is claimed",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="to choose from, in every setting")
    trial = f"to try it out: all of it goes to {QUICK}"
    parser.add_argument("--max-steps", type=int, help=trial)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/quality)")
    parser.add_argument("--results", type=Path, help="default: the committed ones")
    options = parser.parse_args()
    place, results = Path("runs"), RESULTS
    if options.max_steps:
        place, results = QUICK, QUICK / RESULTS.name
    options.folder = options.folder or place / "quality"
    options.results = options.results or results
    options.results.parent.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
