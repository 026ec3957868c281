"""The pictures of what a run measured: metrics over training, and the memory of the model state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from layer_tying.report.formats import format_bytes, format_number, format_scaled
from layer_tying.report.runs import RunGroup, counted, curve
from layer_tying.report.style import COMPONENTS, INK, MUTED, NARROW, PART_NAMES, WIDE, bare, percent

PERPLEXITY_RANGE = 20  # times the best: an untrained model's 50,000 would flatten all the rest


def draw_curves(
    groups: Sequence[RunGroup], styles: Sequence[dict[str, Any]], key: str, axis_label: str
) -> Figure:
    """One metric over tokens (images, examples), a line a group, a band of one sd over seeds."""
    num_columns = 2 if max(len(group.title) for group in groups) <= 24 else 1
    num_rows = -(-len(groups) // num_columns) if len(groups) > 1 else 0
    figure = Figure(figsize=(NARROW, 2.75 + 0.17 * num_rows), layout="constrained")
    axes = figure.subplots()
    lows, highs = [], []
    for group, style in zip(groups, styles, strict=True):
        tokens, mean, sd = curve(group, key)
        marker = "o" if len(tokens) == 1 else None
        axes.plot(tokens, mean, linewidth=1.7, label=group.title, marker=marker, **style)
        if len(group.shown) > 1:
            axes.fill_between(tokens, mean - sd, mean + sd, color=style["color"], alpha=0.2, lw=0)
        lows.append(mean.min())
        highs.append(mean.max())
    _value_axis(axes, key, min(lows), max(highs))
    units = {counted(run): None for group in groups for run in group.runs}
    axes.set(xlabel=" or ".join(units), ylabel=axis_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(format_scaled(value))))
    axes.grid(axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.spines.left.set_visible(False)
    if len(groups) > 1:
        figure.legend(loc="outside upper left", ncols=num_columns, handlelength=1.5, labelcolor=INK)
    return figure


def draw_memory(groups: Sequence[RunGroup]) -> Figure:
    """Model state by component: for each group the mean, and below it, paler, the peak."""
    figure = Figure(figsize=(WIDE, 0.9 + 0.62 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for row, group in enumerate(groups):
        mean, peak = _component_bytes(group)
        for offset, height, alpha, parts, name in (
            (-0.14, 0.34, 1.0, mean, "mean"), (0.22, 0.26, 0.5, peak, "peak"),
        ):  # fmt: skip
            starts = np.cumsum(parts) - parts
            axes.barh(
                row + offset, parts, left=starts, height=height, alpha=alpha,
                color=list(COMPONENTS.values()),
            )  # fmt: skip
            axes.annotate(
                f"{name} {format_bytes(parts.sum())}", (parts.sum(), row + offset), (5, 0),
                textcoords="offset points", va="center_baseline", fontsize=8, color=MUTED,
            )  # fmt: skip
    axes.set_yticks(range(len(groups)), [group.title for group in groups], color=INK)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.set(xlim=(0, None), xticks=[])
    bare(axes)
    figure.legend(
        handles=[Patch(color=COMPONENTS[part], label=name) for part, name in PART_NAMES.items()],
        loc="outside upper left", ncols=3, handlelength=1, handleheight=1, labelcolor=INK,
    )  # fmt: skip
    return figure


def _tick(text: str) -> str:
    """A formatted number without the zeros that a tick does not need."""
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".rstrip()


def _value_axis(axes: Axes, key: str, low: float, high: float) -> None:
    """From zero for counts; for perplexity logarithmic, and where it ends is what can be read."""
    scaled = format_bytes if key.endswith("bytes") else format_number
    if key.endswith("perplexity") and high > 3 * low > 0:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, min(high * 1.1, low * PERPLEXITY_RANGE))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif key in ("independent_layers", "model_state_bytes"):
        axes.set_ylim(0, high * 1.05)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=key == "independent_layers"))
    if key.endswith("accuracy"):
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(scaled(value))))


def _component_bytes(group: RunGroup) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each component, shape (3,): the mean over training, and at the peak."""
    means, peaks = [], []
    for run in group.shown:
        lines = np.stack([run.series(f"{part}_bytes") for part in COMPONENTS], axis=1)
        lines = lines[np.isfinite(lines).all(axis=1)]
        if len(lines):
            means.append(lines.mean(axis=0))
            peaks.append(lines[lines.sum(axis=1).argmax()])
    if not means:
        return np.zeros(len(COMPONENTS)), np.zeros(len(COMPONENTS))
    return np.mean(means, axis=0), np.mean(peaks, axis=0)
