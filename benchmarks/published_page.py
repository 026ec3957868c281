"""The page on the published code, from the results of `published.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from common import mean_and_spread
from matplotlib.figure import Figure

from layer_tying.files import write_text_whole
from layer_tying.report.markdown import markdown_table
from layer_tying.report.style import ACCENT, CONVENTIONAL, OTHERS, STYLE, WIDE

RESULTS = Path(__file__).resolve().parent / "results"
PUBLISHED, OURS, UNTIED = SIDES = ("published", "layer-tying", "untied")
ABOUT = {
    PUBLISHED: ("published code", OTHERS[1]),
    OURS: ("`layer-tying`, the paper's agent", ACCENT),
    UNTIED: ("without tying", CONVENTIONAL),
}
STEPS_OF_A_DECISION = 4
MEANS_OF = 20  # decisions, which the picture shows as one point
HOW = (
    "The published training loop, agent and model (tamirdh/Dynamic-Layer-Tying, commit {commit}) "
    "run as they are on the bytes of WikiText-2; only the loading of the data is ours. Its "
    "evaluations are given a part of the validation split, which takes the place of the test split "
    "from which it picks its best model. The model is its own: {layers} layers x {width}, no "
    "dropout, {steps:,} steps of {batch} x {length} bytes, a learning rate of {lr:g} that was not "
    "tuned, and a decision every four steps. `DynamicTying` and the model without tying train the "
    "same model class with the same optimizer, clipping, number of steps and seeds. The published "
    "agent decides about one layer at a time, ours about all of them. After each decision we count "
    "*claimed* independent layers, which are those that own themselves in the state that the agent "
    "sees, and *real* ones, which are the distinct sets of storages that the layers have. "
    "Perplexities are those of the last weights, on 200,000 bytes of the test split. *State* is "
    "distinct weights, one gradient for each trainable parameter, and all that the optimizer "
    "keeps. The resident set includes the libraries. "
    "`python benchmarks/published.py PATH_TO_THE_CHECKOUT` repeats it and writes this page from "
    "`benchmarks/results/published.json`."
)
WHY = (
    "The cause is one line. To tie a layer, the published code points its parameters at another "
    "layer's storage (`modified.data = copied.data`); to untie it, it only sets `requires_grad` "
    "and never makes a copy. So the number of distinct storages can fall but not rise, while the "
    "state goes on counting layers as independent. Layers that are called independent are then "
    "trained by several optimizer states on the same memory."
)
Row = dict[str, Any]
Groups = dict[str, list[Row]]


def write_page(folder: Path = RESULTS) -> Path:
    """The page of a folder of results: in docs/ for the committed ones, else next to them."""
    place = RESULTS.parent.parent / "docs" if folder.resolve() == RESULTS else folder
    groups = groups_of(folder / "published.json")
    (place / "images").mkdir(parents=True, exist_ok=True)
    _drawn(groups).savefig(place / "images" / "published.png", dpi=160)
    write_text_whole(place / "published.md", published_page(groups))
    return place / "published.md"


def groups_of(results: Path) -> Groups:
    """The runs of a file of results, by side; of seeds that all sides have."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if "error" not in row]
    seeds = [{r["seed"] for r in rows if r["side"] == side} for side in SIDES]
    whole = set.intersection(*seeds)
    return {s: [r for r in rows if r["side"] == s and r["seed"] in whole] for s in SIDES}


def published_page(groups: Groups) -> str:
    """Markdown of what was measured."""
    first = groups[PUBLISHED][0]
    steps = len(first["claimed"]) * STEPS_OF_A_DECISION
    how = HOW.format(**{**first, "steps": steps, "commit": first["published_commit"][:8]})
    parts = [
        "# The published code, measured",
        answer(groups),
        "![Independent layers, claimed and real, and validation perplexity](images/published.png)",
        "Left and middle: one seed; in the middle, the two lines are one. The band on the right is "
        "the range over the seeds.",
        _table(groups),
        WHY,
        "## How it was measured",
        how,
    ]
    return "\n\n".join(parts) + "\n"


