"""A trained model made smaller, by `compress` and by its rivals, all healed alike.

All methods have the same teacher, as many parameters, the same batches and steps and the same
objective. Each case runs in a process of its own; what was stopped goes on, and what failed is
tried again. Results: `benchmarks/results/compress.json` and `docs/compress.md`.

    python benchmarks/compress.py --processes 2                     # what `COMPARED` names
    python benchmarks/compress.py --teachers vit --methods "compress, gradual" --rates 1e-3 2e-3
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Case, in_a_process, rows_so_far, run_case_or, write_results
from compress_page import write_page
from compress_rivals import RIVALS
from compress_teachers import SCRATCH, TEACHERS, run_of
from transformers import PreTrainedModel

from layer_tying.compression import source
from layer_tying.compression.grouping import Reading
from layer_tying.compression.healing import Healing
from layer_tying.compression.outcome import OutcomeOf
from layer_tying.compression.sensitivity import Probe, choose
from layer_tying.compression.settings import HealingSettings
from layer_tying.core.find import find_layers
from layer_tying.runs.config import OptimizationConfig, read_config
from layer_tying.runs.processes import Job, train_all
from layer_tying.runs.tasks import task_of
from layer_tying.tasks.base import Task

OURS: dict[str, dict[str, Any]] = {
    "compress": {"sharing": "mixture"},
    "compress, tied": {"sharing": "tied"},
    "compress, hidden states": {"sharing": "mixture", "hidden_weight": 1.0},
    "compress, gradual": {"sharing": "mixture", "gradual": True},
    "compress, closed form": {"sharing": "mixture", "start": "closed-form"},
}
GROUPS = {f"compress, {name}": name for name in ("neighbours", "cycle", "free", "grown")}
METHODS = [*OURS, *GROUPS, *RIVALS, SCRATCH]
CLAIMED = ("compress", "low rank")  # with four layers, by three seeds
MAIN = ["compress", "low rank", "sequence, first layers", "least influential dropped"]
COMPARED = {  # by the model and the number of layers: what takes less than five hours
    ("text", 4): ["compress", "compress, tied", *RIVALS, SCRATCH],
    ("text", 6): ["compress", "low rank"],
    ("vit", 4): MAIN,
    ("bert", 4): [*MAIN, SCRATCH],
}
SETS = (4, 6)
TIED = HealingSettings(sharing="tied")  # for rivals: nothing is mixed
PROBES = 2
SPLITS = ("validation", "test")
BEFORE = [f"{split}{what}_before" for split in SPLITS for what in ("", "_accuracy")]


def main() -> None:
    """Train the models that are missing, then measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/compress"), help="of teachers")
    parser.add_argument("--output", type=Path, default=RESULTS / "compress.json")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: see COMPARED")
    parser.add_argument("--sets", nargs="+", type=int, choices=SETS, default=list(SETS))
    parser.add_argument("--rates", nargs="+", type=float, help="default: the best that is known")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0; of what is claimed three")
    parser.add_argument("--steps", type=int, help="of healing; default: a tenth of the teacher's")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the results say what each case and each training run has
    rows = [row for row in rows_so_far(options.output) if "error" not in row]
    known = len(rows)
    cases = [*_gates(options), *_cases(options)]
    missing = [case for case in cases if not any(case.items() <= row.items() for row in rows)]
    runs = [run_of(options.folder, case) for case in missing]
    jobs = {run.logging.exp: Job(run, run.logging.exp) for run in runs}
    ended = train_all(list(jobs.values()), options.processes, threads=1, resume=True)
    if failed := [name for name, end in ended.items() if end.code]:
        raise SystemExit(f"{failed[0]} could not be trained")

    def measured(case: Case) -> Case:
        more = {"folder": str(options.folder), "before": _scores_before(case, rows[known:])}
        found = in_a_process(__file__, {**case, **more})
        row = {name: value for name, value in found.items() if name not in more}
        rows.append(row)  # at once, for the cases to come
        return row

    with ThreadPoolExecutor(options.processes) as pool:
        for row in pool.map(measured, missing):
            write_results(options.output, rows)
            print(json.dumps(row), flush=True)
    print(write_page(options.output))


def _scores_before(case: Case, rows: Iterable[Case]) -> Case:
    """The teacher's scores, once they were measured for another case: they take minutes."""
    for row in rows:
        if row["teacher"] == case["teacher"] and "test_before" in row:
            return {name: value for name, value in row.items() if name in BEFORE}
    return {}


