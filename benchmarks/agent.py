"""Does the paper's agent learn anything? More than a thousand decisions, against random changes.

A small model trains with the agent, which decides every five steps, with the paper's literal reward
and with its logarithm. It is compared with its own decisions applied to permuted layers (as many
changes at the same times), with random changes, and with the tying that it
starts from. Results: `benchmarks/results/agent.json` and `docs/agent.md`.

    python benchmarks/agent.py                 # 15 runs, about an hour of one thread; resumes
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from agent_page import AGENT, LITERAL, PERMUTED, RANDOM, START, write_page
from common import QUICK, RESULTS, Case, write_results
from quality_settings import LLAMA, SETTINGS

from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.interrupt import INTERRUPTED
from layer_tying.runs.processes import Ended, Job, train_all

SETTING = "wiki2-bytes"  # of which the agent's runs have the data
FLAGS = {
    **{**LLAMA, "emsize": 32, "tokenizer": "bytes", "bptt": 64, "batch_size": 8},
    **{"lr": 4e-3, "every": 5, "log_every": 50, "max_steps": 6000},
}
FLAGS_OF: dict[str, dict[str, Any]] = {
    AGENT: {"policy": "dqn", "reward": "log-perplexity"},
    LITERAL: {"policy": "dqn", "reward": "perplexity"},
    PERMUTED: {"policy": "recorded", "permute": 0},
    RANDOM: {"policy": "random"},
    START: {"policy": "all"},
}
QUICK_STEPS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, into runs/quick")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/agent"), help="of the runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or (QUICK if options.quick else RESULTS) / "agent.json"
    data = options.folder / "data"
    cut = SETTINGS[SETTING].cut
    if cut and not (data / "test.txt").exists():
        cut(data)
    steps = QUICK_STEPS if options.quick else FLAGS["max_steps"]
    jobs = {job.name: job for job in jobs_of(options.seeds, options.folder, steps)}

    def report(job: Job, ended: Ended) -> None:
        if ended.code not in (0, INTERRUPTED):
            raise InputError(f"{job.name}: {ended.reason}")
        print(f"{job.name}: ended", flush=True)
        done = [row_of(job) for job in jobs.values() if job.is_done]
        write_results(output, done)

    logs = options.folder / "logs"
    train_all(
        list(jobs.values()), options.processes, threads=1, resume=True, on_end=report, logs=logs
    )
    print(f"{output}, {write_page(output)}")


def jobs_of(seeds: list[int], folder: Path, steps: int) -> Iterator[Job]:
    """The runs; what is permuted waits for the run whose decisions it repeats."""
    for seed in seeds:
        for method, own in FLAGS_OF.items():
            name = f"{method}-{seed}"
            flags = {**FLAGS, **own, "max_steps": steps, "seed": seed, "exp": name}
            flags |= {"dataset": str(folder / "data"), "output_dir": str(folder)}
            after: tuple[str, ...] = ()
            if method == PERMUTED:
                after = (f"{AGENT}-{seed}",)
                flags["source"] = str(folder / after[0])
            yield Job(TrainConfig.from_flat(**flags), name, after)


def row_of(job: Job) -> Case:
    """A run's figures: quality, and what its decisions did."""
    folder = job.config.folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    decisions = _lines(folder / "tying.jsonl")[1:]
    losses = [[x["step"], x["loss"]] for x in _lines(folder / "metrics.jsonl") if "loss" in x]
    states = [tuple(line["state"]) for line in decisions]
    late = losses[len(losses) * 3 // 4 :]
    return {
        "method": job.name.rpartition("-")[0],
        "seed": summary["seed"],
        "decisions": len(decisions),
        "changes": sum(one != other for one, other in pairwise(states)),
        "independent": summary["independent_layers_mean"],
        "late_loss": statistics.fmean(loss for _, loss in late),
        "validation": summary["validation_perplexity"],
        "test": summary["test_perplexity"],
        "persistence": _persistence([line["action"] for line in decisions]),
        "losses": losses,
    }


def _persistence(actions: list[list[int] | None]) -> float | None:
    """How often a layer has its most frequent choice in the last quarter: 1 if it never changes."""
    chosen = [action for action in actions if action is not None]
    late = chosen[len(chosen) * 3 // 4 :]
    if not late:
        return None
    by_layer = zip(*late, strict=True)
    return statistics.fmean(Counter(each).most_common(1)[0][1] / len(late) for each in by_layer)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
