"""The picture of what the paper's agent expects: the matrix of its Q-network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from layer_tying.report.formats import format_number
from layer_tying.report.style import SHARES, bare, layer_axis
from layer_tying.runs.reading import Run, as_number


def draw_q(run: Run) -> Figure:
    """The Q-network's matrix at the first, a middle and the last decision that recorded it."""
    chosen = _recorded(run)
    figure = Figure(figsize=(1.2 + 2.8 * len(chosen), 3.5), layout="constrained")
    for column, index in enumerate(chosen):
        matrix = _lower_triangle(run.decisions[index]["q"])
        axes = figure.add_subplot(1, len(chosen), column + 1)
        image = axes.imshow(matrix, interpolation="none", cmap=SHARES)
        greedy = np.nanargmax(np.where(np.isnan(matrix), -np.inf, matrix), axis=1)
        axes.scatter(
            greedy, range(len(matrix)), s=min(30, 900 / len(matrix) ** 1.5),
            facecolor="#ffffff", edgecolor="#000000", linewidth=0.6,
        )  # fmt: skip
        layer_axis(axes.yaxis, len(matrix))
        layer_axis(axes.xaxis, len(matrix))
        step = format_number(as_number(run.decisions[index].get("step")), digits=0)
        axes.set(title=f"decision {index} (step {step})", xlabel="uses the weights of layer")
        if column == 0:
            axes.set_ylabel("layer")
        bare(axes)
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=30)
        low, high = np.nanmin(matrix), np.nanmax(matrix)
        ends = (low, (low + high) / 2, high)
        bar.set_ticks(ends, labels=[format_number(value) for value in ends])
        bare(bar.ax)
    return figure


def _recorded(run: Run) -> list[int]:
    """The first, a middle and the last decision that recorded what the agent expects."""
    recorded = [index for index, line in enumerate(run.decisions) if line.get("q")]
    return sorted({recorded[0], recorded[len(recorded) // 2], recorded[-1]})


def _lower_triangle(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Ragged rows as a square matrix, NaN above the diagonal and where a value is null."""
    matrix = np.full((len(rows), len(rows)), np.nan)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = [as_number(value) for value in row]
    return matrix
