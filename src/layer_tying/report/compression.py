"""The page of a compression: its groups, what was measured to find them, and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from layer_tying.errors import InputError
from layer_tying.report import figures_compression, page, style
from layer_tying.report.album import Album
from layer_tying.report.formats import format_bytes, format_number, format_percent, format_scaled
from layer_tying.runs.reading import as_number

Facts = Mapping[str, Any]
NOTE = (
    "Groups are chosen on training batches; test is only reported. A model computes as many layers "
    "as before: sharing saves memory and storage, not time."
)
SHOWN = {"accuracy": format_percent, "perplexity": format_number, "bits_per_byte": format_number}


def write_compression_report(run: Path, output: Path) -> None:
    """Write the page of a compression that has ended.

    Args:
        run: the folder with its ``choice.json``, ``metrics.jsonl`` and ``summary.json``.
        output: the page.

    Raises:
        InputError: if the folder holds none, or the page cannot be written.
    """
    try:
        choice, summary = (
            json.loads((run / name).read_text(encoding="utf-8"))
            for name in ("choice.json", "summary.json")
        )
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run} holds no compression that has ended: {error}") from None
    try:
        album = Album(output)
        with matplotlib.rc_context(style.STYLE):
            sections = [
                ("Quality", [_quality(summary), page.note(NOTE)]),
                ("Healing", [page.grid([_healing(album, lines, summary)])]),
                ("Which layers share weights", [_groups(summary)]),
                ("What sharing costs", _sensitivities(album, choice)),
            ]
        html = page.document(_title(summary), _lead(summary), _tiles(summary), sections)
        output.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output}: cannot write the report: {error.strerror}") from None


def headline(summary: Facts) -> str:
    """The figure that the model is known by: accuracy of classifiers, else perplexity."""
    return "accuracy" if "accuracy" in summary["before"]["test"] else "perplexity"


def _title(summary: Facts) -> str:
    name = Path(summary["source"]).resolve().name
    return (
        f"{name}, compressed to {summary['independent_layers']} of {summary['num_layers']} layers"
    )


def _lead(summary: Facts) -> str:
    how = {"mixture": "read learned mixtures of", "tied": "use"}[summary["sharing"]]
    return (
        f"The {summary['num_layers']} layers {how} {summary['independent_layers']} sets of "
        f"weights, and were healed for {summary['steps']:,} steps on "
        f"{Path(summary['dataset']).name}."
    )


def _tiles(summary: Facts) -> list[tuple[str, str]]:
    name = headline(summary)
    write = SHOWN[name]
    before, after = (as_number(summary[when]["test"][name]) for when in ("before", "after"))
    share = summary["parameters_after"] / summary["parameters_before"]
    whole = summary["seconds_deciding"] + summary["seconds_healing"]
    return [
        (write(after), f"test {name} (untouched: {write(before)})"),
        (format_percent(share), "of the parameters"),
        (format_bytes(summary["bytes_after"]), "in the file"),
        (format_percent(summary["seconds_deciding"] / whole), "of the time to choose the groups"),
    ]


def _quality(summary: Facts) -> Markup:
    names = [name for name in SHOWN if name in summary["before"]["test"]]
    heads = [("", "model"), ("", "parameters")]
    heads += [(split, name.replace("_", " ")) for split in ("validation", "test") for name in names]

    def cells(scores: Facts) -> list[str]:
        return [
            SHOWN[name](as_number(scores[split][name])) if split in scores else "—"
            for split in ("validation", "test")
            for name in names
        ]

    before = format_scaled(summary["parameters_before"])
    after = format_scaled(summary["parameters_after"])
    return page.table(
        heads,
        [
            ["untouched", before, *cells(summary["before"])],
            ["layers shared, before healing", after, *cells({"validation": summary["tied"]})],
            ["healed", after, *cells(summary["after"])],
        ],
    )


def _healing(album: Album, lines: list[Facts], summary: Facts) -> Markup:
    name = headline(summary)
    before = as_number(summary["before"]["validation"][name])
    figure = figures_compression.draw_healing(lines, before, name)
    caption = (
        f"Validation {name} during healing, on the first batches of the split; that of the "
        f"untouched model is on all of it."
    )
    return album.show("healing", figure, caption)


def _groups(summary: Facts) -> Markup:
    reading = summary["reading"]
    rows = [
        [str(source), ", ".join(str(i) for i, read in enumerate(reading) if read == source)]
        for source in sorted(set(reading))
    ]
    return page.table([("", "weights of layer"), ("", "are read by layers")], rows, kind="left")


def _sensitivities(album: Album, choice: Facts) -> list[Markup]:
    ring = "A ring marks the layer whose weights are read in the groups that were chosen."
    table = figures_compression.draw_sensitivities(
        choice["table"], choice["reading"], "divergence, nats"
    )
    caption = (
        "How far the output's distribution moves from the untouched model's when one layer (row) "
        f"reads another one's weights (column). {ring}"
    )
    blocks = [album.show("divergence", table, caption)]
    if choice["loss_rise"]:
        rises = figures_compression.draw_sensitivities(
            choice["loss_rise"], choice["reading"], "rise of the loss, nats"
        )
        blocks.append(album.show("loss_rise", rises, "The rise of the loss, likewise."))
    searched = figures_compression.draw_candidates(choice["candidates"])
    caption = "The divergence of what each search proposed, measured before healing."
    blocks.append(album.show("candidates", searched, caption))
    return [page.grid(blocks)]
