"""How the pictures of a report look, and how they become files.

Text, rules and background have colours of their own (INK, MUTED, GRID, PAPER), so that a page can
replace them in the SVG with its own for light and dark. Colours of data hold on both and for the
colour-blind: they differ in lightness, and no picture needs its hues told apart to be read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from layer_tying.report.runs import RunGroup

INK, MUTED, GRID, PAPER = "#1b1f25", "#69717c", "#dfe2e7", "#fefefe"
CONVENTIONAL, ACCENT = "#8a919b", "#1f77c4"
OTHERS = (ACCENT, "#d9730d", "#0f9d77", "#c45a9c", "#b8991a", "#6a5acd", "#56b4e9")
COMPONENTS = {"parameter": "#31688e", "gradient": "#35a58b", "optimizer_state": "#a5c957"}
PART_NAMES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optimizer_state": "optimizer state",
}
SHARES = LinearSegmentedColormap.from_list("shares", ["#eef2f6", "#8db8d8", "#2f6ea8", "#17294d"])
WIDE, NARROW = 9.6, 4.7  # inches
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "layer-tying",  # ids by content rather than by chance
    "text.parse_math": False,  # a dollar sign in a data set's name is a dollar sign
}


def render(figure: Figure) -> tuple[str, bytes]:
    """The figure as SVG text and as PNG bytes."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=160)
    return svg.getvalue(), png.getvalue()


def group_styles(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """Colour and dashes of each group's line; conventional training is grey."""
    taken: dict[str, int] = {}
    styles = []
    others = iter(range(len(groups)))
    for group in groups:
        colour = CONVENTIONAL if group.runs[0].is_conventional else None
        if colour is None or colour in taken:
            colour = OTHERS[next(others) % len(OTHERS)]
        taken[colour] = taken.get(colour, -1) + 1
        styles.append({"color": colour, "linestyle": ("-", "--", ":")[min(taken[colour], 2)]})
    return styles


def layer_axis(axis: Any, num_layers: int) -> None:
    """A tick for every layer, or for every fourth where there are many."""
    axis.set_ticks(range(0, num_layers, 1 if num_layers <= 16 else 4))


def bare(axes: Axes) -> None:
    """No ticks and no frame: the picture's own edges are enough."""
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def percent(value: float, _: object = None) -> str:
    """A share as a whole percentage, also as a formatter of an axis, which passes a position."""
    return f"{value:.0%}"
