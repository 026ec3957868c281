"""The commands that train: ``layer-tying train | compare | finetune | recipe``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from layer_tying.cli.flags import option, parse, positional, settings_given, settings_groups
from layer_tying.core.patterns import PATTERNS
from layer_tying.data.glue import TASKS
from layer_tying.errors import InputError
from layer_tying.paper.reproduce import as_asked
from layer_tying.paper.rows import SCALES, TYINGS, recipes, runs_first
from layer_tying.runs.config import CONFIG, DEFAULTS, SHAPE, TrainConfig, read_config
from layer_tying.runs.defaults import with_changes
from layer_tying.runs.interrupt import INTERRUPTED
from layer_tying.runs.processes import Job, train_all
from layer_tying.runs.tying_config import DECIDING, LEARNING, POLICIES, SETTLING, takes_groups
from layer_tying.tasks.metrics import METRICS

# What cannot be chosen when a run is fine-tuned: it is the run's, or the policy's.
NOT_WHEN_FINETUNING = (*SHAPE, "policy", "task", "source", "dataset", "groups", "owners")
NOT_WHEN_FINETUNING += ("permute", "activate_at", "initial", "sharing", "exp")


GOING_ON = [
    ("resume", *option(bool, False, "continue from the newest checkpoint")),
    ("overwrite", *option(bool, False, "replace what is there")),
]


def train(arguments: Sequence[str], program: str, help: str) -> int:
    """Train one model."""
    options = _with_settings(arguments, program, help, leave_out=("task",))
    return _train_and_report(options.config, options)


def _with_settings(
    arguments: Sequence[str], program: str, help: str, leave_out: Sequence[str], own: Any = ()
) -> Any:
    """Options with ``config``, the settings of a run: flags on top of ``--config FILE``."""
    saved = _saved(arguments)
    defaults = saved.open_again() if saved else TrainConfig()
    kind = make_dataclass(
        "Options",
        [
            ("config", *option(str, None, "start from a config.json; flags change it")),
            *own,
            *GOING_ON,
            *settings_groups(defaults.flat(), leave_out),
        ],
    )
    options = checked(parse(kind, arguments, program, help))
    given = settings_given(options)
    if saved is None:
        options.config = TrainConfig.from_flat(**given)
        return options
    if given.get("policy", saved.tying.policy) != saved.tying.policy:
        before = defaults.flat()  # those of the saved policy, which were not asked for
        not_its = _left_out(given["policy"], given["initial"])
        given |= {name: usual for name, usual in not_its.items() if given[name] == before[name]}
    options.config = with_changes(saved, **given)
    return options


def _saved(arguments: Sequence[str]) -> TrainConfig | None:
    """The configuration that ``--config`` names: it has to be read before the flags on top."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or arguments[index + 1 :]):
            path = Path(value if equals else arguments[index + 1])
            try:
                return TrainConfig.from_json(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise InputError(f"--config {path}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise InputError(f"--config {path}: not UTF-8") from None
    return None


def checked(options: Any) -> Any:
    """The options, which do not contradict each other."""
    if options.resume and options.overwrite:
        raise InputError("--resume and --overwrite contradict each other: give one of them")
    return options


def _train_and_report(config: TrainConfig, options: Any) -> int:
    from layer_tying.runs.memory import return_freed_memory
    from layer_tying.runs.train import Interrupted
    from layer_tying.runs.train import train as train_run

    return_freed_memory()
    speaks = int(os.environ.get("RANK", "0")) == 0  # one of many processes
    try:
        summary = train_run(config, resume=options.resume, overwrite=options.overwrite)
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
    test = "dev" if config.data.task else "test"
    scores = [
        f"{each.title} {summary[name]:{each.form}}"
        for name, each in METRICS.items()
        if each.is_headline and name in summary
    ]
    scores.append(f"perplexity {summary['test_perplexity']:.3f} on {test}")
    validation = f"{summary['validation_perplexity']:.3f} on validation"
    layers = f"{summary['independent_layers_end']} of {summary['num_layers']} layers independent"
    page = config.folder / "report.html"
    return f"{', '.join(scores)}, {validation}; {layers} at the end; {page}"


def compare(arguments: Sequence[str], program: str, help: str) -> int:
    """Each policy trains in a process of its own, so that its peak memory is its own."""
    from layer_tying.report import comparison_table, write_report
    from layer_tying.runs.reading import read_run

    which = (
        f"which methods, separated by commas: {', '.join(POLICIES)}; NAME-M for M groups of "
        f"layers; plain-K for a conventional model of K layers"
    )
    own = [("policies", *option(str, "none,dqn,mixture", which))]
    options = _with_settings(arguments, program, help, ("policy", "task"), own)
    asked = options.config.open_again()  # what another policy had settled is not for all of these
    jobs = [
        Job(
            asked.replace(
                exp=f"{asked.logging.exp}/{name}",
                **_left_out(str(settings["policy"]), asked.tying.initial) | settings,
            ),
            name,
        )
        for name, settings in _methods(options.policies).items()
    ]
    try:
        ended = train_all(jobs, resume=options.resume, overwrite=options.overwrite)
    except KeyboardInterrupt:  # the run that was stopped has said so
        return INTERRUPTED
    for name, end in ended.items():
        if end.code:  # a run says itself what went wrong, unless it was killed
            if end.reason:
                print(f"layer-tying: {name}: {end.reason}", file=sys.stderr)
            return max(end.code, 1)
    folders = [job.config.folder for job in jobs]
    page = options.config.folder / "report.html"
    write_report(folders, page)
    print(comparison_table([read_run(folder) for folder in folders]))
    print(f"\nThe report, with pictures: {page}")
    return 0


def _methods(names: str) -> dict[str, dict[str, Any]]:
    """The settings of each method that is compared: a policy, plain-K, or a policy with -M groups.

    Raises:
        InputError: if a name is neither.
    """
    return {name: _method(name) for name in dict.fromkeys(names.split(","))}


def _method(name: str) -> dict[str, Any]:
    policy, _, number = name.rpartition("-")
    if name in POLICIES or not number.isdecimal():
        return {"policy": name}
    if policy == "plain":  # conventional training of fewer layers: the rival of equal parameters
        return {"policy": "none", "nlayers": int(number)}
    return {"policy": policy, "groups": int(number)}


def _left_out(policy: str, initial: str) -> dict[str, Any]:
    """The settings of other policies, which a comparison has as well.

    Args:
        policy: the name of a policy.
        initial: what those that change the tying start from in this comparison.
    """
    starts = {name: initial if name in SETTLING else "" for name in POLICIES}
    tying = set(POLICIES) - {"none"}  # conventional training has no budget
    belong = {
        **{"owners": ("fixed",), "source": ("fixed", "recorded"), "permute": ("recorded",)},
        "activate_at": tying - {*DECIDING, "recorded"},
        "groups": {name for name, start in starts.items() if takes_groups(name, start)},
        **{"initial": SETTLING, "settle": SETTLING, "reward": LEARNING},
        "gradient": {*POLICIES} - {"mixture"},
        "residual_scaling": {*PATTERNS, "fixed", "mixture"},  # the others have none
        **dict.fromkeys(("budget_layers", "budget_parameters", "budget_bytes"), tying),
    }
    return {name: DEFAULTS[name] for name, policies in belong.items() if policy not in policies}


def finetune(arguments: Sequence[str], program: str, help: str) -> int:
    """The shape of the model is that of the run; all else can be chosen."""

    tying = (
        "keep the run's tying (or its mixtures), continue from it with the agent, or untie "
        "all layers"
    )
    required = [
        ("task", Annotated[Literal[tuple(TASKS)], tyro.conf.arg(help="the task of GLUE")]),  # type: ignore[valid-type]
        ("source", Annotated[str, tyro.conf.arg(name="from", help="the run", metavar="RUN")]),
    ]
    own = [
        ("choice", *option(Literal[tuple(TYINGS)], "keep", tying, name="tying")),
        ("exp", *option(str, None, "name of the new run (default: RUN-TASK-TYING)")),
    ]
    groups = settings_groups(DEFAULTS | {"lr": 3e-4, "epochs": 3}, NOT_WHEN_FINETUNING)
    kind = make_dataclass("Options", [*required, *own, *GOING_ON, *groups])
    options = checked(parse(kind, arguments, program, help))
    run = Path(options.source)
    name = options.exp or f"{run.name}-{options.task}-{options.choice}"
    begun = Path(options.logging.output_dir or DEFAULTS["output_dir"]) / name
    goes_on = options.resume and (begun / CONFIG).exists()  # then the source may be gone
    pretrained = read_config(begun if goes_on else run).flat()
    goes_on_mixing = options.choice == "keep" and pretrained["policy"] == "mixture"
    policy = "mixture" if goes_on_mixing else TYINGS[options.choice]
    config = TrainConfig.from_flat(
        **settings_given(options)
        | {name: pretrained[name] for name in SHAPE}
        | {"task": options.task, "source": options.source, "policy": policy}
        | {"exp": name}
        | {"data_dir": options.data.data_dir or pretrained["data_dir"]}
    )
    return _train_and_report(config, options)


def recipe(arguments: Sequence[str], program: str, help: str) -> int:
    """Train a row of the paper."""
    data_dir, few = "where local data sets lie", "stop after so few steps, to try a row out"
    kind = make_dataclass(
        "Options",
        [
            ("name", *positional("NAME", "one of those that --list lists", default="")),
            ("list", *option(bool, False, "list the recipes")),
            ("scale", *option(Literal[SCALES], "small", "the paper's, or one for a CPU")),
            ("seed", *option(int, 0, "of the row; what is retrained has the next one")),
            ("output_dir", *option(str, None, "(default: runs/SCALE, or runs/SCALE-SEED)")),
            ("data_dir", *option(str, None, data_dir)),
            ("max_steps", *option(int, None, few)),
            *GOING_ON,
        ],
    )
    options = checked(parse(kind, arguments, program, help))
    rows = recipes(options.scale, options.output_dir, options.seed)
    if options.list:
        for row, config in rows.items():
            source = config.tying.source
            print(f"{row}  (after {Path(source).name})" if source else row)
        return 0
    if options.name not in rows:
        asked = f"unknown recipe {options.name!r}" if options.name else "no recipe was named"
        raise InputError(f"{asked}: see layer-tying recipe --list")
    config = as_asked(rows[options.name], options.data_dir, options.max_steps)
    first = None if options.resume else runs_first(config)
    if first:
        raise InputError(
            f"{options.name} starts from {config.tying.source}, which has not ended: "
            f"first run layer-tying recipe {first} with the same options"
        )
    return _train_and_report(config, options)
