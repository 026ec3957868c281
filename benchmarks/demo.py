"""Writes the demo's table and picture, which the README shows, from results/demo.json.

python benchmarks/demo.py               # from the results that are there
python benchmarks/demo.py runs/demo     # first take the results from the runs of `make demo`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from readme import README, write_between

from layer_tying.files import write_text_whole
from layer_tying.report.markdown import markdown_table
from layer_tying.report.style import CONVENTIONAL, OTHERS, STYLE

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/demo.json"
PICTURE = REPOSITORY / "docs/images/demo.png"
MARKS = "<!-- demo: written by benchmarks/demo.py -->\n", "<!-- end of demo -->\n"
TIMES = ("seconds", "seconds_per_step", "decision_overhead")  # depend on what else ran
HOPS = {"1 hop": "test_accuracy_k1", "2 hops": "test_accuracy_k2", "3 hops": "test_accuracy_k3"}
METHODS = {  # name -> in the table, in the picture, its colour
    "none": ("conventional, 6 layers", "6 layers, conventional", CONVENTIONAL),
    "plain-2": ("conventional, 2 layers", "2 layers, conventional", "#c9ced5"),
    "cycle-2": (
        "**2 layers, used three times each (`cycle-2`, 1/n)**",
        "2 layers, used three times each",
        OTHERS[0],
    ),
    "mixture-2": (
        "**6 learned mixtures of 2 layers (`mixture-2`)**",
        "6 learned mixtures of 2 layers",
        OTHERS[2],
    ),
    "dqn": (
        "the paper's agent (`dqn`), {layers:.1f} layers on average",
        "paper's agent",
        OTHERS[1],
    ),
}
Rows = dict[str, dict[str, Any]]  # the summaries, by method


def main(arguments: Sequence[str]) -> None:
    for folder in arguments:
        collect(Path(folder))
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in results["rows"]}
    write_between(README, MARKS, table_of(rows))
    draw(rows).savefig(PICTURE, dpi=160)


def collect(folder: Path) -> None:
    """Replace the results by the summaries of the demo's runs."""
    rows = []
    for method in METHODS:
        summary = json.loads((folder / method / "summary.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in summary.items() if name not in TIMES}
        rows.append({"method": method, **kept})
    result = {"command": "make demo", "note": "Times are left out.", "rows": rows}
    write_text_whole(RESULTS, json.dumps(result, indent=1) + "\n")


def table_of(rows: Rows) -> str:
    """Accuracy in per cent, by hops."""
    lines = [
        [
            title.format(layers=rows[method]["independent_layers_mean"]),
            f"{rows[method]['trainable_parameters_mean']:,.0f}",
            *(f"{100 * rows[method][name]:.1f}" for name in HOPS.values()),
        ]
        for method, (title, _, _) in METHODS.items()
    ]
    return markdown_table(["method", "parameters", *HOPS], lines)


def draw(rows: Rows) -> Figure:
    """Bars of accuracy, grouped by hops."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        width = 0.9 / len(METHODS)
        for index, (method, (_, name, colour)) in enumerate(METHODS.items()):
            parameters = rows[method]["trainable_parameters_mean"] / 1000
            accuracy = [100 * rows[method][entry] for entry in HOPS.values()]
            places = [hop + (index - (len(METHODS) - 1) / 2) * width for hop in range(len(HOPS))]
            label = f"{name} ({parameters:.0f} k)"
            bars = axes.bar(places, accuracy, 0.92 * width, color=colour, label=label)
            axes.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1)
        axes.set_xticks(range(len(HOPS)), list(HOPS))
        axes.set_ylabel("test accuracy, %")
        axes.set_ylim(0, 108)
        figure.legend(loc="outside right center", title="model (parameters)", alignment="left")
        figure.canvas.draw()
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
