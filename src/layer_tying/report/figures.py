"""The pictures of a report, drawn from runs with matplotlib's object-oriented API.

Every function returns a `Figure`; `render` turns it into SVG text and PNG bytes. Text, rules and
background have colours of their own (INK, MUTED, GRID, PAPER), so that a page can replace them in
the SVG by its own for light and dark. Colours of data hold on both and for the colour-blind: they
differ in lightness, and no picture needs its hues told apart to be read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from layer_tying.report.formats import format_bytes, format_number, format_scaled
from layer_tying.report.runs import RunGroup, curve
from layer_tying.runs.reading import Run

INK, MUTED, GRID, PAPER = "#1b1f25", "#69717c", "#dfe2e7", "#fefefe"
CONVENTIONAL, ACCENT = "#8a919b", "#1f77c4"
OTHERS = (ACCENT, "#d9730d", "#0f9d77", "#c45a9c", "#b8991a", "#6a5acd", "#56b4e9")
COMPONENTS = {"parameter": "#31688e", "gradient": "#35a58b", "moment": "#a5c957"}
OWNERS = LinearSegmentedColormap.from_list(
    "owners",
    ["#f3ead6", "#efcf86", "#bdc163", "#72b276", "#339a8c", "#2c7ba0", "#34579a", "#2b2b66"],
    N=1024,  # so that no two of many owners get the same entry
)
SHARES = LinearSegmentedColormap.from_list("shares", ["#eef2f6", "#8db8d8", "#2f6ea8", "#17294d"])
WIDE, NARROW = 9.6, 4.7  # inches
PERPLEXITY_RANGE = 20  # times the best: an untrained model's 50,000 would flatten all the rest
MAX_COLUMNS = 600  # decisions drawn: more are thinner than a pixel
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


def owner_colours(runs: Sequence[Run]) -> np.ndarray:
    """A colour for each owner, shape (L, 4), for runs of the same L.

    Owners keep their order along one scale from light to dark; those that own more other layers
    for longer take more of the scale, so that the groups one meets are the ones told apart.
    """
    layers = np.arange(runs[0].num_layers)
    owned = [np.bincount(run.states[run.states != layers], minlength=len(layers)) for run in runs]
    share = np.mean([count / run.states.size for count, run in zip(owned, runs, strict=True)], 0)
    weight = np.sqrt(share) + 0.25 / len(layers)
    position = np.cumsum(weight) - weight / 2
    span = position[-1] - position[0] or 1.0
    return OWNERS((position - position[0]) / span)


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


def draw_tying(run: Run, colours: np.ndarray) -> Figure:
    """Who owns whom over time: layers by decisions, a colour an owner, strokes for independence."""
    step = -(-len(run.states) // MAX_COLUMNS)
    columns = np.arange(0, len(run.states), step)
    owners = run.states[columns].T
    num_layers = len(owners)
    figure = Figure(
        figsize=(WIDE, 1.0 + num_layers * _row_height(num_layers)), layout="constrained"
    )
    axes, legend = figure.subplots(1, 2, width_ratios=(60, 1.3))
    extent = (-0.5 * step, columns[-1] + 0.5 * step, num_layers - 0.5, -0.5)
    axes.imshow(colours[owners], aspect="auto", interpolation="none", extent=extent)
    _stroke_independence(axes, owners, colours, columns - 0.5 * step, step)
    layer_axis(axes.yaxis, num_layers)
    axes.set(xlabel=f"decision{_every(run, step)}", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    bare(axes)
    _owner_legend(legend, owners, colours, room=0.13 / figure.get_figheight())
    return figure


def draw_final_tyings(groups: Sequence[RunGroup], colours: np.ndarray) -> Figure:
    """The tying each run ended with: a row a run, the owner's number in each layer's cell."""
    rows = [row for group in groups for row in _final_rows(group)]
    owners = np.stack([owners for _, owners in rows])
    num_layers = owners.shape[1]
    figure = Figure(figsize=(WIDE, 0.65 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(colours[owners], aspect="auto", interpolation="none")
    axes.set_xticks(np.arange(num_layers - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1.5)
    for (row, layer), owner in np.ndenumerate(owners):
        axes.text(
            layer, row, str(owner), ha="center", va="center_baseline",
            fontsize=8 if num_layers <= 24 else 6.5, color=_on(colours[owner]),
            fontweight="bold" if owner == layer else "normal", alpha=1 if owner == layer else 0.8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], color=INK)
    layer_axis(axes.xaxis, num_layers)
    axes.set_xlabel("layer")
    bare(axes)
    return figure


def draw_independence(group: RunGroup) -> Figure:
    """How often each layer was independent: layers by time windows, and over the whole run."""
    independent = _independent(group)
    num_layers, num_decisions = independent.shape
    num_windows = min(40, max(1, num_decisions // 4))
    windows = np.array_split(np.arange(num_decisions), num_windows)
    share = np.stack([independent[:, window].mean(axis=1) for window in windows], axis=1)
    figure = Figure(
        figsize=(WIDE, 1.1 + num_layers * _row_height(num_layers)), layout="constrained"
    )
    axes, total, legend = figure.subplots(1, 3, width_ratios=(46, 12, 1.3))
    extent = (0.5, num_decisions + 0.5, num_layers - 0.5, -0.5)
    image = axes.imshow(
        share, aspect="auto", interpolation="none", extent=extent, cmap=SHARES, vmin=0, vmax=1
    )
    layer_axis(axes.yaxis, num_layers)
    axes.set(xlabel=f"decision{_every(group.runs[0])}", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    bare(axes)
    layers = np.arange(num_layers)
    total.barh(layers, independent.mean(axis=1), height=0.7, color=SHARES(0.6))
    total.plot(1 / (layers + 1), layers, "|", color=INK, markersize=6, markeredgewidth=1.2)
    total.set(xlim=(0, 1.02), ylim=(num_layers - 0.5, -0.5), xlabel="whole run", yticks=[])
    total.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    bare(total)
    figure.colorbar(image, cax=legend, format=_percent, ticks=[0, 0.25, 0.5, 0.75, 1])
    bare(legend)
    return figure


def draw_curves(
    groups: Sequence[RunGroup], styles: Sequence[dict[str, Any]], key: str, axis_label: str
) -> Figure:
    """One metric over tokens, a line a group, a band of one standard deviation over seeds."""
    num_columns = 2 if max(len(group.title) for group in groups) <= 24 else 1
    num_rows = -(-len(groups) // num_columns) if len(groups) > 1 else 0
    figure = Figure(figsize=(NARROW, 2.75 + 0.17 * num_rows), layout="constrained")
    axes = figure.subplots()
    lows, highs = [], []
    for group, style in zip(groups, styles, strict=True):
        tokens, mean, sd = curve(group, key)
        marker = "o" if len(tokens) == 1 else None
        axes.plot(tokens, mean, linewidth=1.7, label=group.title, marker=marker, **style)
        if len(group.runs) > 1:
            axes.fill_between(tokens, mean - sd, mean + sd, color=style["color"], alpha=0.2, lw=0)
        lows.append(mean.min())
        highs.append(mean.max())
    _value_axis(axes, key, min(lows), max(highs))
    axes.set(xlabel="tokens", ylabel=axis_label)
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
        handles=[Patch(color=colour, label=f"{part}s") for part, colour in COMPONENTS.items()],
        loc="outside upper left", ncols=3, handlelength=1, handleheight=1, labelcolor=INK,
    )  # fmt: skip
    return figure


def _row_height(num_layers: int) -> float:
    """Inches a layer: few layers get taller rows, many still get room for a label."""
    return 0.25 if num_layers <= 16 else 0.115


def layer_axis(axis: Any, num_layers: int) -> None:
    """A tick for every layer, or for every fourth where there are many."""
    axis.set_ticks(range(0, num_layers, 1 if num_layers <= 16 else 4))


def bare(axes: Axes) -> None:
    """No ticks and no frame: the picture's own edges are enough."""
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _every(run: Run, step: int = 1) -> str:
    """How far apart decisions are, and which of them are drawn where not all are."""
    every = run.setting("every")
    parts = [f"one every {every:,} optimizer steps"] if isinstance(every, int) else []
    parts += [f"one in {step} shown"] if step > 1 else []
    return f" ({', '.join(parts)})" if parts else ""


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"


