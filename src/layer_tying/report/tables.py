"""The comparison of runs, and the figures of the paper next to those of runs on text.

A table is (heads, rows): heads are pairs of a heading, which neighbouring columns may share, and
the column's own name; rows are lists of text. The page and the terminal show the same cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layer_tying.paper.published import GPT2_WIKITEXT2
from layer_tying.report.formats import (
    format_bytes,
    format_number,
    format_percent,
    format_scaled,
    format_times,
)
from layer_tying.report.markdown import markdown_table
from layer_tying.report.runs import (
    RunGroup,
    Spread,
    conventional_for,
    counted,
    group_runs,
    numbers,
    places,
    spread,
)
from layer_tying.runs.reading import Run

Table = tuple[list[tuple[str, str]], list[list[str]]]

TERMINAL_WIDTH = 100
RATIO = "seconds_per_step over conventional"


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its names, the number it shows, and how that is written."""

    heading: str  # over neighbouring columns of the page that share it
    name: str
    short: str  # its name in the terminal
    key: str  # in `runs.numbers`, or RATIO
    write: Callable[[float, float], str]
    rank: int  # in the terminal, where not all columns fit, those of high rank go first


def _three_digits(value: float, sd: float = math.nan) -> str:
    return format_number(value, sd, digits=3)


def _whole(value: float, sd: float = math.nan) -> str:
    is_whole = not math.isfinite(sd) and float(value).is_integer()
    return format_number(value, sd, digits=0 if is_whole else 1)


def _megabytes(value: float, sd: float = math.nan) -> str:
    text = format_number(value / 1e6, sd / 1e6, digits=2)
    return f"{text} MB" if math.isfinite(value) else text


# fmt: off
OUTCOME = (
    Column("perplexity", "validation", "val. ppl", "validation_perplexity", format_number, 0),
    Column("perplexity", "test", "test ppl", "test_perplexity", format_number, 10),
    Column("bits per byte", "test", "test b/B", "bits_per_byte", _three_digits, 6),
    Column("accuracy", "test", "test acc.", "accuracy", format_percent, 1),
    Column("accuracy", "masked tokens", "masked", "masked_accuracy", format_percent, 1),
    Column("accuracy", "last words", "last word", "last_word_accuracy", format_percent, 1),
    Column("", "F1", "F1", "f1", _three_digits, 1),
    Column("", "Matthews correlation", "Matthews", "matthews_correlation", _three_digits, 1),
    Column("independent layers", "mean", "indep.", "independent_layers_mean", format_number, 2),
    Column("independent layers", "end", "end", "independent_layers_end", _whole, 8),
    Column("independent layers", "of", "of", "num_layers", _whole, 11),
    Column("trainable parameters", "mean", "params", "trainable_parameters_mean", format_scaled, 3),
    Column("trainable parameters", "end", "at end", "trainable_parameters_end", format_scaled, 13),
    Column("trainable parameters", "of conv.", "share", "share_of_conventional", format_percent, 4),
)
COST = (
    Column("model state", "mean", "state", "model_state_bytes_mean", format_bytes, 5),
    Column("model state", "peak", "its peak", "model_state_bytes_peak", format_bytes, 12),
    Column("", "peak memory", "memory", "peak_memory_bytes", format_bytes, 14),
    Column("time per step", "seconds", "s/step", "seconds_per_step", _three_digits, 7),
    Column("time per step", "of conv.", "time", RATIO, format_times, 9),
    Column("time per step", "for decisions", "decisions", "decision_overhead", format_percent, 15),
)
QUALITY = (
    "validation_perplexity", "test_perplexity", "bits_per_byte", "accuracy", "masked_accuracy",
    "last_word_accuracy", "f1", "matthews_correlation",
)  # fmt: skip
PAPER_COLUMNS = (
    ("", "perplexity", "test_perplexity", format_number),
    ("trainable parameters", "mean", "trainable_parameters_mean", format_scaled),
    ("trainable parameters", "end", "trainable_parameters_end", format_scaled),
    ("independent layers", "mean", "independent_layers_mean", format_number),
    ("independent layers", "end", "independent_layers_end", _whole),
    ("memory", "peak", "peak_memory_bytes", _megabytes),
    ("memory", "mean", "model_state_bytes_mean", _megabytes),
)
# fmt: on


def comparison(groups: Sequence[RunGroup], columns: Sequence[Column]) -> Table:
    """The columns of OUTCOME or COST, without those that hold nothing; a row a group."""
    columns = _telling_columns(groups, columns)
    heads = [("", "run"), *((column.heading, column.name) for column in columns)]
    rows = [
        [marked_title(group), *(_cell(column, group, groups) for column in columns)]
        for group in groups
    ]
    return heads, rows


