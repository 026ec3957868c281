"""The page on what the paper's agent learns, from the results of `agent.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from common import mean_and_spread
from matplotlib.figure import Figure

from layer_tying.files import write_text_whole
from layer_tying.report.markdown import markdown_table
from layer_tying.report.style import ACCENT, CONVENTIONAL, INK, OTHERS, STYLE

DOCS = Path(__file__).parent.parent / "docs"
COMMITTED = Path(__file__).parent / "results/agent.json"
AGENT, LITERAL, PERMUTED, RANDOM, START = "dqn", "dqn-literal", "permuted", "random", "start"
ABOUT = {
    AGENT: ("the agent, reward: minus the logarithm of the perplexity", ACCENT),
    LITERAL: ("the agent, reward: minus the perplexity (the paper's)", OTHERS[3]),
    PERMUTED: ("the agent's decisions, of permuted layers", OTHERS[1]),
    RANDOM: ("random changes", CONVENTIONAL),
    START: ("its start: all layers share one set of weights", INK),
}
HOW = (
    "A model of 12 layers x 32 trains on the bytes of WikiText-2 for 6,000 steps of 8 x 64 tokens "
    "at a learning rate of 0.004, which was not tuned; the agent decides every five steps, which "
    "makes 1,200 decisions. Its epsilon is at the floor of 0.1 from the 46th on. *Permuted* takes "
    "the decisions of the first row at the same steps and applies them to a fixed permutation of "
    "the layers, which changes the model as often. *Random* draws an owner for each layer, "
    "uniformly, at every decision. *Persistence* is how often a layer makes its most frequent "
    "choice in the last quarter of the decisions: an agent that has settled on a tying makes it in "
    "about nine of ten. Perplexities are of bytes, at the weights that were best on validation. "
    "`python benchmarks/agent.py` writes this page from `benchmarks/results/agent.json`."
)
WINDOW = 10  # logged losses, 50 steps apart, of which a point of the picture is the mean
Rows = Sequence[dict[str, Any]]


def write_page(results: Path) -> Path:
    """Write docs/agent.md and its picture; into the folder of the results if these are others."""
    groups = groups_of(results)
    folder = DOCS if results.resolve() == COMMITTED else results.parent
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _draw(groups).savefig(folder / "images/agent.png", dpi=150)
    parts = [
        "# What the agent learns",
        answer(groups),
        _table(groups),
        "![Training loss of four methods above that of the start](images/agent.png)",
        f"How far the training loss is above that of the start, in nats: means over "
        f"{WINDOW * 50} steps, and the range over the seeds.",
        "## How it was measured",
        HOW,
    ]
    write_text_whole(folder / "agent.md", "\n\n".join(parts) + "\n")
    return folder / "agent.md"


def groups_of(results: Path) -> dict[str, Rows]:
    """The runs of a file of results, by method."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    of_each: dict[str, Rows] = {m: [r for r in rows if r["method"] == m] for m in ABOUT}
    return {method: mine for method, mine in of_each.items() if mine}


def answer(groups: dict[str, Rows]) -> str:
    """The finding, whichever it is, in the opening sentences."""
    sentences = []
    for other, what in (
        (START, "its starting tying, kept for the whole run"),
        (PERMUTED, "its own decisions, applied to permuted layers"),
        (RANDOM, "random changes"),
    ):
        pairs = _pairs(groups, AGENT, other)
        if pairs:
            ratio = statistics.fmean(ours / theirs for ours, theirs in pairs)
            wins = sum(ours < theirs for ours, theirs in pairs)
            sentences.append(
                f"The agent has {ratio:.3f} times the perplexity of {what}, and is better in "
                f"{wins} of {len(pairs)} seeds."
            )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _pairs(groups: dict[str, Rows], ours: str, other: str) -> list[tuple[float, float]]:
    """Test perplexities of two methods, by seeds that both have."""
    one, two = ({r["seed"]: r["test"] for r in groups.get(m, [])} for m in (ours, other))
    return [(one[seed], two[seed]) for seed in sorted(one.keys() & two.keys())]


def _table(groups: dict[str, Rows]) -> str:
    heads = ["", "test perplexity", "late training loss", "independent layers, mean"]
    heads += ["decisions", "changes", "persistence", "seeds"]
    return markdown_table(
        heads,
        [
            [
                ABOUT[method][0],
                _spread(rows, "test"),
                _spread(rows, "late_loss"),
                _spread(rows, "independent", 2),
                f"{_mean(rows, 'decisions'):,.0f}",
                f"{_mean(rows, 'changes'):,.0f}",
                "-" if method in (PERMUTED, START) else _spread(rows, "persistence", 2),
                str(len(rows)),
            ]
            for method, rows in groups.items()
        ],
    )


def _mean(rows: Rows, name: str) -> float:
    return statistics.fmean(r[name] for r in rows)


def _spread(rows: Rows, name: str, digits: int = 3) -> str:
    return mean_and_spread([row[name] for row in rows], digits)


def _draw(groups: dict[str, Rows]) -> Figure:
    starts = {row["seed"]: _smooth(row) for row in groups.get(START, [])}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for method in (AGENT, LITERAL, PERMUTED, RANDOM):
            rows = [row for row in groups.get(method, []) if row["seed"] in starts]
            if not rows:
                continue
            above = [_differences(_smooth(row), starts[row["seed"]]) for row in rows]
            at_each = list(zip(*above, strict=True))
            steps = [(1 + i) * WINDOW * 50 for i in range(len(at_each))]
            label, colour = ABOUT[method]
            low, high = list(map(min, at_each)), list(map(max, at_each))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(steps, list(map(statistics.fmean, at_each)), color=colour, label=label)
        axes.axhline(0, color=INK, lw=0.8, label=ABOUT[START][0])
        axes.set_xlabel("steps")
        axes.set_ylabel("training loss above the start's")
        axes.set_ylim(bottom=-0.02)
        figure.legend(loc="outside lower center", ncols=1)
        figure.canvas.draw()
    return figure


def _smooth(row: dict[str, Any]) -> list[float]:
    """Means of the training loss over windows of steps."""
    losses = [loss for _, loss in row["losses"]]
    whole = len(losses) - len(losses) % WINDOW
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, whole, WINDOW)]


def _differences(ours: list[float], theirs: list[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]