def answer(groups: Groups) -> str:
    """What there is instead of what is claimed, and what it costs."""
    published = groups[PUBLISHED]
    last = max(_collapsed_at(row) for row in published)
    claimed = statistics.fmean(_late_mean(row, "claimed") for row in published)
    return (
        f"**From decision {last:,} of {len(published[0]['claimed']):,} on, all layers of the "
        f"published code share one set of weights for the rest of the run, in all seeds "
        f"({len(published)}).** In the last half, its state claims {claimed:.1f} independent "
        f"layers on average. In `layer-tying`, what is claimed is what is stored, at every "
        f"decision. Because every layer that was once called independent keeps its optimizer "
        f"state, the published code takes {_state(published):.2f} MB of parameters, gradients and "
        f"optimizer state on average, `layer-tying` {_state(groups[OURS]):.2f} MB and the model "
        f"without tying {_state(groups[UNTIED]):.2f} MB. "
        f"With the paper's agent in both, the published code ends with "
        f"{_ratio(groups, PUBLISHED, OURS):.3f} times the test perplexity. The model without "
        f"tying, which has more parameters, ends with {_ratio(groups, UNTIED, OURS):.3f} times "
        f"that of `layer-tying`: what the paper's agent learns is on [another page](agent.md)."
    )


def _state(rows: Sequence[Row]) -> float:
    """Megabytes, the mean over the run and over seeds."""
    return statistics.fmean(row["state_bytes_mean"] for row in rows) / 1e6


def _ratio(groups: Groups, one: str, other: str) -> float:
    """Of test perplexities, the mean over seeds."""
    pairs = zip(groups[one], groups[other], strict=True)
    return statistics.fmean(a["test_perplexity"] / b["test_perplexity"] for a, b in pairs)


def _collapsed_at(row: Row) -> int:
    """The decision from which on there is one set of storages only, counted from one."""
    return (
        len(row["storages"])
        - next((i for i, n in enumerate(reversed(row["storages"])) if n > 1), len(row["storages"]))
        + 1
    )


def _late_mean(row: Row, name: str) -> float:
    """The mean over the last half of the decisions."""
    return statistics.fmean(row[name][len(row[name]) // 2 :])


def _table(groups: Groups) -> str:
    columns: dict[str, Callable[[Row], float]] = {
        "test perplexity": lambda row: row["test_perplexity"],
        "claimed, last half": lambda row: _late_mean(row, "claimed"),
        "real, last half": lambda row: _late_mean(row, "storages"),
        "state, mean, MB": lambda row: row["state_bytes_mean"] / 1e6,
        "state, peak, MB": lambda row: row["state_bytes_peak"] / 1e6,
        "peak resident set, MB": lambda row: row["peak_resident_bytes"] / 1e6,
        "processor time, s": lambda row: row["processor_seconds"],
    }
    return markdown_table(
        ["", *columns, "seeds"],
        [
            [
                ABOUT[side][0],
                *(mean_and_spread([f(row) for row in rows], 2) for f in columns.values()),
                str(len(rows)),
            ]
            for side, rows in groups.items()
            if rows
        ],
    )


def _drawn(groups: Groups) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, 3.2), layout="constrained", facecolor="white")
        left, middle, right = figure.subplots(1, 3)
        for axes, side in ((left, PUBLISHED), (middle, OURS)):
            row = groups[side][0]
            wide = {"color": CONVENTIONAL, "lw": 3.0}  # it is seen where both are equal
            axes.plot(*_means_of(row["claimed"]), **wide, label="claimed")
            axes.plot(*_means_of(row["storages"]), color=ABOUT[side][1], lw=1.0, label="real")
            axes.set_title(ABOUT[side][0].replace("`", ""))
            axes.set_xlabel(f"decisions, means of {MEANS_OF}")
            axes.set_ylim(0, row["layers"])
            axes.legend()
        left.set_ylabel("independent layers")
        for side, rows in groups.items():
            _draw_perplexities(right, side, [row["validation_perplexities"] for row in rows])
        right.set_ylim(top=16)
        right.set_xlabel("passes over the layers, of 44 steps each")
        right.set_ylabel("validation perplexity")
        right.legend()
        figure.canvas.draw()
    return figure


def _means_of(numbers: Sequence[float]) -> tuple[list[int], list[float]]:
    """The means of as many numbers each, and the places of the first ones."""
    places = list(range(0, len(numbers), MEANS_OF))
    return places, [statistics.fmean(numbers[start : start + MEANS_OF]) for start in places]


def _draw_perplexities(axes: Any, side: str, curves: list[list[float]]) -> None:
    name, colour = ABOUT[side]
    at_each = list(zip(*curves, strict=True))
    x = range(1, len(at_each) + 1)
    axes.fill_between(x, list(map(min, at_each)), list(map(max, at_each)), color=colour, alpha=0.2)
    axes.plot(x, list(map(statistics.fmean, at_each)), color=colour, label=name.replace("`", ""))
