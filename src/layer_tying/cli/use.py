"""The commands that use what was trained: ``layer-tying evaluate | report | export | generate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from layer_tying.cli.flags import option, parse, positional, refuse
from layer_tying.runs.tying_config import EXPORT_DTYPES


def evaluate(arguments: Sequence[str], program: str, help: str) -> int:
    """Score a run's best weights."""
    kind = make_dataclass(
        "Options",
        [
            ("folder", *positional("RUN", "a run folder")),
            ("split", *option(Literal["validation", "test"], "test", "what is scored")),
            ("data_dir", *option(str, None, "where local data sets lie now")),
        ],
    )
    options = parse(kind, arguments, program, help)
    from layer_tying.runs.evaluate import evaluate_run
    from layer_tying.runs.folder import finite

    scores = evaluate_run(Path(options.folder), options.split, options.data_dir)
    print(json.dumps(finite(scores), indent=2))
    return 0


def report(arguments: Sequence[str], program: str, help: str) -> int:
    """Make a page of runs."""
    runs = tyro.conf.arg(metavar="RUN [RUN ...]", help="run folders", help_behavior_hint="")
    kind = make_dataclass(
        "Options",
        [
            ("folders", tyro.conf.Positional[Annotated[tuple[Path, ...], runs]]),
            ("output", *option(str, None, "the page (default: report.html in the first)")),
        ],
    )
    options = parse(kind, arguments, program, help)
    if not options.folders:
        refuse(program, "at least one RUN is required")
    from layer_tying.report import comparison_table, write_report
    from layer_tying.runs.reading import read_run

    page = Path(options.output) if options.output else options.folders[0] / "report.html"
    write_report(list(options.folders), page)
    folders = dict.fromkeys(folder.resolve() for folder in options.folders)
    print(comparison_table([read_run(folder) for folder in folders]))
    print(f"\n{page}")
    return 0


def export(arguments: Sequence[str], program: str, help: str) -> int:
    """Write a run's best weights."""
    formats = "expanded: a plain transformers folder; compact: each distinct weight once"
    dtype = "type of the stored weights (default: what the run was trained for)"
    output = tyro.conf.arg(metavar="DIR", help="the folder to write to")
    kind = make_dataclass(
        "Options",
        [
            ("folder", *positional("RUN", "a run folder, or an export")),
            ("output", Annotated[Path, output]),
            ("format", *option(Literal["expanded", "compact"], "expanded", formats)),
            ("export_dtype", *option(Literal[EXPORT_DTYPES], None, dtype)),
        ],
    )
    options = parse(kind, arguments, program, help)
    from transformers.utils import logging

    from layer_tying.saving.export_run import export_run

    logging.disable_progress_bar()
    made = export_run(Path(options.folder), options.output, options.format, options.export_dtype)
    print(
        f"{made.file}: {made.num_bytes:,} bytes ({made.num_bytes / 1e6:.2f} MB); "
        f"{made.num_unique:,} unique parameters of {made.num_parameters:,}, "
        f"{made.tying.num_independent} of {made.tying.num_layers} layers independent"
    )
    return 0


def generate(arguments: Sequence[str], program: str, help: str) -> int:
    """Print a prompt and what follows."""
    longest = "(default: 100, or what the model's context has room for)"
    kind = make_dataclass(
        "Options",
        [
            ("folder", *positional("RUN", "a run folder, or an export")),
            ("prompt", Annotated[str, tyro.conf.arg(help="the text to continue")]),
            ("max_new_tokens", *option(int, None, longest)),
            ("temperature", *option(float, 1.0, "0: the most likely token")),
            ("top_k", *option(int, None, "sample among so many tokens only")),
            ("seed", *option(int, 0, "of the samples")),
        ],
    )
    options = parse(kind, arguments, program, help)
    from layer_tying.saving.generate import generate as generate_text

    text = generate_text(
        Path(options.folder),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt + text)
    return 0