def _tick(text: str) -> str:
    """A formatted number without the zeros that a tick does not need."""
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".rstrip()


def _on(colour: np.ndarray) -> str:
    """Black or white, whichever reads better on the colour."""
    return "#ffffff" if colour[:3] @ (0.299, 0.587, 0.114) < 0.55 else "#000000"


def _stroke_independence(
    axes: Axes, owners: np.ndarray, colours: np.ndarray, starts: np.ndarray, width: int
) -> None:
    """A thin stroke through a layer's row for as long as it is independent."""
    for layer, row in enumerate(owners):
        changes = np.flatnonzero(np.diff(np.concatenate([[0], row == layer, [0]]).astype(int)))
        segments = [
            np.array(
                [(starts[first] + 0.15 * width, layer), (starts[last - 1] + 0.85 * width, layer)]
            )
            for first, last in changes.reshape(-1, 2)
        ]
        stroke = LineCollection(segments, colors=_on(colours[layer]), linewidths=1.1, alpha=0.85)
        stroke.set_capstyle("butt")
        axes.add_collection(stroke, autolim=False)


def _owner_legend(axes: Axes, owners: np.ndarray, colours: np.ndarray, room: float) -> None:
    """The owners seen, in order, taller the more they own; labels at least `room` apart."""
    seen = np.unique(owners)
    counts = np.bincount(owners.ravel(), minlength=len(colours))[seen]
    heights = np.sqrt(counts) / np.sqrt(counts).sum()
    tops = np.cumsum(heights) - heights
    bars = axes.bar(
        0, heights, bottom=tops, width=1, color=colours[seen], edgecolor=PAPER, linewidth=0.4
    )
    for owner, bar in zip(seen, bars, strict=True):
        bar.set_gid(f"swatch-{owner}")  # a dark page dims it as it dims images
    axes.set(xlim=(-0.5, 0.5), ylim=(1, 0), xticks=[])
    ticks, last = [], -1.0
    for owner, centre in zip(seen, tops + heights / 2, strict=True):
        if centre - last >= room:
            ticks.append((centre, str(owner)))
            last = centre
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.yaxis.tick_right()
    axes.set_title("owner", color=MUTED, loc="right")
    bare(axes)


