"""Writes docs/quality.md and its pictures from what benchmarks/quality.py measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from performance_tables import table
from scipy.stats import spearmanr

from layer_tying.policies import pattern
from layer_tying.report.figures import STYLE

Row = dict[str, Any]
FIXED = {m: [f"{name}-{m}" for name in ("sequence", "cycle", "cycle-reverse")] for m in (2, 3, 4)}
FIXED[3].append("sandwich-3")  # Subformer's; the others of its kind are ours
FIXED[4].append("middle-loop-4")
KINDS = {  # prefix of a contestant -> name, marker, colour (of Okabe and Ito)
    "conventional": ("conventional", "s", "#000000"),
    "bandit": ("bandit", "*", "#D55E00"),
    "dqn": ("the paper's agent", "X", "#0072B2"),
    "random": ("random changes", "P", "#56B4E9"),
    "": ("fixed patterns (hollow: damped)", "o", "#999999"),
}


def best_rate(rows: Sequence[Row], text: str, regime: str, contestant: str) -> float:
    """The learning rate with the lowest validation perplexity of the first seed."""
    mine = [r for r in of(rows, text, regime) if r["contestant"] == contestant]
    first = min(r["seed"] for r in mine)
    tried = [r for r in mine if r["seed"] == first]
    return min(tried, key=lambda r: r["validation_perplexity"])["lr"]


def of(rows: Sequence[Row], text: str, regime: str) -> list[Row]:
    return [r for r in rows if (r["set"], r["regime"]) == (text, regime)]


def at_best_rate(rows: Sequence[Row], text: str, regime: str) -> dict[str, list[Row]]:
    """Each contestant's runs at its best learning rate."""
    mine = of(rows, text, regime)
    best = {
        name: best_rate(rows, text, regime, name)
        for name in dict.fromkeys(r["contestant"] for r in mine)
    }
    return {
        name: [r for r in mine if r["contestant"] == name and r["lr"] == rate]
        for name, rate in best.items()
    }


def write_page(results: Row, folder: Path) -> None:
    """The page and its pictures, into a folder of documentation."""
    rows = results["rows"]
    settings = list(dict.fromkeys((r["set"], r["regime"]) for r in rows))
    if not settings:
        return
    (folder / "images").mkdir(exist_ok=True)
    for name, draw in (("front", _front), ("patterns", _patterns)):
        figure = draw_panels(rows, settings, draw)
        figure.savefig(folder / "images" / f"quality-{name}.png", dpi=150)
    parts = ["# Quality", *_introduction(results), _verdicts(rows, settings), *_PICTURES]
    for text, regime in settings:
        parts += [f"## {text}, {regime}", _table(at_best_rate(rows, text, regime))]
    page = "\n\n".join(parts) + "\n"
    (folder / "quality.md").write_text(page, encoding="utf-8")


def _introduction(results: Row) -> list[str]:
    rows = results["rows"]
    shapes: dict[str, list[str]] = {}  # what is trained -> in which regimes
    for regime, settings in results["settings"].items():
        steps = next(r["steps"] for r in rows if r["regime"] == regime)
        shapes.setdefault(_shape(settings, steps), []).append(regime)
    trained = "; ".join(f"{', '.join(regimes)}: {shape}" for shape, regimes in shapes.items())
    machine = sorted({r["hardware"]["processor"] for r in rows})
    versions = sorted({f"torch {r['versions']['torch']}" for r in rows})
    return [
        f"Which way of choosing what is shared trains the best model of a given size, with equal "
        f"data, order and seeds ({trained}). Each contestant had the same learning rates to "
        f"choose from, on validation with the first seed. Written by `make bench-quality` from "
        f"`benchmarks/results/quality.json`: {len(rows)} runs of one thread, "
        f"{', '.join(machine)}, {', '.join(versions)}.",
        "Perplexity is per token of the test text, at the weights that were best on validation; "
        "with several seeds the mean and the standard deviation; the rise after it is that of the "
        "validation perplexity from its best to the end of training. `bandit-M` starts from "
        "`sandwich-M` with damped initial weights and keeps M independent layers; `bandit, priced` "
        "begins and ends groups as it likes. The runs are short: they compare the contestants "
        "with each other, at this size and length. Where there is one seed only, a few per cent "
        "may be chance; what was tried on the way is in the [log](log.md).",
    ]


