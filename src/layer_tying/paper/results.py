"""The results file of the paper's rows: the figures of each finished run, and how to repeat it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layer_tying.data.sources import ENVIRONMENT
from layer_tying.files import write_text_whole
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.reading import has_ended, read_run

# Settings of one machine, and what was settled from them.
LEFT_OUT = ("data_dir", "output_dir", "source", "settled", "tyings")


def results_of(
    rows: Mapping[int, Mapping[str, TrainConfig]], reasons: Mapping[str, str], scale: str
) -> dict[str, Any]:
    """The results so far: every finished row, and why the others that were tried failed.

    Args:
        rows: of each seed, by name.
        reasons: why a row could not be run, by name.
        scale: of all rows.
    """
    done = [
        entry(name, row, scale, seed)
        for seed, of_seed in rows.items()
        for name, row in of_seed.items()
        if has_ended(row.folder)
    ]
    names = {each["row"] for each in done}
    not_run = {name: reason for name, reason in reasons.items() if name not in names}
    return {"scale": scale, "rows": done, "not_run": not_run}


def with_earlier(results: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The results, and the rows of an earlier file whose runs are not here: all in one order.

    A run of fewer steps, such as one to try a row out, does not replace the row.

    Args:
        results: as ``results_of`` makes them.
        path: the earlier file, if there is one.
    """
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for row in (*earlier, *results["rows"]):
        known = rows.setdefault((row["seed"], row["row"]), row)
        if row["summary"].get("steps", 0) >= known["summary"].get("steps", 0):
            rows[row["seed"], row["row"]] = row
    not_run = {n: why for n, why in results["not_run"].items() if n not in {n for _, n in rows}}
    return {**results, "rows": [rows[key] for key in sorted(rows)], "not_run": not_run}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results file, whole or not at all."""
    write_text_whole(path, json.dumps(results, indent=1) + "\n")


def reasons_so_far(path: Path) -> dict[str, str]:
    """Why rows could not be run earlier, by their names."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["not_run"]


def entry(name: str, row: TrainConfig, scale: str, seed: int) -> dict[str, Any]:
    """A finished row's figures, with all that it takes to measure them again."""
    run = read_run(row.folder)
    summary = dict(run.summary or {})
    settings = {key: value for key, value in run.settings.items() if key not in LEFT_OUT}
    asked = row.optimization.max_steps
    command = f"OMP_NUM_THREADS=1 layer-tying recipe {name} --scale {scale}"
    if seed:
        command += f" --seed {seed}"
    if "max_steps" not in run.setting("settled", ()) and settings["max_steps"] != asked:
        command += f" --max-steps {settings['max_steps']}"
    return {
        "row": name,
        "command": command,
        "seed": seed,
        "versions": summary.pop("versions"),
        "hardware": summary.pop("hardware"),
        "config": settings,
        "summary": summary,
    }


def without_place(reason: str, data_dir: str | None) -> str:
    """Why a row failed, without this machine's data folder."""
    folder = data_dir or os.environ.get(ENVIRONMENT)
    return reason.replace(folder, f"${ENVIRONMENT}") if folder else reason
