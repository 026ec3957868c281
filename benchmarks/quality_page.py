"""Writes docs/quality.md and its pictures from what benchmarks/quality.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from quality_opening import what_holds
from quality_pictures import draw_front, draw_panels, draw_patterns
from quality_rows import (
    FIXED,
    Groups,
    Row,
    at_best_rate,
    best_fixed,
    common_seeds,
    front_of,
    mean,
    points_of,
    rank_correlation,
    ratio,
)

from layer_tying.report.markdown import markdown_table


def write_page(results: Row, folder: Path) -> None:
    """Write the page and its pictures into a folder of documentation."""
    rows = results["rows"]
    regimes = list(results["settings"])
    settings = sorted(
        {(r["set"], r["regime"]) for r in rows}, key=lambda s: (regimes.index(s[1]), s)
    )
    if not settings:
        return
    (folder / "images").mkdir(exist_ok=True)
    for name, draw in (("front", draw_front), ("patterns", draw_patterns)):
        figure = draw_panels(rows, settings, draw)
        figure.savefig(folder / "images" / f"quality-{name}.png", dpi=150)
    columns = [(at_best_rate(rows, text, regime), regime) for text, regime in settings]
    heads = [f"{text}, {regime}" for text, regime in settings]
    parts = ["# Quality", what_holds([groups for groups, _ in columns]), *_FRONT]
    parts += ["## How it was measured", *_introduction(results)]
    parts += ["## The bandit compared with other methods", _COMPARED, _compared(heads, columns)]
    parts += [_TARGETS, "## Patterns of equal size", *_PATTERNS]
    for head, (groups, _) in zip(heads, columns, strict=True):
        parts += [f"## {head}", _table(groups)]
    page = "\n\n".join(parts) + "\n"
    (folder / "quality.md").write_text(page, encoding="utf-8")


def _introduction(results: Row) -> list[str]:
    rows = results["rows"]
    shapes: dict[str, list[str]] = {}  # what is trained -> in which regimes
    for regime, settings in results["settings"].items():
        steps = next(r["steps"] for r in rows if r["regime"] == regime)
        shapes.setdefault(_shape(settings, steps), []).append(regime)
    trained = "; ".join(f"{', '.join(regimes)}: {shape}" for shape, regimes in shapes.items())
    machine = sorted({r["hardware"]["processor"] for r in rows})
    versions = sorted({f"torch {r['versions']['torch']}" for r in rows})
    return [
        f"All methods train on the same data in the same order with the same seeds ({trained}). "
        f"The learning rate of each method was chosen from the same values, by the validation "
        f"perplexity of the first seed. `make bench-quality` writes this page from "
        f"`benchmarks/results/quality.json`: {len(rows)} runs with one thread each, "
        f"{', '.join(machine)}, {', '.join(versions)}.",
        "Perplexity is per token of the test text, with the weights that were best on validation. "
        "Where there are several seeds, the mean and the standard deviation are given; where there "
        "is one seed, differences of a few per cent may be chance. *Rise after* is the validation "
        "perplexity at the end of training divided by its minimum. `bandit-M` starts from "
        "`sandwich-M` and keeps M independent layers; its initial weights have 1/n residual "
        "scaling, which the suffix `1/n` denotes for other methods. `bandit, priced` also begins "
        "and ends groups. The [log](log.md) describes the experiments that led here.",
    ]


def _shape(settings: Row, steps: int) -> str:
    positions = {"llama": "rotary positions", "gpt2": "GPT-2's shape"}[settings["family"]]
    return (
        f"{settings['nlayers']} layers x {settings['emsize']}, {positions}, {steps} steps of "
        f"{settings['batch_size']} x {settings['bptt']} tokens"
    )


_FRONT = (
    "![Perplexity against mean model state](images/quality-front.png)",
    "Lower and further left is better. The line is the Pareto front. The label of a star is the "
    "bandit's number of independent layers M; the label of a square is the number of layers of a "
    "conventional model.",
)
_PATTERNS = (
    "![Perplexity by the number of independent layers](images/quality-patterns.png)",
    "The same perplexities by the mean number of independent layers. The best fixed pattern of "
    "each size is labelled. The dashed line is conventional training with 12 layers.",
)
_COMPARED = (
    "The bandit's perplexity divided by that of another method: below 1 the bandit is better, and "
    "**bold** marks a target that is met. Only seeds that both methods have are counted; their "
    "number is in parentheses. The best fixed pattern is the best one with the same number of "
    "independent layers and standard initial weights."
)
_TARGETS = (
    "The targets are: at most 1.00 relative to the best fixed pattern, to the starting pattern and "
    "to conventional training in a single epoch, and 0.92 relative to conventional training in "
    "several epochs; less than 1.00 relative to random changes, which stop when the bandit does; a "
    "chosen size that no other method beats in both perplexity and mean model state; and at most "
    "2 % of the time for decisions. *Rank correlation* is Spearman's, between the bandit's "
    "estimated worths of fixed patterns of neighboring layers and the perplexities of these "
    "patterns; their number is in parentheses."
)
Cell = Callable[[Groups, str], str]  # of the methods' groups, in a regime


def _compared(heads: Sequence[str], columns: Sequence[tuple[Groups, str]]) -> str:
    """One line for each comparison, one column for each text and regime."""
    lines: list[tuple[str, Cell]] = [
        *((f"M = {m}: best fixed pattern", _of_best_fixed(m)) for m in FIXED),
        ("M = 3: conventional training", _of("conventional")),
        ("M = 3: conventional, 3 layers", _of("conventional, 3 layers")),
        ("M = 3: `sandwich-3`", _of("sandwich-3")),
        ("M = 3: `sandwich-3, 1/n`, its start", _of("sandwich-3, 1/n")),
        ("M = 3: `random`", _of("random")),
        ("M = 3: `random, 1/n`", _of("random, 1/n")),
        ("M = 3: the paper's agent", _of("dqn")),
        ("rank correlation", lambda groups, _: rank_correlation(groups)),
        ("chosen size: layers, on the front", _size_of_its_own),
        ("time of decisions", _time_of_decisions),
    ]
    return markdown_table(
        ["", *heads], [[name, *(cell(*column) for column in columns)] for name, cell in lines]
    )


def _of_best_fixed(m: int) -> Cell:
    def cell(groups: Groups, _: str) -> str:
        best = best_fixed(groups, m)
        return f"{_share(groups, f'bandit-{m}', best, 1.0)} {best}" if best else ""

    return cell


def _of(rival: str) -> Cell:
    def cell(groups: Groups, regime: str) -> str:
        is_harder = (rival, regime) == ("conventional", "multi-epoch")
        return _share(groups, "bandit-3", rival, 0.92 if is_harder else 1.0)

    return cell


def _share(groups: Groups, ours: str, rival: str, most: float) -> str:
    share = ratio(groups, ours, rival)
    if share is None:
        return ""
    figure = f"**{share:.3f}**" if round(share, 3) <= most else f"{share:.3f}"
    return f"{figure} ({len(common_seeds(groups, ours, rival))})"


def _size_of_its_own(groups: Groups, _: str) -> str:
    if "bandit, priced" not in groups:
        return ""
    layers = mean(groups["bandit, priced"], "independent_layers_mean")
    is_on = "bandit, priced" in front_of(points_of(groups, "model_state_bytes_mean"))
    return f"{layers:.1f}, {'**yes**' if is_on else 'no'}"


def _time_of_decisions(groups: Groups, _: str) -> str:
    ours = [rows for name, rows in groups.items() if name.startswith("bandit")]
    if not ours:
        return ""
    most = max(mean(rows, "decision_overhead") for rows in ours)
    return f"**{most:.1%}**" if most <= 0.02 else f"{most:.1%}"


def _table(groups: Groups) -> str:
    heads = (
        *("method", "perplexity", "bits/byte", "validation", "rise after"),
        *("independent, mean", "end"),
        *("state, mean MB", "peak MB", "s/step", "decisions", "learning rate", "seeds"),
    )
    ordered = sorted(groups.items(), key=lambda item: mean(item[1], "test_perplexity"))
    return markdown_table(heads, (_cells(name, rows) for name, rows in ordered))


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    spread = [r["test_perplexity"] for r in rows]
    deviation = f" ± {statistics.stdev(spread):.3f}" if len(rows) > 1 else ""
    return [
        name,
        f"{statistics.fmean(spread):.3f}{deviation}",
        f"{mean(rows, 'bits_per_byte'):.3f}",
        f"{mean(rows, 'validation_perplexity'):.3f}",
        f"{mean(rows, 'rise_after_the_best'):.2f}",
        f"{mean(rows, 'independent_layers_mean'):.2f}",
        f"{mean(rows, 'independent_layers_end'):.1f}",
        f"{mean(rows, 'model_state_bytes_mean') / 1e6:.2f}",
        f"{mean(rows, 'model_state_bytes_peak') / 1e6:.2f}",
        f"{mean(rows, 'seconds_per_step'):.3f}",
        f"{mean(rows, 'decision_overhead'):.1%}",
        f"{rows[0]['lr']:g}",
        str(len(rows)),
    ]
