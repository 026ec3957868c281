"""Writes docs/quality.md and its pictures from what benchmarks/quality.py measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, mean_and_spread, with_several_rates
from quality_opening import in_the_papers_model, what_holds
from quality_pictures import draw_against, draw_panels, draw_times, with_times
from quality_rows import (
    GATE,
    Groups,
    Row,
    gap_closed,
    gate,
    mean,
    mean_figure,
    ratio,
    settings_of,
    step_seconds,
)
from quality_settings import Setting

from layer_tying.files import write_text_whole
from layer_tying.report.markdown import markdown_table

PAPER = RESULTS / "paper-small.json"
PICTURES = {
    "parameters": draw_against("trainable_parameters_mean", "parameters that train, millions"),
    "memory": draw_against(
        "model_state_bytes_mean", "parameters, gradients and optimizer state, MB"
    ),
}
HOW = (
    "All methods of a setting train on the same data in the same order for the same steps with the "
    "same seeds. A setting passes the gate, and is compared, only if the perplexity, or the error, "
    "of L conventional layers is at least 5 % lower than that of k layers: otherwise depth is "
    "worth nothing there, and neither is sharing it. Test figures belong to the weights that were "
    "best on validation. The gap closed is (plain-k - x) / (plain-k - plain-L). Times are steps "
    "times the seconds of a step, which methods took in turns with nothing else on the machine "
    "(`benchmarks/quality_times.py`; one thread, the fastest hundred steps of each). `make "
    "bench-quality` writes this page from `benchmarks/results/quality.json`. Earlier results, from "
    "runs too short for depth to pay, are in [a page of the log](log-short-runs.md)."
)
WHAT = {  # by the prefix of a method's name
    "plain": "`plain-L` and `plain-k` are conventional models: the ceiling, and the rival that has "
    "as many parameters as k shared layers.",
    "narrow": "`narrow` has L layers of half the width.",
    "low-rank": "`low-rank-k` has L layers whose matrices are products of two thin ones, with a "
    "share of k/L of the parameters.",
    "cycle": "`cycle-k` and other names of patterns are fixed patterns "
    "of k groups; with `1/n`, what a use adds to the residual stream is divided by the number of "
    "uses.",
    "mixture": "`mixture-k` is the learned mixture of k shared sets, with 1/n scaling unless it "
    "is called unscaled; `half the layers` means a model of L/2 layers.",
    "random": "`random` changes the tying at random for the first half of the steps.",
    "dqn": "`dqn` is the paper's agent.",
}


def write_page(rows: Sequence[Row], folder: Path) -> None:
    """Write the page and its pictures into a folder of documentation."""
    settings = settings_of(rows)
    if not settings:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shown = {
        name: pair for name, pair in settings.items() if (gate(pair[1], pair[0]) or 1.0) <= GATE
    }
    paper = json.loads(PAPER.read_text(encoding="utf-8"))["rows"]
    parts = ["# Quality", what_holds(settings), in_the_papers_model(paper)]
    for name, draw in PICTURES.items() if shown else ():
        draw_panels(shown, draw).savefig(folder / "images" / f"quality-{name}.png", dpi=150)
        parts.append(f"![Quality against {name}](images/quality-{name}.png)")
    if shown:
        parts.append("Lower and further left is better. The line is the Pareto front.")
    if timed := with_times(shown):
        draw_times(timed).savefig(folder / "images" / "quality-time.png", dpi=150)
        parts.append("![Quality against time](images/quality-time.png)")
    methods = {method for _, groups in settings.values() for method in groups}
    what = [
        f"- {about}" for start, about in WHAT.items() if any(m.startswith(start) for m in methods)
    ]
    parts += [
        "## How it was measured",
        f"{HOW} {_cost(rows)} Most ran two at a time.",
        _rates(rows),
        "\n".join(what),
    ]
    for name, (setting, groups) in settings.items():
        mine = [row for row in rows if row["setting"] == name]
        parts += [f"## {name}", f"{_about(setting, groups)} {_cost(mine)}"]
        if name in shown:
            parts.append(_table(setting, groups))
    write_text_whole(folder / "quality.md", "\n\n".join(parts) + "\n")


def _about(setting: Setting, groups: Groups) -> str:
    rows = [row for group in groups.values() for row in group]
    machines = sorted({r["hardware"]["device"] for r in rows})
    versions = sorted({f"torch {r['versions']['torch']}" for r in rows})
    share = gate(groups, setting)
    if share is None:
        verdict = "The gate has not been run."
    elif share <= GATE:
        verdict = f"The gate is passed: {_worth(setting, share)}."
    else:
        verdict = f"The gate is not passed: {_worth(setting, share)}. Nothing is compared."
    return f"{setting.about} ({', '.join(machines)}; {', '.join(versions)}). {verdict}"


def _cost(rows: Sequence[Row]) -> str:
    seconds = sum(row["steps"] * row["seconds_per_step"] for row in rows)
    return (
        f"The {len(rows)} runs, with those at other learning rates, took {seconds / 3600:.1f} "
        f"hours of one thread."
    )


def _worth(setting: Setting, share: float) -> str:
    what = "error" if setting.accuracy else "perplexity"
    return f"the {what} of `{setting.deep}` is {1 - share:.1%} lower than that of `{setting.rival}`"


def _rates(rows: Sequence[Row]) -> str:
    """Which methods had several learning rates to choose from."""
    several = with_several_rates(rows, "setting", "method")
    tuned = [f"`{method}` ({setting})" for setting, method in several]
    if not tuned:
        return "All methods of a setting were trained at one learning rate: none was tuned."
    return (
        f"Several learning rates were tried for {', '.join(tuned)}, and the best was chosen by the "
        f"validation perplexity, over the seeds that rates have in common; the others had one."
    )


def _table(setting: Setting, groups: Groups) -> str:
    heads = ["method", "accuracy, %"]
    if not setting.accuracy:
        heads = ["method", "perplexity", f"of {setting.deep}", f"of {setting.rival}"]
    heads += ["gap closed", "parameters", "state, MB", "s/step", "learning rate", "seeds"]
    hops = [name for name in next(iter(groups.values()))[0] if name.startswith("test_accuracy_k")]
    heads += [name.removeprefix("test_accuracy_") for name in hops]
    ordered = sorted(groups, key=lambda name: mean_figure(groups[name], setting))
    return markdown_table(heads, (_cells(name, setting, groups, hops) for name in ordered))


def _cells(name: str, setting: Setting, groups: Groups, hops: Sequence[str]) -> list[str]:
    rows = groups[name]
    closed = gap_closed(groups, setting, name)
    if setting.accuracy:
        compared = [mean_and_spread([100 * r["test_accuracy"] for r in rows], digits=2)]
    else:
        compared = [mean_and_spread([r["test_perplexity"] for r in rows], digits=4)]
        compared += [_share(ratio(groups, setting, name, x)) for x in (setting.deep, setting.rival)]
    return [
        name,
        *compared,
        "" if closed is None else f"{closed:.0%}",
        f"{mean(rows, 'trainable_parameters_mean'):,.0f}",
        f"{mean(rows, 'model_state_bytes_mean') / 1e6:.2f}",
        _seconds(step_seconds(rows)),
        f"{rows[0]['lr']:g}",
        str(len(rows)),
        *(f"{100 * mean(rows, hop):.1f}" for hop in hops),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
