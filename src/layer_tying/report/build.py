"""What is on the page and in which order, and the files that it is written to.

`report.html` is one self-contained file. Its figures are also written to `report_figures/`, as SVG
and PNG. Several seeds are shown as mean and sample standard deviation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from layer_tying.errors import InputError
from layer_tying.report import (
    figures_agent,
    figures_curves,
    figures_mixture,
    figures_tying,
    page,
    style,
    tables,
)
from layer_tying.report.album import Album
from layer_tying.report.formats import format_number, format_percent, format_times
from layer_tying.report.runs import (
    REPETITION_KEYS,
    RunGroup,
    conventional_for,
    curve,
    group_runs,
)
from layer_tying.runs.reading import Run, read_run

# name of its files, the figure, its caption -> HTML
Show = Callable[[str, Figure, str], Markup]

CURVES = {
    "validation_perplexity": (
        "validation perplexity",
        f"Lower is better; shown up to {figures_curves.PERPLEXITY_RANGE} times the best.",
    ),
    "validation_accuracy": ("validation accuracy", "Higher is better."),
    "loss": ("training loss", "On training batches."),
    "independent_layers": ("independent layers", "Layers with weights of their own."),
    "model_state_bytes": ("model state", "Parameters, gradients and optimizer state."),
}
LONGEST_NAME = 60  # of a run's label in the names of files
COMPARISON_NOTE = (
    "Validation selects; test is only reported. Means run over training; several seeds are mean ± "
    "standard deviation. “Of conv.” is relative to conventional training of the same model on the "
    "same data. Model state is parameters, gradients and optimizer state; peak memory is all that "
    "was measured (on a CPU, the whole process). “For decisions” is the share of time they took. "
    "1 MB is 10⁶ bytes."
)
GLUE_NOTE = "Of GLUE, “test” is the dev split, as the labels of its test split are not public."
PAPER_NOTE = (
    "Paper: David-Hay and Wolf, Dynamic Layer Tying for Parameter-Efficient Transformers, ICLR "
    "2024; GPT-2 with 48 layers of width 1,600 on WikiText-2. Perplexity is of the test split. "
    "Figures are comparable only for the same data, tokenizer and model size. Of runs here, the "
    "peak is of all memory and the mean is of the model state. A dash: not known."
)


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the page, and its figures into `<output stem>_figures/`; returns them, page first.

    Raises InputError for a folder that is not a run, and where nothing can be written.
    """
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    if not folders:
        raise InputError("no run folder given: name at least one")
    groups = group_runs([read_run(folder) for folder in folders])
    output = Path(output)
    try:
        album = Album(output)
        with matplotlib.rc_context(style.STYLE):
            sections = _sections(groups, album.show)
        html = page.document(_title(groups), _lead(groups), _tiles(groups), sections)
        output.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output}: cannot write the report: {error.strerror}") from None
    return [output, *album.written]


def _sections(groups: list[RunGroup], show: Show) -> list[tuple[str, list[Markup]]]:
    sections = {
        "Comparison": _comparison(groups),
        "Over training": [page.grid(curves)] if (curves := _curves(groups, show)) else [],
        "Which layers share weights": _ownership(groups, show),
        "What the layers mix": _mixtures(groups, show),
        "How often each layer was independent": _independence(groups, show),
        "What the agent expects": _expectations(groups, show),
        "Memory": _memory(groups, show),
        "The paper’s figures": _with_the_paper(groups),
        "Runs": [page.table(*tables.run_list(groups), kind="left"), _configuration(groups)],
    }
    return [(heading, blocks) for heading, blocks in sections.items() if blocks]


def _title(groups: list[RunGroup]) -> str:
    """What was trained on what, as far as the runs have it in common."""
    common = _common_configuration(groups)
    family, dataset = str(common.get("family", "")), str(common.get("dataset", ""))
    parts = [{"gpt2": "GPT-2", "bert": "BERT", "vit": "ViT", "llama": "Llama"}.get(family, family)]
    if "nlayers" in common:
        parts.append(f"with {common['nlayers']} layers")
    if dataset:
        parts.append(f"on {Path(dataset).name}")
    return " ".join(["Layer tying:", *filter(None, parts)]) if any(parts) else "Layer tying"


def _lead(groups: list[RunGroup]) -> str:
    runs = [run for group in groups for run in group.runs]
    unfinished = sum(group.num_unfinished for group in groups)
    names = ": " + ", ".join(group.title for group in groups) if len(groups) < 6 else ""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return count + names + (f" ({unfinished} unfinished)" if unfinished else "")


