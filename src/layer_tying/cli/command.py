"""The command: ``layer-tying train | compare | finetune | recipe | evaluate | report``.

``export`` and ``generate`` are in ``cli_use``.

Wrong input ends in one line and exit code 2; an interrupted run has saved what it had and ends with
exit code 130.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from layer_tying.cli import use
from layer_tying.data.glue import TASKS
from layer_tying.errors import InputError
from layer_tying.paper.rows import SCALES, TYINGS, recipes, runs_first
from layer_tying.runs.config import DECIDING, POLICIES, SHAPE, TrainConfig

INTERRUPTED = 130
# What cannot be chosen when a run is fine-tuned: it is the run's, or the policy's.
NOT_WHEN_FINETUNING = (*SHAPE, "policy", "task", "source", "dataset", "groups", "owners")
NOT_WHEN_FINETUNING += ("permute", "activate_at", "initial", "sharing", "exp")
SCORES = {  # of a test split, as they are printed
    "last_word_accuracy": "last-word accuracy",
    "accuracy": "accuracy",
    "matthews_correlation": "Matthews correlation",
    "f1": "F1",
}


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
    except (MemoryError, RuntimeError) as error:
        if advice := _advice(error):
            return _complain(InputError(advice))
        raise
    except KeyboardInterrupt:
        print("layer-tying: interrupted", file=sys.stderr)
        return INTERRUPTED


def _advice(error: Exception) -> str | None:
    """What to do about those errors of torch that the machine is the reason of."""
    if re.search("allocate memory|out of memory", repr(error), re.IGNORECASE):
        return "out of memory: take a smaller model or a smaller batch"
    if "No working C++ compiler" in str(error):
        return "--compile needs a C++ compiler, such as g++, and found none"
    return None


def _complain(error: Exception) -> int:
    print(f"layer-tying: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="layer-tying", description="Transformers that learn which layers to tie.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train one model, tied as a policy decides")
    _add_config(train, leave_out=("task",))
    _add_going_on(train)
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train the same model under several policies")
    _add_config(compare, leave_out=("policy", "task"))
    compare.add_argument(
        "--policies",
        type=lambda text: text.split(","),
        default=["none", "dqn", "bandit"],
        help=f"which, separated by commas, of {', '.join(POLICIES)} (default: none,dqn,bandit)",
    )
    _add_going_on(compare)
    compare.set_defaults(run=_compare)

    _add_finetune(commands)
    _add_recipe(commands)

    evaluate = commands.add_parser("evaluate", help="score a run's best weights")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("--split", choices=("validation", "test"), default="test")
    evaluate.add_argument("--data-dir", "--data_dir", help="where local data sets lie now")
    evaluate.set_defaults(run=_evaluate)

    use.add_commands(commands)

    report = commands.add_parser("report", help="make one page of figures and tables of runs")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--output", type=Path, help="the page (default: report.html in the first)")
    report.set_defaults(run=_report)
    return parser


def _add_finetune(commands: argparse._SubParsersAction[Any]) -> None:
    finetune = commands.add_parser("finetune", help="fine-tune a run's best weights for GLUE")
    finetune.add_argument("--task", choices=TASKS, required=True, help="what for")
    finetune.add_argument("--from", dest="source", metavar="RUN", required=True, help="the run")
    finetune.add_argument(
        "--tying",
        choices=tuple(TYINGS),
        default="keep",
        help="keep the run's tying, go on from it with the paper's agent, or untie all layers "
        "(default: keep)",
    )
    finetune.add_argument("--exp", help="name of the new run (default: RUN's, the task, the tying)")
    _add_config(finetune, leave_out=NOT_WHEN_FINETUNING)
    _add_going_on(finetune)
    finetune.set_defaults(run=_finetune, lr=3e-4, epochs=3)


def _add_recipe(commands: argparse._SubParsersAction[Any]) -> None:
    recipe = commands.add_parser("recipe", help="train a row of the paper")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="one of those that --list lists")
    recipe.add_argument("--list", action="store_true", help="list the recipes")
    recipe.add_argument("--scale", choices=SCALES, default="small", help="(default: small)")
    recipe.add_argument("--output-dir", "--output_dir", help="(default: runs/SCALE)")
    recipe.add_argument("--data-dir", "--data_dir", help="where local data sets lie")
    recipe.add_argument(
        "--max-steps", "--max_steps", type=int, help="stop after so few steps, to try a row out"
    )
    _add_going_on(recipe)
    recipe.set_defaults(run=_recipe)


def _add_going_on(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on where it stopped")
    either.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_config(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """A flag for each field of the configuration, spelt with hyphens or underscores."""
    for each in fields(TrainConfig):
        if each.name not in leave_out:
            names = dict.fromkeys((_flag_of(each), f"--{each.metadata['name'] or each.name}"))
            help = each.metadata["help"]
            if str(each.type) == "bool":
                parser.add_argument(*names, action="store_true", help=help)
                continue
            shown = "" if each.default in (None, "") else " (default: %(default)s)"
            parser.add_argument(
                *names,
                dest=each.name,
                type=_type_of(each),
                default=each.default,
                choices=each.metadata["choices"],
                metavar=None if each.metadata["choices"] else each.name.upper(),
                help=help + shown,
            )


def _flag_of(each: Field[object]) -> str:
    return f"--{(each.metadata['name'] or each.name).replace('_', '-')}"


def _type_of(each: Field[object]) -> type:
    return {"int": int, "float": float, "str": str}[str(each.type).partition(" ")[0]]


def _config(options: argparse.Namespace, **given: object) -> TrainConfig:
    names = {each.name for each in fields(TrainConfig)} - given.keys()
    values = {name: value for name, value in vars(options).items() if name in names}
    return TrainConfig(**values, **given)  # type: ignore[arg-type]


def _train(options: argparse.Namespace) -> int:
    return _train_and_report(_config(options), options)


def _train_and_report(config: TrainConfig, options: argparse.Namespace) -> int:
    from layer_tying.runs.memory import return_freed_memory
    from layer_tying.runs.train import Interrupted, train

    return_freed_memory()
    speaks = int(os.environ.get("RANK", "0")) == 0  # one of many processes
    try:
        summary = train(config, resume=options.resume, overwrite=options.overwrite)
    except Interrupted as stop:
        if speaks:
            print(f"layer-tying: {stop}", file=sys.stderr)
        return INTERRUPTED
    if speaks:
        from layer_tying.report import write_report

        write_report([config.folder], config.folder / "report.html")
        print(_outcome(summary, config))
    return 0


def _outcome(summary: dict[str, Any], config: TrainConfig) -> str:
    test = "dev" if config.task else "test"
    scores = [f"{label} {summary[name]:.3f}" for name, label in SCORES.items() if name in summary]
    scores.append(f"perplexity {summary['test_perplexity']:.3f} on {test}")
    validation = f"{summary['validation_perplexity']:.3f} on validation"
    layers = f"{summary['independent_layers_end']} of {summary['num_layers']} layers independent"
    page = config.folder / "report.html"
    return f"{', '.join(scores)}, {validation}; {layers} at the end; {page}"


def _finetune(options: argparse.Namespace) -> int:
    """The shape of the model is the run's; all else is chosen anew."""
    from layer_tying.runs.folder import RunLog

    run = Path(options.source)
    pretrained = RunLog(run).config()
    config = _config(
        options,
        policy=TYINGS[options.tying],
        exp=options.exp or f"{run.name}-{options.task}-{options.tying}",
        data_dir=options.data_dir or pretrained.data_dir,
        **{name: getattr(pretrained, name) for name in SHAPE},
    )
    return _train_and_report(config, options)


