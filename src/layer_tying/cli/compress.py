"""The command ``layer-tying compress``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from layer_tying.cli.experiments import GOING_ON, checked
from layer_tying.cli.flags import flag_of, group_of, parse, positional
from layer_tying.compression.settings import (
    NOT_HERE,
    RUN,
    USUAL,
    BudgetSettings,
    CompressConfig,
    HealingSettings,
    SearchSettings,
)
from layer_tying.runs.config import OptimizationConfig
from layer_tying.runs.interrupt import INTERRUPTED

GROUPS: dict[str, Any] = {
    "budget": BudgetSettings,
    "search": SearchSettings,
    "healing": HealingSettings,
    "optimization": OptimizationConfig,
}
KINDS = (*GROUPS.values(), CompressConfig)
OWN = ("dataset", "data_dir", "bptt", "batch_size", "export_dtype", "seed")


def compress(arguments: Sequence[str], program: str, help: str) -> int:
    """Make a trained model smaller."""
    options = checked(parse(_options(), arguments, program, help))
    config = _config_of(options)
    from transformers.utils import logging

    from layer_tying.compression.card import write_card
    from layer_tying.compression.run import compress_run
    from layer_tying.report.compression import headline, write_compression_report
    from layer_tying.runs.train import Interrupted

    logging.disable_progress_bar()
    try:
        summary = compress_run(config, resume=options.resume, overwrite=options.overwrite)
    except Interrupted as stop:
        print(f"layer-tying: {stop}", file=sys.stderr)
        return INTERRUPTED
    output = Path(config.output)
    write_card(output, summary)
    write_compression_report(output / RUN, output / "report.html")
    name = headline(summary)
    before, after = (summary[when]["test"][name] for when in ("before", "after"))
    print(
        f"test {name} {after:.4g} (untouched: {before:.4g}); "
        f"{summary['parameters_after']:,} parameters of {summary['parameters_before']:,}, "
        f"{summary['bytes_after'] / 1e6:.2f} MB; {output / 'report.html'}"
    )
    return 0


def _options() -> type:
    """What the command takes: a model, an output, and the settings by their groups."""
    defaults = {each.name: each.default for kind in KINDS for each in fields(kind)} | USUAL
    groups = [group_of(name, kind, defaults, NOT_HERE) for name, kind in GROUPS.items()]
    output = tyro.conf.arg(metavar="DIR", help="the folder that the small model is written to")
    return make_dataclass(
        "Options",
        [
            ("source", *positional("MODEL", "a folder of transformers, a run, or an export")),
            ("output", Annotated[Path, output]),
            *(flag_of(CompressConfig, name, defaults[name]) for name in OWN),
            *GOING_ON,
            *filter(None, groups),
        ],
    )


def _config_of(options: Any) -> CompressConfig:
    groups = {name: kind(**vars(getattr(options, name))) for name, kind in GROUPS.items()}
    own = {name: getattr(options, name) for name in OWN}
    return CompressConfig(
        source=options.source,
        output=str(options.output),
        **own | {"dataset": options.dataset or ""},
        **groups,
    )
