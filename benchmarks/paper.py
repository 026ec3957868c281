"""Every row of the paper at small scale: trains what is not done yet, and writes the results.

A finished row is left alone; one that was stopped goes on from its newest checkpoint. At most two
rows train at once, one thread each. After every row benchmarks/results/paper-small.json
and docs/results.md are written anew, so that what was done counts when it is stopped (Ctrl-C
lets the running rows save). Rows in that file whose runs are elsewhere stay in it.

    python benchmarks/paper.py
    python benchmarks/paper.py --rows gpt2-wiki2-conventional gpt2-wiki2-dynamic --seeds 0

A language model takes about ten minutes on a CPU thread that nothing else is using.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import agent_page
import published_page
from common import QUICK, RESULTS
from paper_pictures import draw_pictures

from layer_tying.errors import InputError
from layer_tying.files import write_text_whole
from layer_tying.paper.reproduce import as_asked, jobs_of, train_rows
from layer_tying.paper.results import (
    reasons_so_far,
    results_of,
    with_earlier,
    without_place,
    write_results,
)
from layer_tying.paper.rows import recipes
from layer_tying.report.results import results_page
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.interrupt import INTERRUPTED
from layer_tying.runs.processes import Ended, Job

SCALE = "small"
MOST_PROCESSES = 2
REPOSITORY = Path(__file__).resolve().parent.parent
Rows = dict[int, dict[str, TrainConfig]]  # of each seed, by name


def main() -> int:
    options = arguments()
    rows = {seed: recipes(SCALE, folder_of(options, seed), seed) for seed in options.seeds}
    reasons = reasons_so_far(options.results)

    def on_end(job: Job, ended: Ended) -> None:
        if ended.code == INTERRUPTED:
            return
        if ended.code:
            reasons[job.name] = without_place(ended.reason, options.data_dir)
        print(f"{job.name}: {reasons[job.name] if ended.code else 'done'}", flush=True)
        write(rows, reasons, options)

    try:
        for seed, of_seed in rows.items():
            asked = {
                n: as_asked(r, options.data_dir, options.max_steps) for n, r in of_seed.items()
            }
            jobs = jobs_of(asked, options.rows or list(asked))
            done = sum(job.is_done for job in jobs)
            print(f"seed {seed}: {len(jobs)} rows, {done} of them done", flush=True)
            train_rows(jobs, options.processes, Path(folder_of(options, seed)), on_end)
        write(rows, reasons, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def folder_of(options: argparse.Namespace, seed: int) -> str:
    """Where the runs of a seed lie."""
    return f"{options.output_dir}-{seed}" if seed else options.output_dir


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", help=f"where the runs lie (default: runs/{SCALE})")
    parser.add_argument("--data-dir", help="where local data sets lie (else $LAYER_TYING_DATA)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=MOST_PROCESSES)
    trial = f"of every row, to try them out: all of it goes to {QUICK}"
    parser.add_argument("--max-steps", type=int, help=trial)
    parser.add_argument("--results", type=Path, help="default: the committed ones")
    parser.add_argument("--page", type=Path, help="default: docs/results.md")
    options = parser.parse_args()
    is_trial = options.max_steps is not None
    options.output_dir = options.output_dir or (str(QUICK / SCALE) if is_trial else f"runs/{SCALE}")
    results = f"paper-{SCALE}.json"
    options.results = options.results or (QUICK if is_trial else RESULTS) / results
    options.page = options.page or (QUICK if is_trial else REPOSITORY / "docs") / "results.md"
    for file in (options.results, options.page):
        file.parent.mkdir(parents=True, exist_ok=True)
    return options


def write(rows: Rows, reasons: dict[str, str], options: argparse.Namespace) -> None:
    """The results so far: of every row that is done, here or earlier."""
    results = with_earlier(results_of(rows, reasons, SCALE), options.results)
    write_results(options.results, results)
    write_text_whole(options.page, results_page(results, agent_and_published_code()))
    draw_pictures(rows, options.page.parent / "images")


def agent_and_published_code() -> list[str]:
    """The findings of the two experiments that have pages of their own."""
    agent = agent_page.groups_of(agent_page.COMMITTED)
    published = published_page.groups_of(published_page.RESULTS / "published.json")
    return [
        "## Does the paper's agent learn anything?",
        "1,200 decisions of a small model ([what the agent learns](agent.md)):",
        agent_page.answer(agent),
        "## What the published code does",
        published_page.answer(published) + " See [the published code, measured](published.md).",
        "![Independent layers, claimed and real, and validation perplexity](images/published.png)",
    ]


if __name__ == "__main__":
    sys.exit(main())
