"""The parts of gpu.sh: numerics against the CPU, memory, speed, and a pair of training runs.

Each measurement runs in a process of its own and is written as soon as it ends. A part begins only
while its share of the time lasts; the pair gets what is left, half each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import memory
import speed
import torch
from accelerate import Accelerator
from common import DEVICE, QUICK, RESULTS, Case, in_a_process, run_case_or, write_results
from performance_page import write_page

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.devices import make_accelerator
from layer_tying.runs.folder import RunFolder
from layer_tying.runs.memory import peak_bytes
from layer_tying.runs.resolve import resolve
from layer_tying.runs.trainer import Trainer
from layer_tying.tasks.evaluation import evaluating

BUDGET = 525.0  # seconds, of which the pair gets what is left; gpu.sh stops at 540
SHAPE = {"layers": 48, "width": 1600, "heads": 25}
MEDIUM = {"layers": 12, "width": 768, "heads": 12}
TINY = {"layers": 6, "width": 64, "heads": 2}


def measure_numerics(case: Case) -> Case:
    """20 steps with 5 transitions in float32, on the CPU and on the device: largest differences."""
    losses, models = [], []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = False
        config = TrainConfig.from_flat(
            policy="dqn", nlayers=6, emsize=64, nhead=2, bptt=64, batch_size=4, precision="fp32"
        )
        trainer = trainer_of(config, Accelerator(cpu=True))
        model = trainer.model
        if device != torch.device("cpu"):
            moved = build_model(model.config, Tying.all_tied(6), device=device)
            with torch.no_grad():
                for mine, its in zip(moved.parameters(), model.parameters(), strict=True):
                    mine.copy_(its)
            model = moved
        losses.append(train_through_transitions(model, trainer, case["gradient"]))
        models.append(model)
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return {
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "relative_weight_difference": max(
            float((a.detach().cpu() - b.detach().cpu()).norm() / a.detach().cpu().norm())
            for a, b in pairs
        ),
        "losses": losses,
    }


def trainer_of(config: TrainConfig, accelerator: Accelerator) -> Trainer:
    """A trainer that writes nothing."""
    resolved, task = resolve(config, accelerator.device)
    return Trainer(resolved, task, accelerator, RunFolder(Path("unused"), active=False))


def train_through_transitions(model: Any, trainer: Trainer, gradient: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    layers = TiedLayers(model, optimizer, gradient=gradient)
    losses = []
    for step in range(20):
        loss = trainer.task.loss(model, next(trainer.task.batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 4 == 0:
            layers.apply(Tying.from_labels([(i * (step + 1)) % (2 + step // 4) for i in range(6)]))
    layers.verify()
    return losses


def measure_training(case: Case) -> Case:
    """Train one side of the pair for as long as it is given, scoring validation as it goes."""
    trainer = trainer_of(TrainConfig.from_flat(**case["config"]), make_accelerator())
    start = time.perf_counter()
    for _ in range(3):  # how long is a step?
        trainer.train_step()
        trainer.decide()
    per_step = (time.perf_counter() - start) / 3
    trainer.num_steps = max(10, int(0.85 * case["seconds"] / per_step))  # the rest validates
    curve: list[Case] = []
    due = time.perf_counter()
    while trainer.step < trainer.num_steps:
        loss = trainer.train_step()
        trainer.decide()
        spent = time.perf_counter() - start
        is_last = trainer.step == trainer.num_steps or spent > case["seconds"]
        if time.perf_counter() >= due or is_last:
            due = time.perf_counter() + case["seconds"] / 8
            curve.append(point(trainer, float(loss), spent))
        if is_last:
            break
    return {
        "steps": trainer.step,
        "step_seconds": per_step,
        "curve": curve,
        "tally": trainer.tally.means(),
        "peak_bytes": peak_bytes(DEVICE),
    }


def point(trainer: Trainer, loss: float, seconds: float) -> Case:
    with evaluating(trainer.model):
        scores = trainer.task.scores(trainer.model, "validation", 8)
    return {
        "step": trainer.step,
        "seconds": seconds,
        "loss": loss,
        "independent_layers": trainer.layers.tying.num_independent,
        **scores,
    }


MEASURES = {
    "numerics": measure_numerics,
    "memory": memory.measure,
    "speed": lambda case: speed.PARTS[case["part"]](case),
    "training": measure_training,
}


def cases(tiny: bool) -> list[tuple[float, Case]]:
    """What is measured before the pair, most important first, and by when it has to begin."""
    shape = TINY if tiny else SHAPE
    found: list[tuple[float, Case]] = [
        (60.0, {"measure": "numerics", "gradient": gradient}) for gradient in ("sum", "owner")
    ]
    for length in (64,) if tiny else (1024, 256):
        for checkpointing in (True,) if tiny else (True, False):
            for independent in (shape["layers"], 1) if tiny else (48, 7, 1, 4, 10):
                case = {**shape, "length": length, "checkpointing": checkpointing}
                found.append((220.0, {"measure": "memory", **case, "independent": independent}))
    tied = {**shape, "independent": 2 if tiny else 7, "length": 64 if tiny else 1024}
    usual = ("steps", "mixture", "generate")
    for part in usual if tiny else (*usual, "decision", "compile"):
        case = {"measure": "speed", "part": part, "family": "gpt2", "repeats": 2 if tiny else 5}
        more = {"checkpointing": True, "sequences": 1} if part == "mixture" else {}
        found.append((300.0, {**case, **tied, **more}))
    for sequences, shape in () if tiny else ((8, SHAPE), (1, MEDIUM), (8, MEDIUM)):
        case = {"measure": "speed", "part": "mixture", "repeats": 5, **shape, "length": 1024}
        sets = {"independent": shape["layers"] // 4, "sequences": sequences}
        found.append((300.0, {**case, **sets, "checkpointing": False}))
    return found


def pair(options: argparse.Namespace, seconds: float) -> list[Case]:
    """The paper's WikiText-2 pair: conventional and dynamic, from the same seed."""
    shape = TINY if options.tiny else SHAPE
    config = {
        "dataset": options.data or "",
        "tokenizer": options.tokenizer,
        **{"nlayers": shape["layers"], "emsize": shape["width"], "nhead": shape["heads"]},
        **{"bptt": 64 if options.tiny else 256, "batch_size": 4 if options.tiny else 8},
        **{"lr": 3e-4, "every": 5 if options.tiny else 15, "precision": "bf16", "epochs": 100},
        "checkpointing": not options.tiny,
    }
    return [
        {"measure": "training", "seconds": seconds, "config": {**config, "policy": policy}}
        for policy in ("none", "dqn")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Nine minutes on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="tiny numbers, to try it out")
    parser.add_argument("--data", help="WikiText-2: a folder with its splits, or a text file")
    parser.add_argument("--tokenizer", default="bpe:8000", help="as for layer-tying train")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="all together; at most 525")
    parser.add_argument("--measures", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.output = options.output or (QUICK if options.tiny else RESULTS) / "gpu.json"
    start = time.perf_counter()
    rows: list[Case] = []

    def run(case: Case) -> None:
        began = time.perf_counter()
        rows.append(in_a_process(__file__, case))
        rows[-1]["wall_seconds"] = round(time.perf_counter() - began, 1)
        write_results(options.output, rows)
        print({k: v for k, v in rows[-1].items() if k not in ("losses", "curve")}, flush=True)

    for latest, case in cases(options.tiny):
        share = latest * options.seconds / BUDGET
        if case["measure"] in options.measures and time.perf_counter() - start < share:
            run(case)
    sides = pair(options, 0.0) if "training" in options.measures else []
    for turns, case in zip((2, 1), sides, strict=False):
        left = options.seconds - (time.perf_counter() - start)
        start_up = 5.0 if options.tiny else 25.0
        case["seconds"] = 4.0 if options.tiny else left / turns - start_up
        run(case)
    print(f"{options.output}, {write_page(options.output.parent)}")


if __name__ == "__main__":
    run_case_or(main, lambda case: MEASURES[case["measure"]](case))
