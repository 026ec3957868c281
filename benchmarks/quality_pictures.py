"""The two pictures of the benchmark: quality by model state, and by the number of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from quality_rows import FIXED, Groups, Row, at_best_rate, front_of, mean, points_of

from layer_tying.report.style import STYLE

KINDS = {  # prefix of a method -> name, marker, colour (of Okabe and Ito)
    "conventional": ("conventional", "s", "#000000"),
    "bandit": ("bandit", "*", "#D55E00"),
    "dqn": ("the paper's agent", "X", "#0072B2"),
    "random": ("random changes", "P", "#56B4E9"),
    "": ("fixed patterns (hollow: 1/n scaled)", "o", "#999999"),
}


def draw_panels(
    rows: Sequence[Row],
    settings: Sequence[tuple[str, str]],
    draw: Callable[[Any, Groups], None],
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


def draw_patterns(axes: Any, groups: Groups) -> None:
    """Perplexity by the mean number of independent layers, up to five of them."""
    points = {
        name: point
        for name, point in points_of(groups, "independent_layers_mean").items()
        if point[0] <= 5 and not name.startswith("conventional")
    }
    _plot(axes, points)
    if "conventional" in groups:
        level = mean(groups["conventional"], "test_perplexity")
        axes.axhline(level, color="#000000", linestyle="--", linewidth=1)
    for m, names in FIXED.items():
        rivals = {name: points[name] for name in names if name in points}
        if rivals:
            best = min(rivals, key=lambda name: rivals[name][1])
            axes.text(m + 0.12, rivals[best][1], best, va="center", fontsize=7)
    axes.set_xlabel("independent layers, mean over training")
    axes.set_xlim(0.4, 5.2)


def draw_front(axes: Any, groups: Groups) -> None:
    """Perplexity by the mean model state; those that nothing beats in both are joined."""
    points = {
        name: (size / 1e6, figure)
        for name, (size, figure) in points_of(groups, "model_state_bytes_mean").items()
    }
    axes.plot(
        *zip(*sorted(front_of(points).values()), strict=True),
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


def _plot(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    for name, point in points.items():
        _, marker, colour = next(look for kind, look in KINDS.items() if name.startswith(kind))
        filling = "white" if name.endswith("1/n") else colour
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
