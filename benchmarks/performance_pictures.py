"""The picture of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from performance_tables import Row, by_setting

from layer_tying.report.style import COMPONENTS, GRID, PART_NAMES, STYLE


def draw_memory(rows: Sequence[Row]) -> Figure:
    """Bars of the peak above the baseline, by component; a panel for each setting."""
    groups = {
        name: [r for r in group if "error" not in r] for name, group in by_setting(rows).items()
    }
    groups = {name: group for name, group in groups.items() if group}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.7 + 0.32 * sum(len(g) + 1.6 for g in groups.values())))
        heights = [len(group) + 0.4 for group in groups.values()]
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        for axes, (name, group) in zip(panels, groups.items(), strict=True):
            _bars(axes, group)
            axes.set_title(name, loc="left")
        panels[-1].set_xlabel("peak above the baseline, GB")
        panels[0].legend(*panels[0].get_legend_handles_labels(), ncols=4, loc="lower right")
        figure.set_layout_engine("constrained")
        figure.canvas.draw()
    return figure


def _bars(axes: Any, group: Sequence[Row]) -> None:
    labels = [
        "conventional" if r["independent"] == r["layers"] else f"{r['independent']} independent"
        for r in group
    ]
    start = [0.0] * len(group)
    for name, colour in (*COMPONENTS.items(), ("rest", GRID)):
        if name == "rest":
            widths = [max(0, r["above_own_bytes"] - r["model_state_bytes"]) / 1e9 for r in group]
        else:
            widths = [r[f"{name}_bytes"] / 1e9 for r in group]
        label = PART_NAMES.get(name, "the rest")
        axes.barh(labels, widths, left=start, color=colour, label=label, height=0.7)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for index, row in enumerate(group):
        axes.text(start[index], index, f" {row['above_own_bytes'] / 1e9:.2f}", va="center")
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
