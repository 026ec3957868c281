"""A benchmark: which way of choosing what is shared trains the best model of a given size.

Every method trains the same transformer (12 layers x 64, rotary positions) for the same steps
on the same data in the same order; only the tying differs. Three texts, in two regimes: one pass
over much of a text, and many over little of it. A third one, `gpt2`, is a pass with the shape that
the paper trains, twice as wide and ten times as long: it is run when it is asked for by name. Each
method has the same learning rates to choose from, on validation and for the first seed; test
figures are only reported.

Runs go through at most two processes of one thread each. A run whose row is there is left alone,
one that was stopped begins anew. After every run benchmarks/results/quality.json is written, so
that what was done counts when it is stopped; docs/quality.md and its pictures follow at the end.

    python benchmarks/quality.py                                 # all: some 4 hours of two threads
    python benchmarks/quality.py --sets pydocs --regimes single-epoch --methods sandwich-3 bandit-3
    python benchmarks/quality.py --sets pydocs --regimes gpt2 --methods conventional bandit-3
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from quality_page import write_page
from quality_rows import best_rate

from layer_tying.data.texts import load_texts
from layer_tying.errors import InputError
from layer_tying.paper.results import processor
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.processes import Ended, Job, train_all

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/quality.json"
SETS = {"pydocs": "bytes", "shake": "bytes", "wiki2": "bpe:4096"}  # name -> tokenizer
REGIMES = {  # characters of the training text; a run reads 410,000 tokens, of `gpt2` 2 million
    "single-epoch": {"pydocs": 500_000, "shake": 500_000, "wiki2": 2_000_000},
    "multi-epoch": {"pydocs": 30_000, "shake": 30_000, "wiki2": 90_000},
    "gpt2": {"pydocs": 2_000_000, "shake": 2_000_000, "wiki2": 8_000_000},
}
INTERRUPTED = 130  # exit code
HELD_OUT = 48_000  # characters of validation, and of test
RATES = (2e-3, 4e-3)
SHAPE: dict[str, Any] = {
    **{"family": "llama", "nlayers": 12, "nhead": 2, "emsize": 64, "bptt": 64, "batch_size": 8},
    **{"max_steps": 800, "eval_every": 80, "eval_batches": 12, "precision": "bf16"},
    **{"compile": True, "every": 10, "save_every": 800, "log_every": 80},
}
OTHER_SHAPES: dict[str, dict[str, Any]] = {  # of a regime
    "gpt2": {
        **{"family": "gpt2", "nhead": 4, "emsize": 128, "bptt": 128, "batch_size": 16},
        **{"max_steps": 1000, "eval_every": 100, "save_every": 1000, "log_every": 100},
    }
}
SCALED = {"shared_init": "damped"}
METHODS: dict[str, dict[str, Any]] = {
    "conventional": {"policy": "none"},
    **{f"conventional, {m} layers": {"policy": "none", "nlayers": m} for m in (2, 3, 4)},
    "all": {"policy": "all"},
    **{
        f"{name}-{m}": {"policy": name, "groups": m}
        for m in (2, 3, 4)
        for name in ("sequence", "cycle", "cycle-reverse", "sandwich")
    },
    "middle-loop-4": {"policy": "middle-loop", "groups": 4},
    "repeat": {"policy": "repeat"},
    "random": {"policy": "random", "settle": 0.5},
    "dqn": {"policy": "dqn"},
    **{f"bandit-{m}": {"policy": "bandit", "budget_layers": m} for m in (2, 3, 4)},
    "bandit, priced": {"policy": "bandit", "layer_price": 0.02},
    # What the scaled initial weights alone are worth, without the bandit's decisions.
    **{f"sandwich-{m}, 1/n": {"policy": "sandwich", "groups": m} | SCALED for m in (2, 3, 4)},
    "random, 1/n": {"policy": "random", "settle": 0.5, "initial": "sandwich", "groups": 3}
    | {"budget_layers": 3}
    | SCALED,
    "dqn, 1/n": {"policy": "dqn"} | SCALED,
}
Run = tuple[str, str, str, float, int]
NAMES = ("set", "regime", "method", "lr", "seed")  # what tells runs apart


def main() -> int:
    options = arguments()
    try:
        first, *others = options.seeds
        settings = list(product(options.sets, options.regimes, options.methods))
        train_runs([(*each, rate, first) for each in settings for rate in options.rates], options)
        rows = collect(options)
        rates = {each: best_rate(rows, *each) for each in settings}
        train_runs([(*each, rates[each], seed) for seed in others for each in settings], options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:  # a text that is not there, or a run that failed
        print(error, file=sys.stderr)
        return 2
    finally:
        is_committed = options.results.resolve() == RESULTS
        folder = REPOSITORY / "docs" if is_committed else options.results.parent
        write_page(results_of(rows_so_far(options)), folder)
    return 0


def train_runs(runs: Iterable[Run], options: argparse.Namespace) -> None:
    """Train what is not done yet, at most two at a time."""
    known = known_runs(rows_so_far(options))
    left = [run for run in runs if run not in known and not has_ended(run, options)]
    for text, regime, *_ in left:
        cut(text, regime, options.folder)
    jobs = [Job(config_of(run, options), " ".join(map(str, run))) for run in left]

    def on_end(job: Job, ended: Ended) -> None:
        if ended.code not in (0, INTERRUPTED):
            raise InputError(f"{job.name}: {ended.reason}")
        if not ended.code:
            report(job, options)

    logs = options.folder / "logs"
    train_all(jobs, options.processes, threads=1, on_end=on_end, overwrite=True, logs=logs)


def report(job: Job, options: argparse.Namespace) -> None:
    folder = job.config.folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    print(job.name, f"{summary['validation_perplexity']:.4f}", flush=True)
    shutil.rmtree(folder / "checkpoints")
    collect(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = [regime for regime in REGIMES if regime not in OTHER_SHAPES]
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=usual)
    for name, values in (("sets", SETS), ("methods", METHODS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(values), default=list(values))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="to choose from")
    parser.add_argument("--max-steps", type=int, help="to try it out")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def config_of(run: Run, options: argparse.Namespace) -> TrainConfig:
    text, regime, method, rate, seed = run
    name = method.replace(", ", "-").replace(" ", "-").replace("/", "-")
    settings = shape_of(regime) | {
        "dataset": str(options.folder / "data" / f"{text}-{regime}"),
        "tokenizer": SETS[text],
        "lr": rate,
        "seed": seed,
        "epochs": 1000,  # as many as the steps take
        "exp": f"{text}-{regime}/{name}-{rate:g}-{seed}",
        "output_dir": str(options.folder),
    }
    if options.max_steps:
        settings["max_steps"] = options.max_steps
    return TrainConfig.from_flat(**(settings | METHODS[method]))


def shape_of(regime: str) -> dict[str, Any]:
    return SHAPE | OTHER_SHAPES.get(regime, {})


def has_ended(run: Run, options: argparse.Namespace) -> bool:
    return (config_of(run, options).folder / "summary.json").exists()


def known_runs(rows: Iterable[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """The runs whose rows are among earlier results."""
    return {tuple(row[name] for name in NAMES) for row in rows}


def rows_so_far(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not options.results.exists():
        return []
    return json.loads(options.results.read_text(encoding="utf-8"))["rows"]


def cut(text: str, regime: str, folder: Path) -> None:
    """Write a regime's share of a text, and shorter validation and test texts."""
    place = folder / "data" / f"{text}-{regime}"
    if (place / "test.txt").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    texts = load_texts(text)
    parts = {
        "train": texts.train[: REGIMES[regime][text]],
        "valid": texts.validation[:HELD_OUT],
        "test": texts.test[:HELD_OUT],
    }
    for split, part in parts.items():
        (place / f"{split}.txt").write_text(part, encoding="utf-8")


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of earlier results and of all runs done since, written down."""
    rows = rows_so_far(options)
    known = known_runs(rows)
    every: Iterable[Run] = product(SETS, REGIMES, METHODS, options.rates, options.seeds)
    new = [run for run in every if run not in known and has_ended(run, options)]
    rows += [row_of(run, options) for run in new]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results_of(rows), indent=1) + "\n"
    options.results.write_text(text, encoding="utf-8")
    return rows


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {regime: shape_of(regime) for regime in dict.fromkeys(r["regime"] for r in rows)}
    return {"command": "python benchmarks/quality.py", "settings": settings, "rows": rows}


FIGURES = (
    *("validation_perplexity", "test_perplexity", "bits_per_byte", "best_step"),
    *("independent_layers_mean", "independent_layers_end", "owners_end"),
    *("trainable_parameters_mean", "model_state_bytes_mean", "model_state_bytes_peak"),
    *("seconds_per_step", "decision_overhead", "versions"),
)


def row_of(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """A run's figures, with all that it takes to make them again."""
    config = config_of(run, options)
    summary = json.loads((config.folder / "summary.json").read_text(encoding="utf-8"))
    metrics = lines_of(config.folder / "metrics.jsonl")
    scored = [line["validation_perplexity"] for line in metrics if "validation_perplexity" in line]
    worths = [line["q"] for line in lines_of(config.folder / "tying.jsonl") if "q" in line]
    row = dict(zip(NAMES, run, strict=True)) | {name: summary[name] for name in FIGURES}
    row["hardware"] = summary["hardware"] | {"processor": processor()}
    row["steps"] = summary["steps"]
    row["rise_after_the_best"] = scored[-1] / min(scored)
    if config.tying.policy == "bandit":
        row["worth"] = [each[-1] for each in worths[-1]]
    return row


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