def _final_rows(group: RunGroup) -> list[tuple[str, np.ndarray]]:
    """A label and the last owners of each seed, or of all where they agree."""
    last = [run.states[-1] for run in group.runs]
    if all(np.array_equal(last[0], owners) for owners in last):
        return [(group.label, last[0])]
    labels = [f"{group.label}, seed {run.setting('seed')}" for run in group.runs]
    return list(zip(labels, last, strict=True))


def _independent(group: RunGroup) -> np.ndarray:
    """Share of seeds in which a layer was independent after a decision: (L, decisions)."""
    num_decisions = min(len(run.states) for run in group.runs) - 1
    layers = np.arange(group.runs[0].num_layers)
    return np.mean([run.states[1 : num_decisions + 1] == layers for run in group.runs], axis=0).T


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
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(scaled(value))))


def _component_bytes(group: RunGroup) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of parameters, gradients and moments, (3,) each: over all lines, and where most."""
    means, peaks = [], []
    for run in group.runs:
        lines = np.stack([run.series(f"{part}_bytes") for part in COMPONENTS], axis=1)
        lines = lines[np.isfinite(lines).all(axis=1)]
        if len(lines):
            means.append(lines.mean(axis=0))
            peaks.append(lines[lines.sum(axis=1).argmax()])
    if not means:
        return np.zeros(len(COMPONENTS)), np.zeros(len(COMPONENTS))
    return np.mean(means, axis=0), np.mean(peaks, axis=0)
