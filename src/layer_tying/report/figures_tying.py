"""The pictures of which layers share weights: over training, at the end, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layer_tying.report.runs import RunGroup
from layer_tying.report.style import INK, MUTED, PAPER, SHARES, WIDE, bare, layer_axis, percent
from layer_tying.runs.reading import Run

OWNERS = LinearSegmentedColormap.from_list(
    "owners",
    ["#f3ead6", "#efcf86", "#bdc163", "#72b276", "#339a8c", "#2c7ba0", "#34579a", "#2b2b66"],
    N=1024,  # so that no two of many owners get the same entry
)
MAX_COLUMNS = 600  # decisions drawn: more are thinner than a pixel


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
    figure.colorbar(image, cax=legend, format=percent, ticks=[0, 0.25, 0.5, 0.75, 1])
    bare(legend)
    return figure


def _row_height(num_layers: int) -> float:
    """Inches a layer: few layers get taller rows, many still get room for a label."""
    return 0.25 if num_layers <= 16 else 0.115


def _every(run: Run, step: int = 1) -> str:
    """How far apart decisions are, and which of them are drawn where not all are."""
    every = run.setting("every")
    parts = [f"one every {every:,} optimizer steps"] if isinstance(every, int) else []
    parts += [f"one in {step} shown"] if step > 1 else []
    return f" ({', '.join(parts)})" if parts else ""


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
    """The owners seen, in order, taller the more they own; labels at least `room` apart.

    Each gets the room of a label, and what is left by the square roots of what they own.
    """
    seen = np.unique(owners)
    counts = np.bincount(owners.ravel(), minlength=len(colours))[seen]
    least = room if room * len(seen) <= 1 else 0.0
    heights = least + (1 - least * len(seen)) * np.sqrt(counts) / np.sqrt(counts).sum()
    tops = np.cumsum(heights) - heights
    bars = axes.bar(
        0, heights, bottom=tops, width=1, color=colours[seen], edgecolor=PAPER, linewidth=0.4
    )
    for owner, bar in zip(seen, bars, strict=True):
        bar.set_gid(f"swatch-{owner}")  # a dark page dims it as it dims images
    axes.set(xlim=(-0.5, 0.5), ylim=(1, 0), xticks=[])
    ticks, last = [], -1.0
    for owner, centre in zip(seen, tops + heights / 2, strict=True):
        if centre - last >= 0.999 * room:
            ticks.append((centre, str(owner)))
            last = centre
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.yaxis.tick_right()
    axes.set_title("owner", color=MUTED, loc="right")
    bare(axes)


def _final_rows(group: RunGroup) -> list[tuple[str, np.ndarray]]:
    """A label and the last owners of each seed, or of all where they agree."""
    last = [run.states[-1] for run in group.shown]
    if all(np.array_equal(last[0], owners) for owners in last):
        return [(group.label, last[0])]
    labels = [f"{group.label}, seed {run.setting('seed')}" for run in group.shown]
    return list(zip(labels, last, strict=True))


def _independent(group: RunGroup) -> np.ndarray:
    """Share of seeds in which a layer was independent after a decision: (L, decisions)."""
    num_decisions = min(len(run.states) for run in group.shown) - 1
    layers = np.arange(group.runs[0].num_layers)
    return np.mean([run.states[1 : num_decisions + 1] == layers for run in group.shown], axis=0).T
