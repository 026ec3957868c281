"""The command: ``layer-tying train | compare | evaluate | report``.

Wrong input ends in one line and exit code 2; an interrupted run has saved what it had and ends with
exit code 130.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import NoReturn

from layer_tying.config import POLICIES, TrainConfig
from layer_tying.errors import InputError

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        return options.run(options)
    except InputError as error:
        return _complain(error)
    except OSError as error:  # a full disk, a folder that went away
        return _complain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _complain(error: Exception) -> int:
    print(f"layer-tying: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="layer-tying", description="Transformers that learn which layers to tie.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train one model, tied as a policy decides")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    train.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train the same model under several policies")
    _add_config(compare, leave_out=("policy",))
    compare.add_argument(
        "--policies",
        type=lambda text: text.split(","),
        default=["none", "dqn"],
        help=f"which, separated by commas, of {', '.join(POLICIES)} (default: none,dqn)",
    )
    compare.add_argument("--resume", action="store_true", help="go on where it stopped")
    compare.add_argument("--overwrite", action="store_true", help="replace what is there")
    compare.set_defaults(run=_compare)

    evaluate = commands.add_parser("evaluate", help="score a run's best weights")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("--split", choices=("validation", "test"), default="test")
    evaluate.add_argument("--data-dir", "--data_dir", help="where local data sets lie now")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="make one page of figures and tables of runs")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--output", type=Path, help="the page (default: report.html in the first)")
    report.set_defaults(run=_report)
    return parser


def _add_config(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """A flag for each field of the configuration, spelt with hyphens or underscores."""
    for each in fields(TrainConfig):
        if each.name not in leave_out:
            names = dict.fromkeys((f"--{each.name.replace('_', '-')}", f"--{each.name}"))
            help = each.metadata["help"]
            if str(each.type) == "bool":
                parser.add_argument(*names, action="store_true", help=help)
                continue
            shown = "" if each.default is None else f" (default: {each.default})"
            parser.add_argument(
                *names,
                type=_type_of(each),
                default=each.default,
                choices=each.metadata["choices"],
                metavar=each.name.upper() if not each.metadata["choices"] else None,
                help=help + shown,
            )


def _type_of(each: Field[object]) -> type:
    return {"int": int, "float": float, "str": str}[str(each.type).partition(" ")[0]]


def _config(options: argparse.Namespace, **given: object) -> TrainConfig:
    values = {
        each.name: getattr(options, each.name)
        for each in fields(TrainConfig)
        if each.name not in given
    }
    return TrainConfig(**values, **given)  # type: ignore[arg-type]


def _train(options: argparse.Namespace) -> int:
    from layer_tying.train import Interrupted, train

    try:
        summary = train(_config(options), resume=options.resume, overwrite=options.overwrite)
    except Interrupted as stop:
        print(f"layer-tying: {stop}", file=sys.stderr)
        return INTERRUPTED
    folder = Path(options.output_dir) / options.exp
    if int(os.environ.get("RANK", "0")) == 0:
        from layer_tying.report import write_report

        write_report([folder], folder / "report.html")
        print(_outcome(summary, folder))
    return 0


def _outcome(summary: dict[str, object], folder: Path) -> str:
    score = f"perplexity {summary['validation_perplexity']:.3f} on validation"
    layers = f"{summary['independent_layers_end']} of {summary['num_layers']} layers independent"
    test = f"{summary['test_perplexity']:.3f} on test"
    return f"{score}, {test}; {layers} at the end; {folder / 'report.html'}"


def _compare(options: argparse.Namespace) -> int:
    """Each policy trains in a process of its own, so that its peak memory is its own."""
    from layer_tying.report import comparison_table, read_run, write_report
    from layer_tying.train import measured_precision

    configs = [
        _config(options, policy=policy, exp=f"{options.exp}/{policy}")
        for policy in options.policies
    ]
    precision = measured_precision(configs[0])
    for config in configs:
        code = _run_one(replace(config, precision=precision), options)
        if code:
            return code
    folders = [config.folder for config in configs]
    page = Path(options.output_dir) / options.exp / "report.html"
    write_report(folders, page)
    print(comparison_table([read_run(folder) for folder in folders]))
    print(f"\nThe report, with pictures: {page}")
    return 0


def _run_one(config: TrainConfig, options: argparse.Namespace) -> int:
    """Train in a child process; its exit code. A finished run is left alone when resuming."""
    if options.resume and (config.folder / "summary.json").exists():
        return 0
    flags = []
    for each in fields(TrainConfig):
        value = getattr(config, each.name)
        if value != each.default:
            name = f"--{each.name.replace('_', '-')}"
            flags += [name] if value is True else [f"{name}={value}"]
    if options.overwrite:
        flags.append("--overwrite")
    elif options.resume and (config.folder / "config.json").exists():
        flags.append("--resume")
    command = [sys.executable, "-m", "layer_tying", "train", *flags]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child got it too: let it save
            process.wait()
            return INTERRUPTED


def _evaluate(options: argparse.Namespace) -> int:
    from layer_tying.train import evaluate_run

    scores = evaluate_run(options.folder, options.split, options.data_dir)
    print(json.dumps(scores, indent=2))
    return 0


def _report(options: argparse.Namespace) -> int:
    from layer_tying.report import comparison_table, read_run, write_report

    page = options.output or options.folders[0] / "report.html"
    write_report(options.folders, page)
    print(comparison_table([read_run(folder) for folder in options.folders]))
    print(f"\n{page}")
    return 0
