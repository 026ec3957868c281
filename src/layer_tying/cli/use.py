"""The commands that use what was trained: ``layer-tying evaluate | report | export | generate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from layer_tying.cli.flags import Count, Text, parse

Run = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]


@dataclass
class EvaluateOptions:
    """Which weights, on which data."""

    folder: Run
    """a run folder"""
    split: Literal["validation", "test"] = "test"
    """what is scored"""
    data_dir: Text = None
    """where local data sets lie now"""


def evaluate(arguments: Sequence[str], program: str, help: str) -> int:
    """Score a run's best weights."""
    options = parse(EvaluateOptions, arguments, program, help)
    from layer_tying.runs.evaluate import evaluate_run

    scores = evaluate_run(options.folder, options.split, options.data_dir)
    print(json.dumps(scores, indent=2))
    return 0


@dataclass
class ReportOptions:
    """Which runs, and where to."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    output: Path | None = None
    """the page (default: report.html in the first)"""


def report(arguments: Sequence[str], program: str, help: str) -> int:
    """Make a page of runs."""
    options = parse(ReportOptions, arguments, program, help)
    from layer_tying.report import comparison_table, write_report
    from layer_tying.runs.reading import read_run

    page = options.output or options.folders[0] / "report.html"
    write_report(list(options.folders), page)
    print(comparison_table([read_run(folder) for folder in options.folders]))
    print(f"\n{page}")
    return 0


@dataclass
class ExportOptions:
    """What is written, and where to."""

    folder: Run
    """a run folder, or an export"""
    output: Path
    """the folder to write"""
    format: Literal["expanded", "compact"] = "expanded"
    """expanded: a plain transformers folder; compact: each distinct weight once"""
    export_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """type of the stored weights (default: what the run was trained for)"""


def export(arguments: Sequence[str], program: str, help: str) -> int:
    """Write a run's best weights."""
    options = parse(ExportOptions, arguments, program, help)
    from transformers.utils import logging

    from layer_tying.saving.export_run import export_run

    logging.disable_progress_bar()
    made = export_run(options.folder, options.output, options.format, options.export_dtype)
    print(
        f"{made.file}: {made.num_bytes:,} bytes ({made.num_bytes / 1e6:.2f} MB); "
        f"{made.num_unique:,} unique parameters of {made.num_parameters:,}, "
        f"{made.tying.num_independent} of {made.tying.num_layers} layers independent"
    )
    return 0


@dataclass
class GenerateOptions:
    """Which model, what it goes on from, and how tokens are drawn."""

    folder: Run
    """a run folder, or an export"""
    prompt: str
    """the text to go on from"""
    max_new_tokens: Count = None
    """(default: 100, or what the model's context has room for)"""
    temperature: float = 1.0
    """0: the most likely token"""
    top_k: Count = None
    """sample among so many tokens only"""
    seed: int = 0
    """of the samples"""


def generate(arguments: Sequence[str], program: str, help: str) -> int:
    """Print a prompt and what follows."""
    options = parse(GenerateOptions, arguments, program, help)
    from layer_tying.saving.generate import generate as generate_text

    text = generate_text(
        options.folder,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt + text)
    return 0
