"""Every row of the paper at small scale: trains what is not done yet, and writes the results.

A row whose summary is there is left alone; one that stopped goes on from its newest checkpoint. At
most two rows train at once, one thread each. After every row benchmarks/results/paper-small.json
and docs/results.md are written anew, so that what was done counts when it is stopped (Ctrl-C
lets the running rows save).

    python benchmarks/paper.py
    python benchmarks/paper.py --rows gpt2-wiki2-conventional gpt2-wiki2-dynamic

A row takes one to three minutes on a CPU thread that nothing else is using: all 31 take about half
an hour on two such cores, an hour on one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from layer_tying.data.sources import ENVIRONMENT
from layer_tying.paper.rows import recipes
from layer_tying.report.results import results_page
from layer_tying.runs.config import TrainConfig

SCALE = "small"
MOST_PROCESSES = 2
REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    options = arguments()
    rows = recipes(SCALE, options.output_dir)
    unknown = [name for name in options.rows if name not in rows]
    if unknown:
        print(f"unknown row {unknown[0]}: see layer-tying recipe --list", file=sys.stderr)
        return 2
    chosen = {name: rows[name] for name in options.rows or rows}
    waiting = [name for name in chosen if not is_done(rows[name])]
    print(f"{len(chosen)} rows, {len(chosen) - len(waiting)} of them done")
    reasons = reasons_so_far(options.results)
    running: dict[str, subprocess.Popen[bytes]] = {}
    write(rows, reasons, options)
    try:
        while waiting or running:
            for name in [name for name in waiting if is_ready(rows[name], [*waiting, *running])]:
                if len(running) < options.processes:
                    waiting.remove(name)
                    running[name] = start(rows[name], options)
            time.sleep(1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                failed = running.pop(name).returncode != 0
                if failed:
                    reasons[name] = last_line(log_of(rows[name]), options.data_dir)
                outcome = reasons[name] if failed else "done"
                print(f"{name}: {outcome}; {len(waiting)} left", flush=True)
                write(rows, reasons, options)
    except KeyboardInterrupt:  # the rows got it too
        for process in running.values():
            process.wait()
        return 130
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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


def is_done(row: TrainConfig) -> bool:
    return (row.folder / "summary.json").exists()


def is_ready(row: TrainConfig, unfinished: list[str]) -> bool:
    """Whether the run that a row starts from is not still to come."""
    return row.source is None or Path(row.source).name not in unfinished


def start(row: TrainConfig, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Train a row in a process of one thread, from where it stopped if it did."""
    command = [sys.executable, "-m", "layer_tying", "recipe", row.exp, "--scale", SCALE]
    command += ["--output-dir", options.output_dir]
    for flag, value in (("--data-dir", options.data_dir), ("--max-steps", options.max_steps)):
        command += [flag, str(value)] if value else []
    if any(row.folder.glob("checkpoints/step-*")):
        command.append("--resume")
    elif (row.folder / "config.json").exists():
        command.append("--overwrite")  # it was stopped before it saved anything
    log_of(row).parent.mkdir(parents=True, exist_ok=True)
    with log_of(row).open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def log_of(row: TrainConfig) -> Path:
    return row.folder.with_name(f"{row.exp}.log")


def last_line(log: Path, data_dir: str | None) -> str:
    """What a row that ended in an error said, without this machine's places."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1].removeprefix("layer-tying: ") if lines else "no output"
    folder = data_dir or os.environ.get(ENVIRONMENT)
    return reason.replace(folder, f"${ENVIRONMENT}") if folder else reason


def write(
    rows: dict[str, TrainConfig], reasons: dict[str, str], options: argparse.Namespace
) -> None:
    """The results so far: of every row that is done, whether it was chosen this time or not."""
    entries = [entry(row) for row in rows.values() if is_done(row)]
    not_run = {name: reason for name, reason in reasons.items() if not is_done(rows[name])}
    results = {"scale": SCALE, "rows": entries, "not_run": not_run}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(results_page(results), encoding="utf-8")


def reasons_so_far(results: Path) -> dict[str, str]:
    """Why rows could not run when it was tried before."""
    if not results.exists():
        return {}
    return json.loads(results.read_text(encoding="utf-8"))["not_run"]


def entry(row: TrainConfig) -> dict[str, Any]:
    """A row's figures, with all that it takes to make them again."""
    summary = json.loads((row.folder / "summary.json").read_text(encoding="utf-8"))
    hardware = summary.pop("hardware") | {"processor": processor()}
    config = json.loads((row.folder / "config.json").read_text(encoding="utf-8"))
    for place in ("data_dir", "output_dir", "source"):
        config.pop(place)
    command = f"OMP_NUM_THREADS=1 layer-tying recipe {row.exp} --scale {SCALE}"
    if config["max_steps"] != row.max_steps:
        command += f" --max-steps {config['max_steps']}"
    return {
        "row": row.exp,
        "command": command,
        "seed": summary["seed"],
        "versions": summary.pop("versions"),
        "hardware": hardware,
        "config": config,
        "summary": summary,
    }


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
