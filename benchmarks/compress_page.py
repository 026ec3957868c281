"""Writes `docs/compress.md` and its picture from `benchmarks/results/compress.json`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from common import Case, with_several_rates
from compress_rivals import RIVALS
from compress_teachers import SCRATCH, TEACHERS
from matplotlib.figure import Figure
from quality_rows import GATE
from readme import README, write_between

from layer_tying.files import write_text_whole
from layer_tying.report.markdown import markdown_table
from layer_tying.report.style import ACCENT, CONVENTIONAL, STYLE

DOCS = Path(__file__).parent.parent / "docs"
MARKS = "<!-- compress: written by benchmarks/compress.py -->\n", "<!-- end of compress -->\n"
OURS = "compress"
AIMS = {4: 1.10, 6: 1.03}  # of the untouched perplexity, by layers kept of 12
AIM_BELOW, AIM_DECIDING = 0.95, 0.10
HOW = (
    "All methods but `trained from scratch` start from the same trained model, keep the same "
    "number of parameters to within about 1 %, and are healed on the same batches for a tenth of "
    "the steps that the model was trained for, with the same objective: nine tenths of the "
    "divergence from the untouched model's outputs, one tenth of the ordinary loss. The seed of "
    "healing sets the order of the data and the random draws. `compress` chooses the groups on two "
    "batches, and for BERT, whose batches are eight times as large as those of the text, on one. "
    "Ratios are of perplexities: per byte, or, of a ViT, per image. Times were taken while other "
    "work ran: compare them roughly. `make bench-compress` trains the models, measures what is "
    "claimed and its rivals (all of them for the text), goes on where it was stopped, and writes "
    "this page from `benchmarks/results/compress.json`. From nothing that takes 4.8 hours of one "
    "thread of this machine with nothing else on it, as added up from the measured time of each "
    "step; the other rows were measured by naming their methods."
)
SEARCH = "searches only groups of this kind."
WHAT = {
    "compress": "measures which groups of layers move the output least, and lets each layer learn "
    "a mixture of the kept ones.",
    "compress, tied": "ties the same groups.",
    "compress, hidden states": "also learns the hidden states after each layer "
    "(`--hidden-weight 1`).",
    "compress, gradual": "ties one group after another over the first half of the steps; before "
    "healing it is measured with the first one tied.",
    "compress, closed form": "starts the mixtures from a truncated singular value decomposition of "
    "all layers, weighted by activations.",
    "compress, neighbours": SEARCH,
    "compress, cycle": SEARCH,
    "compress, free": SEARCH,
    "compress, grown": SEARCH,
    "sequence, first layers": "ties neighbours, with the weights of each group's first layer.",
    "cycle, first layers": "ties layers in turn, with the weights of each group's first layer.",
    "random groups": "keeps random layers, and each other layer reads one of them at random.",
    "upper layers dropped": "keeps the first layers.",
    "least influential dropped": "keeps the layers of the largest block influence (ShortGPT, Men "
    "et al. 2024).",
    "low rank": "cuts each matrix by singular value decomposition; norms stay each layer's own.",
    SCRATCH: "is a conventional model of that many layers, trained for the teacher's steps and "
    "those of healing.",
}
Groups = Mapping[str, Sequence[Case]]  # the rows of each method at its best rate


def write_page(results: Path, folder: Path = DOCS) -> Path:
    """Write the page and its picture into a folder of documentation; returns the page."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = json.loads(results.read_text(encoding="utf-8"))
    sections = sections_of(found["rows"])
    draw(sections).savefig(folder / "images" / "compress.png", dpi=160)
    write_text_whole(folder / "compress.md", page_of(found, sections))
    if folder == DOCS:
        write_between(README, MARKS, short_table(sections))
    return folder / "compress.md"


def page_of(found: Mapping[str, Any], sections: Mapping[tuple[str, int], Groups]) -> str:
    """The page in Markdown."""
    lines = [line for section in sections.items() for line in _findings(*section)]
    gates = [_gate(teacher, found["rows"]) for teacher in dict.fromkeys(t for t, _ in sections)]
    parts = ["# Compression of a trained model"]
    parts.append("\n".join(f"- {line}" for line in [*sorted(lines, key=_is_met), *gates]))
    parts.append("![Perplexity after healing, by method](images/compress.png)")
    measured = {method for groups in sections.values() for method in groups}
    what = [f"- `{method}` {about}" for method, about in WHAT.items() if method in measured]
    parts += ["## How it was measured", HOW, _rates(found["rows"]), "\n".join(what), _where(found)]
    for (teacher, sets), groups in sections.items():
        depth = TEACHERS[teacher].depth
        parts.append(f"## {teacher}: {sets} of {depth} layers")
        parts.append(_table(groups, _untouched(found["rows"], teacher)))
    return "\n\n".join(parts) + "\n"