def comparison_table(runs: Sequence[Run]) -> str:
    """The comparison as a Markdown table of at most 100 columns, a row for a run or its seeds.

    Columns that tell nothing are left out, then those of least interest until the table fits.
    """
    groups = group_runs(runs)
    columns = _telling_columns(groups, OUTCOME + COST)
    fewest = sorted(columns, key=lambda column: column.rank)[:1]
    if _markdown(groups, fewest).index("\n") > TERMINAL_WIDTH:
        return _markdown(groups, columns)  # labels alone are too long
    while (table := _markdown(groups, columns)).index("\n") > TERMINAL_WIDTH:
        columns.remove(max(columns, key=lambda column: column.rank))
    return table


def with_the_paper(groups: Sequence[RunGroup]) -> Table | None:
    """The published rows, then conventional and dynamic GPT-2s on text; None if there are none."""
    ours = [
        group
        for group in groups
        if (group.runs[0].is_conventional or group.runs[0].is_dynamic)
        and group.runs[0].setting("family") == "gpt2"
        and not group.runs[0].setting("task")
        and math.isfinite(spread(group, "validation_perplexity").mean)
    ]
    if not ours:
        return None
    heads = [("", "run"), *((heading, name) for heading, name, *_ in PAPER_COLUMNS)]
    rows = []
    for name, known in GPT2_WIKITEXT2.items():
        cells = [write(known.get(key, math.nan), math.nan) for *_, key, write in PAPER_COLUMNS]
        rows.append([f"paper: {name}", *cells])
    for group in ours:
        cells = [_written(spread(group, key), write) for *_, key, write in PAPER_COLUMNS]
        rows.append([f"here: {marked_title(group)}", *cells])
    return heads, rows


def run_list(groups: Sequence[RunGroup]) -> Table:
    """Where each run lies and how far it got."""
    names = ("folder", "run", "seed", "steps", "seen", "decisions", "events", "state")
    place_of = iter(places([run for group in groups for run in group.runs]))
    rows = []
    for group in groups:
        for run in group.runs:
            reached = numbers(run)
            events = sum(line.get("event") is not None for line in run.decisions)
            rows.append([
                next(place_of),
                group.label,
                str(run.setting("seed", "—")),
                format_number(reached.get("steps", math.nan), digits=0),
                f"{format_scaled(reached.get('tokens', math.nan))} {counted(run)}",
                str(len(run.decisions) - 1),
                str(events),
                "unfinished" if run.summary is None else "finished",
            ])  # fmt: skip
    return [("", name) for name in names], rows


def marked_title(group: RunGroup) -> str:
    """The group's title, saying so where runs are unfinished."""
    if not group.num_unfinished:
        return group.title
    if len(group.runs) == 1:
        return f"{group.title}, unfinished"
    return f"{group.title}, {group.num_unfinished} unfinished"


def value_of(key: str, group: RunGroup, groups: Sequence[RunGroup]) -> Spread:
    """One number of a group, over its seeds; relative ones by the conventional run among groups."""
    if key == RATIO:
        time, baseline = spread(group, "seconds_per_step"), conventional_for(group, groups)
        unit = spread(baseline, "seconds_per_step").mean if baseline else math.nan
        return Spread(time.mean / unit, time.sd / unit) if unit else Spread(math.nan, math.nan)
    found = spread(group, key)
    if key == "share_of_conventional" and not math.isfinite(found.mean):
        trained, baseline = (
            spread(group, "trainable_parameters_mean"),
            conventional_for(group, groups),
        )
        unit = spread(baseline, "trainable_parameters_mean").mean if baseline else math.nan
        return Spread(trained.mean / unit, trained.sd / unit)
    return found


def _cell(column: Column, group: RunGroup, groups: Sequence[RunGroup]) -> str:
    return _written(value_of(column.key, group, groups), column.write)


def _written(value: Spread, write: Callable[[float, float], str]) -> str:
    """The value with its spread, unless all seeds agree, as those of a static policy do."""
    return write(value.mean, value.sd if value.sd > 1e-9 * abs(value.mean) else math.nan)


def _telling_columns(groups: Sequence[RunGroup], columns: Sequence[Column]) -> list[Column]:
    """The columns that some group has a number for; L only where it differs."""
    depths = {group.runs[0].num_layers for group in groups}
    return [
        column
        for column in columns
        if any(math.isfinite(value_of(column.key, group, groups).mean) for group in groups)
        and (column.key != "num_layers" or len(depths) > 1)
    ]


def _markdown(groups: Sequence[RunGroup], columns: Sequence[Column]) -> str:
    """The columns as a Markdown table; only quality is given with its spread, for width."""

    def cell(group: RunGroup, column: Column) -> str:
        value = value_of(column.key, group, groups)
        return column.write(value.mean, value.sd if column.key in QUALITY else math.nan)

    return markdown_table(
        ["run", *(column.short for column in columns)],
        [[marked_title(group), *(cell(group, column) for column in columns)] for group in groups],
    )