def _shape(settings: Row, steps: int) -> str:
    positions = {"llama": "rotary positions", "gpt2": "GPT-2's shape"}[settings["family"]]
    return (
        f"{settings['nlayers']} layers x {settings['emsize']}, {positions}, {steps} steps of "
        f"{settings['batch_size']} x {settings['bptt']} tokens"
    )


_PICTURES = (
    "![Perplexity against mean model state](images/quality-front.png)",
    "Beside a star is the bandit's M, beside a square the layers of a conventional model. The line "
    "joins what nothing else beats in both.",
    "![Perplexity by the number of independent layers](images/quality-patterns.png)",
    "The same perplexities by the mean number of independent layers: at equal size, what is "
    "shared decides, and how it starts. The best published fixed pattern of each size has its name "
    "beside it; the dashed line is conventional training.",
)


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(r[name] for r in rows)


def _table(groups: dict[str, list[Row]]) -> str:
    heads = (
        *("contestant", "perplexity", "bits/byte", "validation", "rise after"),
        *("independent, mean", "end"),
        *("state, mean MB", "peak MB", "s/step", "decisions", "learning rate", "seeds"),
    )
    ordered = sorted(groups.items(), key=lambda item: _mean(item[1], "test_perplexity"))
    return table(heads, (_cells(name, rows) for name, rows in ordered))


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    spread = [r["test_perplexity"] for r in rows]
    deviation = f" ± {statistics.stdev(spread):.3f}" if len(rows) > 1 else ""
    return [
        name,
        f"{statistics.fmean(spread):.3f}{deviation}",
        f"{_mean(rows, 'bits_per_byte'):.3f}",
        f"{_mean(rows, 'validation_perplexity'):.3f}",
        f"{_mean(rows, 'rise_after_the_best'):.2f}",
        f"{_mean(rows, 'independent_layers_mean'):.2f}",
        f"{_mean(rows, 'independent_layers_end'):.1f}",
        f"{_mean(rows, 'model_state_bytes_mean') / 1e6:.2f}",
        f"{_mean(rows, 'model_state_bytes_peak') / 1e6:.2f}",
        f"{_mean(rows, 'seconds_per_step'):.3f}",
        f"{_mean(rows, 'decision_overhead'):.1%}",
        f"{rows[0]['lr']:g}",
        str(len(rows)),
    ]


def _verdicts(rows: Sequence[Row], settings: Sequence[tuple[str, str]]) -> str:
    """The bandit's perplexity as a share of its rivals', a line for each text and regime."""
    heads = (
        *("text, regime", "M = 2: of the best fixed", "M = 3", "M = 4"),
        *("M = 3: of conventional", "of `random`", "of `random, damped`"),
        *("of `sandwich-3, damped`", "rank correlation", "on the front"),
    )
    lines = []
    for text, regime in settings:
        groups = at_best_rate(rows, text, regime)
        cells = [f"{text}, {regime}", *(_of_best_fixed(groups, m) for m in FIXED)]
        for rival in ("conventional", "random", "random, damped", "sandwich-3, damped"):
            ratio = _ratio(groups, "bandit-3", rival)
            cells.append(f"{ratio:.3f}" if ratio else "")
        front = _front_of(_points(groups, "model_state_bytes_mean"))
        ours = ", ".join(name for name in front if name.startswith("bandit")) or "none"
        lines.append([*cells, _rank_correlation(groups), ours])
    return (
        "The bandit's perplexity as a share of its rivals' (below 1: it is better), over the seeds "
        "that both have: of the published fixed pattern with as many independent layers that does "
        "best beside it (in brackets, with the number of seeds), of conventional training, of "
        "random changes that settle when it does, and of its own start kept to the end. The rank "
        "correlation is that of what its worths predict for the fixed patterns of neighbouring "
        "layers with the perplexities they had; the front is that of perplexity and mean model "
        "state, over all contestants.\n\n" + table(heads, lines)
    )


def _of_best_fixed(groups: dict[str, list[Row]], m: int) -> str:
    ratios = {name: _ratio(groups, f"bandit-{m}", name) for name in FIXED[m]}
    known = {name: ratio for name, ratio in ratios.items() if ratio}
    if not known:
        return ""
    best = max(known, key=lambda name: known[name])
    number = len(_common_seeds(groups, f"bandit-{m}", best))
    return f"{known[best]:.3f} ({best}, {number})"


def _ratio(groups: dict[str, list[Row]], one: str, other: str) -> float | None:
    """Of two contestants' mean test perplexities over the seeds that both have."""
    seeds = _common_seeds(groups, one, other)
    if not seeds:
        return None
    ours, theirs = (
        statistics.fmean(r["test_perplexity"] for r in groups[name] if r["seed"] in seeds)
        for name in (one, other)
    )
    return ours / theirs