def _tiles(groups: list[RunGroup]) -> list[tuple[str, str]]:
    """The outcome of the foremost group in large numbers."""
    ours = _foremost(groups)
    baseline = conventional_for(ours, groups)

    def mean(key: str, group: RunGroup = ours) -> float:
        return tables.value_of(key, group, groups).mean

    quality, write = "validation_perplexity", format_number
    if math.isfinite(mean("accuracy")):
        quality, write = "accuracy", format_percent
    against = ""
    if baseline and baseline is not ours:
        against = f" (conventional: {write(mean(quality, baseline))})"
    share, time = mean("share_of_conventional"), mean(tables.RATIO)
    items = [
        (write(mean(quality)), f"{quality.replace('_', ' ')}, {ours.label}{against}"),
        (format_number(mean("independent_layers_mean")),
         f"independent layers of {ours.runs[0].num_layers}, mean over training"),
        (format_percent(share), "of conventional training’s parameters trained, mean"),
        (format_times(time), "of conventional training’s time a step"),
    ]  # fmt: skip
    return [(number, text) for number, text in items if number != "—"]


def _foremost(groups: list[RunGroup]) -> RunGroup:
    """The group that did best on validation, of those with shared layers if there are any."""

    def perplexity(group: RunGroup) -> float:
        value = tables.value_of("validation_perplexity", group, groups).mean
        return value if math.isfinite(value) else math.inf

    tied = [group for group in groups if not group.runs[0].is_conventional]
    return min(tied or groups, key=perplexity)


def _comparison(groups: list[RunGroup]) -> list[Markup]:
    """What came out, and what it cost."""
    both = [tables.comparison(groups, part) for part in (tables.OUTCOME, tables.COST)]
    is_glue = any(run.setting("task") for group in groups for run in group.runs)
    notes = [COMPARISON_NOTE, GLUE_NOTE] if is_glue else [COMPARISON_NOTE]
    return [page.table(*table) for table in both if len(table[0]) > 1] + [*map(page.note, notes)]


def _curves(groups: list[RunGroup], show: Show) -> list[Markup]:
    styles = style.group_styles(groups)
    blocks = []
    for key, (axis_label, explanation) in CURVES.items():
        shown = [index for index, group in enumerate(groups) if _has_curve(group, key)]
        if not shown:
            continue
        caption = f"{axis_label.capitalize()}. {explanation}"
        if any(len(groups[index].shown) > 1 for index in shown):
            caption += " Bands: one standard deviation over seeds."
        figure = figures_curves.draw_curves(
            [groups[index] for index in shown], [styles[index] for index in shown], key, axis_label
        )
        blocks.append(show(key, figure, caption))
    return blocks


def _has_curve(group: RunGroup, key: str) -> bool:
    """Whether the metric was logged; of images, accuracy is shown in place of perplexity."""
    is_image = len(curve(group, "validation_accuracy")[0]) > 0
    return len(curve(group, key)[0]) > 0 and not (is_image and key == "validation_perplexity")


def _ownership(groups: list[RunGroup], show: Show) -> list[Markup]:
    """How every run ended, then the history of the first seed of each deciding policy."""
    blocks = []
    for num_layers in sorted({group.runs[0].num_layers for group in groups}):
        alike = [group for group in groups if group.runs[0].num_layers == num_layers]
        colours = figures_tying.owner_colours([run for group in alike for run in group.runs])
        caption = (
            "The tying each run ended with. A cell names the layer whose weights are used there; "
            "cells of one number share one set of weights. Bold: independent layers."
        ) + _where_nothing_is_shared([run for group in alike for run in group.shown])
        final = figures_tying.draw_final_tyings(alike, colours)
        blocks.append(show(f"final_tyings_{num_layers}_layers", final, caption))
        for group in alike:
            run = group.shown[0]
            if run.is_dynamic:
                seed = f", seed {run.setting('seed')}" if len(group.runs) > 1 else ""
                caption = (
                    f"{group.label}{seed}. A column is the tying after a decision (0: the start), "
                    "a colour is an owner: cells of one colour in a column share one set of "
                    "weights. A stroke runs through a layer while it is independent."
                ) + _where_nothing_is_shared([run])
                figure = figures_tying.draw_tying(run, colours)
                blocks.append(show(f"tying_{_slug(group, groups)}", figure, caption))
    return blocks


