"""The picture of learned mixtures: the coefficients of each layer, by matrix and over time."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from layer_tying.report.style import MUTED, WIDE, bare, layer_axis
from layer_tying.runs.reading import Run

SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#8c2d19", "#e0a088", "#f1f3f5", "#8db8d8", "#17426d"]
)


def validations(run: Run) -> list[dict[str, Any]]:
    """The logged lines that hold coefficients."""
    return [line for line in run.metrics if line.get("coefficients")]


def draw_coefficients(run: Run) -> Figure:
    """A heat map a matrix and validation: layers by shared sets, the leading set marked."""
    lines = validations(run)
    chosen = sorted({0, len(lines) // 2, len(lines) - 1})
    names = list(lines[0]["coefficients"])
    depth = len(lines[0]["coefficients"][names[0]])
    height = max(1.0, 0.115 * depth)
    figure = Figure(figsize=(WIDE, 0.7 + (height + 0.25) * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), len(names), squeeze=False, sharex=True, sharey=True)
    matrices = [  # of a run that diverged with NaN
        [np.array(lines[index]["coefficients"][name], dtype=float) for name in names]
        for index in chosen
    ]
    sizes = np.abs(np.concatenate([matrix.ravel() for matrix in chain(*matrices)]))
    largest = sizes.max(initial=0.0, where=np.isfinite(sizes)) or 1.0
    for row, index in enumerate(chosen):
        for axes, matrix in zip(panels[row], matrices[row], strict=True):
            _draw(axes, matrix, largest)
        panels[row, 0].set_ylabel(f"step {lines[index]['step']:,}")
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(_short(name), fontsize=7.5)
    layer_axis(panels[0, 0].yaxis, depth)
    panels[0, 0].set_xticks(range(matrices[0][0].shape[1]))
    figure.supxlabel("shared set", fontsize=9, color=MUTED)
    figure.supylabel("layer", fontsize=9, color=MUTED)
    bar = figure.colorbar(panels[0, 0].images[0], ax=panels, shrink=0.6, aspect=30)
    bare(bar.ax)
    return figure


def _draw(axes: Axes, matrix: np.ndarray, largest: float) -> None:
    """A heat map, with a dot at the set with the largest coefficient of each layer."""
    axes.imshow(
        matrix, aspect="auto", interpolation="none", cmap=SIGNED, vmin=-largest, vmax=largest
    )
    known = np.flatnonzero(np.isfinite(matrix).all(axis=1))
    leaders = np.abs(matrix[known]).argmax(axis=1)
    axes.scatter(leaders, known, s=6, facecolor="#ffffff", linewidth=0)
    bare(axes)


def _short(name: str) -> str:
    """A matrix by the last module of its name, as c_proj of attn.c_proj.weight, and its parent."""
    parts = name.removesuffix(".weight").split(".")
    return "\n".join(parts[-2:])
