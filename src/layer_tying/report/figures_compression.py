"""Pictures of a compression: what sharing costs, which layers share, and how the model healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from layer_tying.report.style import ACCENT, CONVENTIONAL, MUTED, NARROW, SHARES, bare, layer_axis
from layer_tying.runs.reading import as_number

Table = Sequence[Sequence[float | None]]


def draw_sensitivities(table: Table, reading: Sequence[int], label: str) -> Figure:
    """A heat map: layers by the layers whose weights they read; a ring at what was chosen.

    Args:
        table: [L][L] in nats; None for layers that are unlike.
        reading: for each layer, whose weights it reads.
        label: what the table holds.
    """
    values = np.array([[np.nan if each is None else each for each in row] for row in table])
    figure = Figure(figsize=(NARROW, 0.9 * NARROW), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap=SHARES, interpolation="none", vmin=0)
    size = max(9.0, 1500 / len(reading) ** 2)
    axes.scatter(
        reading, range(len(reading)), s=size, facecolor="none", edgecolor="#d9730d", linewidth=1.4
    )
    axes.set_xlabel("whose weights")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        layer_axis(axis, len(reading))
    bare(axes)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    bare(bar.ax)
    return figure


def draw_candidates(candidates: Mapping[str, tuple[Sequence[int], float | None]]) -> Figure:
    """A bar for the measured divergence of what each search proposed."""
    known = {name: value for name, (_, value) in candidates.items() if value is not None}
    figure = Figure(figsize=(NARROW, 0.7 + 0.32 * len(known)), layout="constrained")
    axes = figure.subplots()
    best = min(known.values(), default=None)
    colours = [ACCENT if value == best else CONVENTIONAL for value in known.values()]
    bars = axes.barh(list(known), list(known.values()), color=colours, height=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8.5)
    axes.set_xlim(right=1.15 * max(known.values(), default=1.0))
    axes.set_xlabel("divergence before healing, nats")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    return figure


def draw_healing(lines: Sequence[Mapping[str, Any]], before: float, label: str) -> Figure:
    """The validation figure over the steps of healing, and the untouched model's as a rule.

    Args:
        lines: of ``metrics.jsonl``.
        before: what the untouched model reaches.
        label: the name of the figure, as in ``validation_perplexity``.
    """
    figure = Figure(figsize=(NARROW, 3.0), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    values = [as_number(line[f"validation_{label}"]) for line in lines]
    axes.plot(steps, values, color=ACCENT, marker=".")
    axes.axhline(before, color=MUTED, linestyle="--", linewidth=1)
    axes.annotate(
        "untouched",
        (steps[0], before),
        xytext=(0, 3),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )
    axes.set_xlabel("steps of healing")
    axes.set_ylabel(f"validation {label}")
    axes.grid(axis="y")
    return figure
