"""The pictures of docs/results.md, from the run folders of the paper's rows on WikiText-2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from layer_tying.report.figures_curves import draw_curves
from layer_tying.report.figures_tying import draw_tying, owner_colours
from layer_tying.report.runs import RunGroup
from layer_tying.report.style import ACCENT, CONVENTIONAL, INK, OTHERS, STYLE
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.reading import has_ended, read_run

# The rows whose curves are drawn: their labels, and how.
CURVES = {
    "conventional": ("conventional, 12 layers", {"color": CONVENTIONAL}),
    "shallow": ("conventional, 3 layers", {"color": CONVENTIONAL, "linestyle": "--"}),
    "dynamic": ("the paper's agent", {"color": ACCENT}),
    "random": ("random changes", {"color": OTHERS[1]}),
    "cycle": ("cycle of 3, 1/n", {"color": OTHERS[2]}),
    "mixture": ("mixtures of 3, 1/n", {"color": INK}),
}
AGENT = "gpt2-wiki2-dynamic"


def draw_pictures(rows: Mapping[int, Mapping[str, TrainConfig]], folder: Path) -> list[Path]:
    """Draw what the finished runs of WikiText-2 have: perplexity over tokens, who owns whom.

    A picture is left as it is where runs that it shows are not here.

    Args:
        rows: of each seed, by name.
        folder: where the pictures go.
    """
    pictures = {}
    groups, styles = [], []
    for side, (label, style) in CURVES.items():
        runs = [of_seed[f"gpt2-wiki2-{side}"].folder for of_seed in rows.values()]
        finished = [read_run(run) for run in runs if has_ended(run)]
        if finished:
            groups.append(RunGroup(label, finished))
            styles.append(style)
    with matplotlib.rc_context(STYLE):
        if len(groups) == len(CURVES):
            label = "validation perplexity per byte"
            pictures["curves"] = draw_curves(groups, styles, "validation_perplexity", label)
        agents = [rows[seed][AGENT].folder for seed in sorted(rows)]
        agent = next((folder for folder in agents if has_ended(folder)), None)
        if agent:
            run = read_run(agent)
            figure = pictures["tying"] = draw_tying(run, owner_colours([run]))
            figure.axes[0].set_title(f"seed {run.setting('seed')}", loc="left")
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, figure in pictures.items():
            paths.append(folder / f"results-{name}.png")
            figure.savefig(paths[-1], dpi=160)
    return paths