def _where_nothing_is_shared(runs: Sequence[Run]) -> str:
    """What a tying means in runs whose layers use other weights than it says."""
    said = ""
    if any(run.policy == "mixture" for run in runs):
        said += (
            " Of learned mixtures it is the set that a layer started from; it reads a mixture of "
            "all sets."
        )
    if any(run.setting("sharing") == "frozen" for run in runs):
        said += " Where layers are frozen instead of tied, no weights are shared."
    if any(run.setting("initial") == "frozen" for run in runs):
        said += " With the literal start, a layer is frozen, not tied, until it first changes."
    return said


def _mixtures(groups: list[RunGroup], show: Show) -> list[Markup]:
    """The coefficients of the first seed of each group that learned mixtures."""
    return [
        show(
            f"mixtures_{_slug(group, groups)}",
            figures_mixture.draw_coefficients(group.shown[0]),
            f"{group.label}, seed {group.shown[0].setting('seed')}. The coefficients with which "
            "each layer (row) mixes the shared sets of weights (column), matrix by matrix, at the "
            "first, a middle and the last validation. Blue is positive and red negative; a tying "
            "would have one coefficient of 1 in each row. A dot marks the leading set.",
        )
        for group in groups
        if figures_mixture.validations(group.shown[0])
    ]


def _independence(groups: list[RunGroup], show: Show) -> list[Markup]:
    return [
        show(
            f"independence_{_slug(group, groups)}",
            figures_tying.draw_independence(group),
            f"{group.title}. The darker, the larger the share of decisions that left the layer "
            "independent. Right: over the whole run, with a mark where uniformly random decisions "
            "would be, 1 in i + 1 for layer i.",
        )
        for group in groups
        if all(run.is_dynamic for run in group.shown)
    ]


def _expectations(groups: list[RunGroup], show: Show) -> list[Markup]:
    """Those of the first run that recorded them."""
    recorded = [
        (f"{group.label}, seed {run.setting('seed')}.", run)
        for group in groups
        for run in group.runs
        if run.policy == "dqn" and any(line.get("q") for line in run.decisions)
    ]
    if not recorded:
        return []
    name, run = recorded[0]
    caption = (
        f"{name} The Q-network’s matrix: row i holds the expected return of each choice of "
        "layer i; darker is better, on a scale of its own. A dot marks the best choice; on the "
        "diagonal the layer is independent."
    )
    return [show("q_values", figures_agent.draw_q(run), caption)]


def _memory(groups: list[RunGroup], show: Show) -> list[Markup]:
    measured = [group for group in groups if len(curve(group, "model_state_bytes")[0])]
    if not measured:
        return []
    caption = (
        "Model state by component: mean over the logged steps and, paler, the largest. Activations "
        "are not part of it, and tying does not make them smaller."
    )
    return [show("memory", figures_curves.draw_memory(measured), caption)]


def _with_the_paper(groups: list[RunGroup]) -> list[Markup]:
    table = tables.with_the_paper(groups)
    return [page.table(*table), page.note(PAPER_NOTE)] if table else []


def _common_configuration(groups: list[RunGroup]) -> dict[str, object]:
    """The settings that are the same in all runs."""
    configs = [run.settings for group in groups for run in group.runs]
    return {
        key: value
        for key, value in configs[0].items()
        if key not in (*REPETITION_KEYS, "tyings")
        and all(other.get(key) == value for other in configs)
    }


def _configuration(groups: list[RunGroup]) -> Markup:
    """Common settings, and what the runs say of the machine; folded away."""
    known = _common_configuration(groups)
    summaries = [run.summary for group in groups for run in group.runs if run.summary]
    for key in ("hardware", "versions"):
        values = [summary[key] for summary in summaries if key in summary]
        if values and all(value == values[0] for value in values):
            known[key] = values[0]
    rows = [
        [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for key, value in known.items()
        if value is not None
    ]
    heads = [("", "setting"), ("", "value")]
    return page.details("What all runs have in common", page.table(heads, rows, kind="left"))


def _slug(group: RunGroup, groups: list[RunGroup]) -> str:
    """The group's label as part of a file name, numbered where it would be that of another one."""
    taken: list[str] = []
    for each in groups:
        words = re.sub(r"[^a-z0-9]+", "-", each.label.lower())
        name = words[:LONGEST_NAME].strip("-") or "run"
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        taken.append(next(free for free in names if free not in taken))
    return taken[groups.index(group)]
