"""Writes docs/quality.md and its pictures from what benchmarks/quality.py measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import mean_and_spread
from quality_opening import what_holds
from quality_pictures import draw_against, draw_over_time, draw_panels
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

PICTURES = {
    "parameters": draw_against("trainable_parameters_mean", "parameters that train, millions"),
    "memory": draw_against(
        "model_state_bytes_mean", "parameters, gradients and optimizer state, MB"
    ),
    "time": draw_over_time,
}
HOW = (
    "All methods of a setting train on the same data in the same order for the same steps with the "
    "same seeds. A setting is compared only if conventional training of L layers beats that of k "
    "layers by 5 % or more: otherwise depth is worth nothing there, and neither is sharing it. "
    "`plain-L` is that ceiling, `plain-k` the rival of equal parameters, `narrow` has L layers of "
    "half the width, and `low-rank-k` has L layers whose matrices are products of two thin ones, "
    "with a share of k/L of the parameters. `cycle-3` and the other patterns are fixed, with k "
    "groups; `1/n` denotes that what a use adds to the residual stream is divided by the number of "
    "uses; `mixture-3` is the learned mixture of k shared sets, with such scaling. `plain-L`, "
    "`plain-k` and `mixture-k` have three learning rates each, chosen by the validation perplexity "
    "of the first seed; the others have the mixture's. Test figures belong to the weights that "
    "were best on validation. The gap closed is (plain-k - x) / (plain-k - plain-L). Times are "
    "steps times the seconds of a step of the fastest run; the machines did other work meanwhile, "
    "so compare them roughly. "
    "`make bench-quality` writes this page from `benchmarks/results/quality.json`. Earlier "
    "results, from runs too short for depth to pay, are in "
    "[a page of the log](log-short-runs.md)."
)


def write_page(rows: Sequence[Row], folder: Path) -> None:
    """Write the page and its pictures into a folder of documentation."""
    settings = settings_of(rows)
    if not settings:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    shown = {
        name: pair for name, pair in settings.items() if (gate(pair[1], pair[0]) or 1.0) <= GATE
    }
    parts = ["# Quality", what_holds(settings)]
    for name, draw in PICTURES.items() if shown else ():
        draw_panels(shown, draw).savefig(folder / "images" / f"quality-{name}.png", dpi=150)
        parts.append(f"![Quality against {name}](images/quality-{name}.png)")
    if shown:
        parts.append("Lower and further left is better. The line is the Pareto front.")
    parts += ["## How it was measured", HOW]
    for name, (setting, groups) in settings.items():
        parts += [f"## {name}", _about(setting, groups)]
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
        verdict = f"The gate is passed: depth is worth {1 - share:.1%}."
    else:
        verdict = f"The gate is not passed: depth is worth {1 - share:.1%}. Nothing is compared."
    return f"{setting.about} ({', '.join(machines)}; {', '.join(versions)}). {verdict}"


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
        f"{step_seconds(rows):.3f}",
        f"{rows[0]['lr']:g}",
        str(len(rows)),
        *(f"{100 * mean(rows, hop):.1f}" for hop in hops),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