def _recipe(options: argparse.Namespace) -> int:
    rows = recipes(options.scale, options.output_dir)
    if options.list:
        for name, config in rows.items():
            needs = f"  (after {Path(config.source).name})" if config.source else ""
            print(f"{name}{needs}")
        return 0
    if options.name not in rows:
        asked = f"unknown recipe {options.name!r}" if options.name else "no recipe was named"
        raise InputError(f"{asked}: see layer-tying recipe --list")
    config = replace(rows[options.name], data_dir=options.data_dir)
    if options.max_steps is not None:
        config = replace(config, max_steps=options.max_steps, eval_every=options.max_steps)
    if first := runs_first(config):
        raise InputError(
            f"{options.name} starts from {config.source}, which has not ended: "
            f"first run layer-tying recipe {first} with the same options"
        )
    return _train_and_report(config, options)


def _compare(options: argparse.Namespace) -> int:
    """Each policy trains in a process of its own, so that its peak memory is its own."""
    from layer_tying.report import comparison_table, write_report
    from layer_tying.runs.reading import read_run

    configs = [
        _config(options, policy=policy, exp=f"{options.exp}/{policy}", **_left_out(policy))
        for policy in dict.fromkeys(options.policies)
    ]
    for config in _of_one_precision(configs, options):
        code = _run_one(config, options)
        if code:
            return code
    folders = [config.folder for config in configs]
    page = Path(options.output_dir) / options.exp / "report.html"
    write_report(folders, page)
    print(comparison_table([read_run(folder) for folder in folders]))
    print(f"\nThe report, with pictures: {page}")
    return 0