def sections_of(rows: Sequence[Case]) -> dict[tuple[str, int], Groups]:
    """By teacher and number of layers kept: each method's rows, at its best learning rate."""
    kept = [row for row in rows if "error" not in row and row["steps"]]
    keys = dict.fromkeys((row["teacher"], row["sets"]) for row in kept)
    return {key: _at_best_rates([row for row in kept if _key(row) == key]) for key in keys}


def _key(row: Case) -> tuple[str, int]:
    return row["teacher"], row["sets"]


def _at_best_rates(rows: Sequence[Case]) -> Groups:
    groups = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        first = [row for row in own if row["seed"] == own[0]["seed"]]
        best = min(first, key=lambda row: row["validation"])["lr"]
        groups[method] = [row for row in own if row["lr"] == best]
    return dict(sorted(groups.items(), key=lambda each: _mean(each[1], "test")))


def _mean(rows: Sequence[Case], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _untouched(rows: Sequence[Case], teacher: str) -> Mapping[str, float]:
    """The teacher's perplexities, and its accuracy if it has one."""
    row = next(r for r in rows if r["teacher"] == teacher and "test_before" in r)
    names = ("validation", "test", "test_accuracy")
    return {name: row[f"{name}_before"] for name in names if row.get(f"{name}_before") is not None}


def _findings(key: tuple[str, int], groups: Groups) -> list[str]:
    """What holds and what does not, with the aims."""
    teacher, sets = key
    depth = TEACHERS[teacher].depth
    ours = groups[OURS]
    ratio = _mean(ours, "test") / ours[0]["test_before"]
    share = ours[0]["parameters"] / ours[0]["parameters_before"]
    part = f"`{teacher}`, {sets} of {depth} layers ({share:.0%} of the parameters)"
    lines = [f"{part}: {ratio:.3f} times the untouched perplexity{_aim(ratio, AIMS.get(sets))}"]
    for rival, which in _rivals(groups).items():
        below = _mean(ours, "test") / _mean(groups[rival], "test")
        lines.append(f"{part}: {below:.3f} times the perplexity of {which}{_aim(below, AIM_BELOW)}")
    deciding = _mean(ours, "seconds_deciding") / _mean(ours, "seconds")
    aim = _aim(deciding, AIM_DECIDING)
    return [
        *lines,
        f"{part}: choosing the groups took {deciding:.2f} times as long as healing{aim}",
    ]


def _rivals(groups: Groups) -> dict[str, str]:
    """The best of those that are healed alike, and the model from scratch, with their names."""
    healed = [name for name in groups if name in RIVALS]  # in the order of their figures
    found = {name: f"the best rival that is healed alike, {name}" for name in healed[:1]}
    if SCRATCH in groups:
        found[SCRATCH] = "a conventional model of that many layers, trained for all the steps"
    return found


def _aim(value: float, limit: float | None) -> str:
    if limit is None:
        return "."
    return f" (aim: at most {limit:.2f}, {'**met**' if value <= limit else 'missed'})."


def _is_met(line: str) -> bool:
    return "missed" not in line


def _gate(teacher: str, rows: Sequence[Case]) -> str:
    plain = next((r for r in rows if r["teacher"] == teacher and not r["steps"]), None)
    if plain is None:
        return f"`{teacher}`: the gate has not been run."
    share = _untouched(rows, teacher)["test"] / plain["test"]
    passed = "passed" if share <= GATE else "not passed"
    return (
        f"`{teacher}` ({TEACHERS[teacher].about}): the untouched model has {share:.3f} times the "
        f"perplexity of three layers trained for as long, so it has depth to lose (gate: at most "
        f"{GATE:.2f}, {passed})."
    )


def _rates(rows: Sequence[Case]) -> str:
    """Which methods had several learning rates to choose from."""
    healed = [row for row in rows if "error" not in row and row["steps"]]
    several = with_several_rates(healed, "teacher", "sets", "method")
    tuned = [f"`{method}` ({teacher}, {sets} layers)" for teacher, sets, method in several]
    return (
        f"Several learning rates were tried for {', '.join(tuned) or 'no method'}; the best was "
        f"chosen on validation with the first seed. The others had one."
    )


def _where(found: Mapping[str, Any]) -> str:
    environment = found["environment"]
    hardware, versions = environment["hardware"], environment["versions"]
    return (
        f"Machine: {hardware['processor']} ({hardware['device']}); torch {versions['torch']}, "
        f"transformers {versions['transformers']}; one thread a run."
    )


def _table(groups: Groups, untouched: Mapping[str, float]) -> str:
    heads = ["method", "before healing", "after, test", "of untouched", "parameters"]
    heads += ["seconds", "learning rate", "seeds"]
    lines = [_cells(*group, untouched) for group in groups.items()]
    if all(row.get("test_accuracy") for rows in groups.values() for row in rows):
        heads.append(f"accuracy ({untouched['test_accuracy']:.3f} untouched)")
        for line, rows in zip(lines, groups.values(), strict=True):
            line.append(f"{_mean(rows, 'test_accuracy'):.3f}")
    return markdown_table(heads, lines)


def short_table(sections: Mapping[tuple[str, int], Groups]) -> str:
    """The README's: `compress`, the best rival that is healed alike, and the model from scratch."""
    heads = ["untouched", "kept", "method", "parameters", "training steps"]
    heads.append("times the untouched perplexity")
    lines = []
    for (teacher, sets), groups in sections.items():
        record = TEACHERS[teacher]
        for method in [OURS, *_rivals(groups)]:
            rows = groups[method]
            steps = rows[0]["steps"] + (record.steps if method == SCRATCH else 0)
            base = groups[OURS][0]["test_before"]
            lines.append(
                [
                    record.what,
                    f"{sets} of {record.depth} layers",
                    f"**{method}**" if method == OURS else method,
                    f"{rows[0]['parameters'] / 1e6:.2f} M",
                    f"{steps:,}",
                    f"{_mean(rows, 'test') / base:.3f}",
                ]
            )
    return markdown_table(heads, lines)


def _cells(method: str, rows: Sequence[Case], untouched: Mapping[str, float]) -> list[str]:
    tests = [row["test"] for row in rows]
    spread = f" ± {statistics.stdev(tests):.3f}" if len(tests) > 1 else ""
    tied = rows[0].get("validation_tied")
    return [
        f"**{method}**" if method == OURS else method,
        "" if tied is None else f"{tied / untouched['validation']:.2f}",
        f"{statistics.fmean(tests):.3f}{spread}",
        f"{statistics.fmean(tests) / untouched['test']:.3f}",
        f"{rows[0]['parameters']:,}",
        f"{statistics.fmean(r['seconds'] + r.get('seconds_deciding', 0) for r in rows):.0f}",
        f"{rows[0]['lr']:g}",
        str(len(rows)),
    ]


def draw(sections: Mapping[tuple[str, int], Groups]) -> Figure:
    """Bars of perplexity after healing, as ratios to the untouched model's, a panel a size."""
    with matplotlib.rc_context(STYLE):
        lines = math.ceil(len(sections) / 2)
        figure = Figure(figsize=(9.6, 4.2 * lines), layout="constrained", facecolor="white")
        panels = figure.subplots(lines, 2, squeeze=False).ravel()
        for axes in panels[len(sections) :]:
            axes.set_visible(False)
        most = 1.0
        for axes, ((teacher, sets), groups) in zip(panels, sections.items(), strict=False):
            base = groups[OURS][0]["test_before"]
            values = [_mean(rows, "test") / base for rows in groups.values()]
            colours = [ACCENT if name.startswith(OURS) else CONVENTIONAL for name in groups]
            bars = axes.barh(list(groups), values, color=colours)
            axes.bar_label(bars, fmt="%.3f", fontsize=7.5, padding=2)
            axes.invert_yaxis()
            most = max(most, *values)
            axes.set_title(f"{teacher}: {sets} of {TEACHERS[teacher].depth} layers", loc="left")
            axes.set_xlabel("times the untouched perplexity, test")
        for axes in panels:  # a bar is what is lost
            axes.set_xlim(1, 1 + 1.2 * max(0.01, most - 1))
        figure.canvas.draw()
    return figure
