"""The commands that use what was trained: ``layer-tying export | generate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layer_tying.runs.config import EXPORT_DTYPES


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the commands to a parser's."""
    export = commands.add_parser("export", help="write a run's best weights for others to load")
    export.add_argument("folder", type=Path, metavar="RUN", help="a run folder, or an export")
    export.add_argument(
        "--format",
        choices=("expanded", "compact"),
        default="expanded",
        help="expanded: a plain transformers folder; compact: each distinct weight once "
        "(default: expanded)",
    )
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to")
    export.add_argument(
        "--export-dtype",
        "--export_dtype",
        choices=EXPORT_DTYPES,
        help="type of the stored weights (default: what the run was trained for)",
    )
    export.set_defaults(run=_export)

    generate = commands.add_parser("generate", help="go on from a prompt")
    generate.add_argument("folder", type=Path, metavar="RUN", help="a run folder, or an export")
    generate.add_argument("--prompt", required=True, help="the text to go on from")
    generate.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        help="(default: 100, or what the model's context has room for)",
    )
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="0: the most likely token (default: 1.0)"
    )
    generate.add_argument("--top-k", "--top_k", type=int, help="sample among so many tokens only")
    generate.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    generate.set_defaults(run=_generate)


def _export(options: argparse.Namespace) -> int:
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


def _generate(options: argparse.Namespace) -> int:
    from layer_tying.saving.generate import generate

    text = generate(
        options.folder,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(options.prompt + text)
    return 0