def _left_out(policy: str) -> dict[str, None]:
    """The settings of other policies, which a comparison has as well."""
    tying = set(POLICIES) - {"none"}  # conventional training has no budget
    belong = {
        **{"owners": ("fixed",), "source": ("fixed", "recorded"), "permute": ("recorded",)},
        **{"layer_price": ("bandit",), "activate_at": tying - {*DECIDING, "recorded"}},
        **dict.fromkeys(("budget_layers", "budget_parameters", "budget_bytes"), tying),
    }
    return {setting: None for setting, policies in belong.items() if policy not in policies}


def _of_one_precision(
    configs: Sequence[TrainConfig], options: argparse.Namespace
) -> list[TrainConfig]:
    """The runs, all in the precision that some have already, or that is measured now.

    Raises:
        InputError: before any of them starts, if one is there and cannot be continued or replaced.
    """
    from layer_tying.runs.folder import RunLog
    from layer_tying.runs.train import as_it_was, measured_precision

    there = [config for config in configs if (config.folder / "config.json").exists()]
    if there and not (options.resume or options.overwrite):
        raise InputError(
            f"{there[0].folder} holds a run: go on with --resume, replace it with --overwrite, "
            f"or name another --exp"
        )
    continued = there if options.resume else []
    saved = [as_it_was(RunLog(config.folder).config(), config) for config in continued]
    precision = saved[0].precision if saved else measured_precision(configs[0])
    return [replace(config, precision=precision) for config in configs]


def _run_one(config: TrainConfig, options: argparse.Namespace) -> int:
    """Train in a child process; its exit code. A finished run is left alone when resuming."""
    if options.resume and (config.folder / "summary.json").exists():
        return 0
    flags = []
    for each in fields(TrainConfig):
        value = getattr(config, each.name)
        if value != each.default:
            name = _flag_of(each)
            flags += [name] if value is True else [f"{name}={value}"]
    if options.overwrite:
        flags.append("--overwrite")
    elif options.resume and (config.folder / "config.json").exists():
        flags.append("--resume")
    command = [sys.executable, "-m", "layer_tying", "train", *flags]
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    # In a session of its own, so that it gets Ctrl-C once, from here, whoever this process got it
    # from: the terminal sends it to all processes, `kill` to one.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()  # it saves
            return INTERRUPTED


def _evaluate(options: argparse.Namespace) -> int:
    from layer_tying.runs.train import evaluate_run

    scores = evaluate_run(options.folder, options.split, options.data_dir)
    print(json.dumps(scores, indent=2))
    return 0


def _report(options: argparse.Namespace) -> int:
    from layer_tying.report import comparison_table, write_report
    from layer_tying.runs.reading import read_run

    page = options.output or options.folders[0] / "report.html"
    write_report(options.folders, page)
    print(comparison_table([read_run(folder) for folder in options.folders]))
    print(f"\n{page}")
    return 0
