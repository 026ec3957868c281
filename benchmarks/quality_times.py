"""Seconds of a training step of the methods that are compared against time, taken in turns.

The runs of the benchmark take days beside other work, so that their own times cannot be compared.
Here the methods of a setting take turns, with nothing else on the machine; the fastest hundred
steps of each count. Results: `benchmarks/results/quality-times.json`; `quality.py` makes the page.

    python benchmarks/quality_times.py --settings wiki2-bytes
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

from common import full_environment
from quality import REPOSITORY, RESULTS, config_of, rows_so_far
from quality_page import write_page
from quality_rows import TIMES, with_step_seconds
from quality_settings import SETTINGS, timed

from layer_tying.files import write_text_whole
from layer_tying.runs.processes import Job, train_all

STEPS, LOGGED, ROUNDS = 300, 100, 3


def main() -> None:
    """Measure, write the results, and make the page again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measurable = [name for name, setting in SETTINGS.items() if not setting.accuracy]
    parser.add_argument("--settings", nargs="+", choices=measurable, default=measurable)
    options = parser.parse_args()
    times = json.loads(TIMES.read_text(encoding="utf-8"))["seconds"] if TIMES.exists() else {}
    for name in options.settings:
        times[name] = measure(name)
        result = {
            "command": f"python benchmarks/quality_times.py --settings {name}",
            "environment": full_environment(),
            "seconds": times,
        }
        write_text_whole(TIMES, json.dumps(result, indent=1) + "\n")
        print(name, times[name], flush=True)
    write_page(with_step_seconds(rows_so_far(RESULTS)), REPOSITORY / "docs")


def measure(name: str) -> dict[str, float]:
    """Seconds of a step of each method of a setting."""
    setting = SETTINGS[name]
    found: dict[str, list[float]] = {method: [] for method in timed(setting)}
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(folder=Path(folder), max_steps=STEPS)
        if setting.cut:
            setting.cut(options.folder / "data" / name)
        for turn in range(ROUNDS):
            for method, each in found.items():
                config = config_of((name, method, setting.rates[1], turn), options)
                config = config.replace(eval_batches=1, log_every=LOGGED)
                train_all([Job(config, method)], threads=1, logs=options.folder / "logs")
                each.extend(_of_each_hundred(config.folder))
    return {method: round(min(seconds) / LOGGED, 5) for method, seconds in found.items()}


def _of_each_hundred(folder: Path) -> list[float]:
    """Seconds between the lines of a run's log, but those until the first, which warm up."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    at = [line["seconds"] for line in map(json.loads, lines) if "loss" in line]
    return [later - earlier for earlier, later in pairwise(at)]


if __name__ == "__main__":
    main()