def _common_seeds(groups: dict[str, list[Row]], one: str, other: str) -> set[int]:
    ours, theirs = ({r["seed"] for r in groups.get(name, [])} for name in (one, other))
    return ours & theirs


def _rank_correlation(groups: dict[str, list[Row]]) -> str:
    """Spearman's, of what the bandit's worths say of a pattern and how it did from the start."""
    if "bandit-3" not in groups:
        return ""
    predicted, measured = [], []
    for name, rows in groups.items():
        kind, _, number = name.rpartition("-")
        if kind in ("sequence", "sandwich") and number.isdecimal():
            owners = pattern(kind, 12, int(number)).independent_layers
            worths = [r["worth"] for r in groups["bandit-3"]]
            predicted.append(statistics.fmean(sum(w[i] for i in owners) for w in worths))
            measured.append(-math.log(_mean(rows, "test_perplexity")))
    if len(predicted) < 4:
        return ""
    return f"{spearmanr(predicted, measured).statistic:.2f} ({len(predicted)})"


def draw_panels(
    rows: Sequence[Row],
    settings: Sequence[tuple[str, str]],
    draw: Callable[[Any, dict[str, list[Row]]], None],
) -> Figure:
    """A panel for each text and regime."""
    columns = min(3, len(settings))
    lines = math.ceil(len(settings) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (text, regime) in zip(panels, settings, strict=False):
            draw(axes, at_best_rate(rows, text, regime))
            axes.set_title(f"{text}, {regime}", loc="left")
            axes.set_ylabel("perplexity, test")
        for axes in panels[len(settings) :]:
            axes.set_visible(False)
        _legend(figure)
        figure.canvas.draw()
    return figure


def _patterns(axes: Any, groups: dict[str, list[Row]]) -> None:
    """Perplexity by the mean number of independent layers, up to five of them."""
    points = {
        name: point
        for name, point in _points(groups, "independent_layers_mean").items()
        if point[0] <= 5 and not name.startswith("conventional")
    }
    _plot(axes, points)
    if "conventional" in groups:
        level = _mean(groups["conventional"], "test_perplexity")
        axes.axhline(level, color="#000000", linestyle="--", linewidth=1)
    for m, names in FIXED.items():
        rivals = {name: points[name] for name in names if name in points}
        if rivals:
            best = min(rivals, key=lambda name: rivals[name][1])
            axes.text(m + 0.12, rivals[best][1], best, va="center", fontsize=7)
    axes.set_xlabel("independent layers, mean over training")
    axes.set_xlim(0.4, 5.2)


def _front(axes: Any, groups: dict[str, list[Row]]) -> None:
    """Perplexity by the mean model state; those that nothing beats in both are joined."""
    points = {
        name: (size / 1e6, figure)
        for name, (size, figure) in _points(groups, "model_state_bytes_mean").items()
    }
    axes.plot(
        *zip(*sorted(_front_of(points).values()), strict=True),
        color="#999999",
        linewidth=1,
        zorder=0,
    )
    _plot(axes, points)
    for name, (x, y) in points.items():
        kind, _, layers = name.partition(", ")
        if kind == "conventional":
            axes.text(x, y, f"   {layers or '12 layers'}", va="center", fontsize=7)
    axes.set_xlabel("model state, mean over training, MB")
    axes.margins(x=0.2)


def _points(groups: dict[str, list[Row]], size: str) -> dict[str, tuple[float, float]]:
    return {n: (_mean(rows, size), _mean(rows, "test_perplexity")) for n, rows in groups.items()}


def _plot(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    for name, point in points.items():
        _, marker, colour = next(look for kind, look in KINDS.items() if name.startswith(kind))
        filling = "white" if name.endswith("damped") else colour
        size = 10 if marker == "*" else 6
        axes.plot(*point, marker, color=colour, markerfacecolor=filling, markersize=size)
        if name.startswith("bandit"):
            axes.annotate(
                name[7:].strip(), point, (-9, -10), textcoords="offset points", fontsize=7
            )


def _legend(figure: Figure) -> None:
    marks = [
        Line2D([], [], marker=marker, color=colour, linestyle="none", label=name)
        for name, marker, colour in KINDS.values()
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def _front_of(points: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The points that no other is as good as in both."""
    return {
        name: point
        for name, point in points.items()
        if not any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points.values())
    }