def _gates(options: argparse.Namespace) -> Iterator[Case]:
    """Models of three layers, trained for as long as the teachers, which have to be worse."""
    for teacher in options.teachers:
        flags = {"method": SCRATCH, "sets": 3, "steps": 0, "lr": TEACHERS[teacher].rate}
        yield {"teacher": teacher, **flags, "seed": 0}


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    """What to measure. A model from scratch has its teacher's learning rate."""
    for sets, name in product(options.sets, options.teachers):
        teacher = TEACHERS[name]
        steps = options.steps or teacher.steps // 10
        for method in options.methods or COMPARED.get((name, sets), []):
            is_claimed = sets == 4 and method in CLAIMED
            seeds = options.seeds or ([0, 1, 2] if is_claimed else [0])
            halved = sets == 4 and method in teacher.at_half
            rates = options.rates or [teacher.healing_rate / (2 if halved else 1)]
            for rate, seed in product([teacher.rate] if method == SCRATCH else rates, seeds):
                case = {"teacher": name, "method": method, "sets": sets, "steps": steps}
                yield {**case, "lr": rate, "seed": seed}


def measure(case: Case) -> Case:
    """One method: its quality before and after healing."""
    torch.set_num_threads(1)
    folder = run_of(Path(case["folder"]), case).folder
    return _from_scratch(folder) if case["method"] == SCRATCH else _healed(case, folder)


def _from_scratch(folder: Path) -> Case:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "parameters": summary["trainable_parameters_end"],
        "seconds": round(summary["steps"] * summary["seconds_per_step"], 2),
        **{split: summary[f"{split}_perplexity"] for split in SPLITS},
        **{f"{split}_accuracy": summary.get(f"{split}_accuracy") for split in SPLITS},
    }


def _healed(case: Case, folder: Path) -> Case:
    torch.manual_seed(case["seed"])
    teacher, _ = source.open_model(folder)
    outcome_of = source.kind_of(teacher).outcome_of
    task = task_of(read_config(folder).replace(seed=case["seed"] + 1), folder)
    batches = [next(task.batches) for _ in range(PROBES)]
    began = time.perf_counter()
    student, reading, settings = _student(case, teacher, batches, outcome_of)
    optimization = OptimizationConfig(
        lr=case["lr"], final_lr=0.0, max_steps=case["steps"], precision="fp32"
    )
    healing = Healing(teacher, student, reading, optimization, settings, outcome_of=outcome_of)
    healing.start_from(batches)
    deciding = time.perf_counter() - began
    before = case["before"] or _scores(task, teacher, "_before")
    tied = task.scores(student, "validation")["perplexity"]
    began = time.perf_counter()
    while healing.step < healing.num_steps:
        healing.train_step(next(task.batches))
    seconds = time.perf_counter() - began
    return {
        "reading": list(reading),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_before": sum(p.numel() for p in teacher.parameters()),
        "seconds_deciding": round(deciding, 2),
        "seconds": round(seconds, 2),
        **before,
        "validation_tied": tied,
        **_scores(task, student),
    }


def _scores(task: Task, model: PreTrainedModel, when: str = "") -> Case:
    """Perplexities, and accuracies where the task has one."""
    found: Case = {}
    for split in SPLITS:
        scores = task.scores(model, split)
        found[f"{split}{when}"] = scores["perplexity"]
        found[f"{split}_accuracy{when}"] = scores.get("accuracy")
    return found


def _student(
    case: Case, teacher: PreTrainedModel, batches: Sequence[Any], outcome_of: OutcomeOf
) -> tuple[PreTrainedModel, Reading, HealingSettings]:
    """What is healed: a copy of the teacher, what its layers will read, and how."""
    method, sets = case["method"], case["sets"]
    if method in RIVALS:
        options = {"seed": case["seed"], "batches": batches, "outcome_of": outcome_of}
        return *RIVALS[method](teacher, sets, **options), TIED
    chosen_on = batches[: TEACHERS[case["teacher"]].probes]  # all methods heal on the same others
    probe = Probe(find_layers(teacher), chosen_on, outcome_of)
    reading = choose(probe, sets, GROUPS.get(method, "any")).reading
    return copy.deepcopy(teacher), reading, HealingSettings(**OURS.get(method, {}))


if __name__ == "__main__":
    run_case_or(main, measure)
