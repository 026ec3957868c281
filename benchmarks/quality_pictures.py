"""The pictures of the benchmark: quality against parameters, training memory and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter
from quality_rows import Groups, front_of, mean, mean_figure, step_seconds
from quality_settings import Setting, half_as_deep, timed

from layer_tying.report.style import STYLE

KINDS = {  # prefix of a method -> name, marker, colour (of Okabe and Ito)
    "plain": ("conventional, labelled with its layers", "s", "#000000"),
    "narrow": ("conventional, of half the width", "D", "#000000"),
    "low": ("conventional, of low rank", "v", "#000000"),
    "mixture": ("learned mixtures", "*", "#D55E00"),
    "dqn": ("the paper's agent", "X", "#0072B2"),
    "random": ("random changes", "P", "#56B4E9"),
    "": ("fixed patterns", "o", "#009E73"),
}
Settings = Mapping[str, tuple[Setting, Groups]]


def draw_panels(settings: Settings, draw: Callable[[Any, Setting, Groups], None]) -> Figure:
    """A panel for each setting."""
    columns = min(2, len(settings))
    lines = math.ceil(len(settings) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * columns, 3.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (name, (setting, groups)) in zip(panels, settings.items(), strict=False):
            draw(axes, setting, groups)
            axes.set_title(name, loc="left")
        marks = _marks([name for _, groups in settings.values() for name in groups])
        for spare in panels[len(settings) :]:
            spare.set_axis_off()
            spare.legend(handles=marks, loc="center", frameon=False)
        if len(settings) == len(panels):
            figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False)
        figure.canvas.draw()
    return figure


def _marks(methods: Sequence[str]) -> list[Line2D]:
    kinds = {_kind(name) for name in methods}
    marks = [
        Line2D([], [], marker=marker, color=colour, linestyle="none", label=name)
        for kind, (name, marker, colour) in KINDS.items()
        if kind in kinds
    ]
    if any(_style(name)[2] == "white" for name in methods):
        marks.append(
            Line2D(
                [],
                [],
                marker="o",
                color="#009E73",
                markerfacecolor="white",
                linestyle="none",
                label="hollow: uses are not scaled",
            )
        )
    return marks


def draw_against(size: str, label: str) -> Callable[[Any, Setting, Groups], None]:
    """Draws the figure against an entry of the rows, in millions; the Pareto front is joined."""

    def draw(axes: Any, setting: Setting, groups: Groups) -> None:
        points = {
            name: (mean(rows, size) / 1e6, mean_figure(rows, setting))
            for name, rows in groups.items()
        }
        front = sorted(front_of(points).values())
        axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
        for name, point in points.items():
            marker, colour, filling = _style(name)
            front_most = 3 if name.startswith("mixture") else 2  # it may lie on a pattern
            axes.plot(*point, marker, color=colour, markerfacecolor=filling, zorder=front_most)
            if name.startswith("plain"):
                axes.text(*point, f"   {name.rpartition('-')[2]}", va="center", fontsize=7)
        axes.set_xlabel(label)
        axes.set_ylabel("error, test" if setting.accuracy else "perplexity, test")
        axes.margins(x=0.15)

    return draw


def with_times(settings: Settings) -> dict[str, tuple[Setting, Groups]]:
    """The settings of perplexities whose methods' times are known."""
    return {
        name: (setting, groups)
        for name, (setting, groups) in settings.items()
        if not setting.accuracy
        and all(step_seconds(groups.get(method, [])) for method in timed(setting))
    }


def draw_times(settings: Settings) -> Figure:
    """Validation perplexity against time, of the first seed; a panel for each setting."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * max(1, len(settings)), 3.2), layout="constrained")
        panels = figure.subplots(1, len(settings), squeeze=False)[0]
        for axes, (name, (setting, groups)) in zip(panels, settings.items(), strict=True):
            _draw_over_time(axes, setting, groups)
            axes.set_title(name, loc="left")
        figure.canvas.draw()
    return figure


def _draw_over_time(axes: Any, setting: Setting, groups: Groups) -> None:
    lines = {setting.rival: ":", half_as_deep(setting): "--"}
    for name in timed(setting):
        _, colour, _ = _style(name)
        steps, _, perplexities = zip(*groups[name][0]["curve"], strict=True)
        seconds = step_seconds(groups[name])
        assert seconds is not None
        minutes = [step * seconds / 60 for step in steps]
        axes.plot(
            minutes, perplexities, lines.get(name, "-"), color=colour, linewidth=1, label=name
        )
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(ScalarFormatter())
    axes.legend(loc="upper right", fontsize=7)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("perplexity, validation")


def _style(name: str) -> tuple[str, str, str]:
    kind = _kind(name)
    _, marker, colour = KINDS[kind]
    is_hollow = (kind == "" and "1/n" not in name) or "unscaled" in name
    return marker, colour, "white" if is_hollow else colour


def _kind(name: str) -> str:
    return next(kind for kind in KINDS if name.startswith(kind))
