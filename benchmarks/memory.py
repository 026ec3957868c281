"""Peak memory of training a GPT-2 of 48 layers x 1600: conventional against tied.

Each side trains in a process of its own: bf16 weights, fused AdamW, one sequence a step. A tied
side goes through ten transitions, to one independent layer more or to half of them and back; every
second one is followed by an evaluation, as a decision would be, and two by a training step.
Reported are the peak resident set (on CUDA: the peak allocation), the peak above what the process
held after it had trained a toy, what the model state takes of it, by component, and how far
transitions raised it. 1,024 tokens are measured with checkpointing only, and at three points.

    python benchmarks/memory.py            # 25 minutes on two CPU cores; goes on if stopped
    python benchmarks/memory.py --quick    # 12 x 256 instead, a minute, into runs/quick
    python benchmarks/memory.py --tokens 256
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from common import (
    Case,
    adamw,
    arguments,
    batch,
    gpt2,
    measure_all,
    name_of,
    own_bytes,
    peak_of_phase,
    random_tying,
    run_case_or,
    train_step,
)
from performance_page import write_page
from performance_tables import ratio_and_bound
from torch.optim import Optimizer
from transformers import PreTrainedModel

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.runs.memory import model_state
from layer_tying.tasks.cross_entropy import language_model_loss
from layer_tying.tasks.evaluation import evaluating

TRANSITIONS = 10
SHAPE = {"layers": 48, "width": 1600, "heads": 25}
QUICK_SHAPE = {"layers": 12, "width": 256, "heads": 4}
INDEPENDENT = (1, 4, 7, 10)  # and all
INDEPENDENT_IF_LONG = (1, 7)


def measure(case: Case) -> Case:
    """Build, train, tie and untie; what it took, in bytes and seconds."""
    own = own_bytes()
    num_layers, independent, length = case["layers"], case["independent"], case["length"]
    torch.manual_seed(0)
    start = time.perf_counter()
    tying = random_tying(num_layers, independent, seed=0)
    model = gpt2(num_layers, case["width"], case["heads"], length, tying)
    build_seconds = time.perf_counter() - start
    build = peak_of_phase()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw(model)
    layers = TiedLayers(model, optimizer)
    for _ in range(2):
        train_step(model, optimizer, length)
    before = max(build, peak_of_phase())
    state = model_state(model, [optimizer])
    after = before
    if independent < num_layers:
        go_through_transitions(model, optimizer, layers, length)
        after = max(before, peak_of_phase())
    return {
        "own_bytes": own,
        "build_above_own_bytes": build - own,
        "build_seconds": build_seconds,
        "peak_bytes": after,
        "above_own_bytes": after - own,
        "raised_by_transitions_bytes": after - before,
        "block_state_bytes": 4 * sum(p.nbytes for p in layers.parameters(0).values()),
        "parameter_bytes": state.parameter_bytes,
        "gradient_bytes": state.gradient_bytes,
        "optimizer_state_bytes": state.optimizer_state_bytes,
        "model_state_bytes": state.total_bytes,
    }


def go_through_transitions(
    model: PreTrainedModel, optimizer: Optimizer, layers: TiedLayers, length: int
) -> None:
    """Ten transitions from and to the number of independent layers that there are now."""
    number = layers.tying.num_independent
    for index in range(TRANSITIONS):
        other = number + 1 if index % 4 == 0 else max(1, number // 2)
        to = number if index % 2 else other
        layers.apply(random_tying(layers.tying.num_layers, to, seed=1 + index))
        if index % 2:
            with evaluating(model):
                language_model_loss(model, *batch(length, seed=index))
        if index in (TRANSITIONS // 2, TRANSITIONS - 1):
            train_step(model, optimizer, length)
    layers.verify()


def main() -> None:
    options = arguments(__doc__, "memory.json", tokens=("256", "1024"))
    measure_all(__file__, cases(options.quick, map(int, options.tokens)), options, line, write_page)


def cases(is_quick: bool, lengths: Iterable[int]) -> Iterator[Case]:
    """The sides, each conventional one before those that are compared with it."""
    shape = QUICK_SHAPE if is_quick else SHAPE
    for length in lengths:
        is_long = length > 256
        for checkpointing in (True,) if is_long else (True, False):
            for independent in (
                shape["layers"],
                *(INDEPENDENT_IF_LONG if is_long else INDEPENDENT),
            ):
                case = {**shape, "length": length, "checkpointing": checkpointing}
                yield {**case, "independent": independent}


def line(row: Case, rows: list[Case]) -> str:
    name = name_of(row, f", 1 x {row['length']}")
    if "error" in row:
        return f"{name}: {row['error']}"
    ratio, bound = ratio_and_bound(row, rows) or (float("nan"), float("nan"))
    return (
        f"{name}: {row['above_own_bytes'] / 1e6:,.0f} MB above own, "
        f"state {row['model_state_bytes'] / 1e6:,.0f} MB, ratio {ratio:.2f} of {bound:.2f}, "
        f"transitions +{row['raised_by_transitions_bytes'] / 1e6:.0f} MB, "
        f"built in {row['build_seconds']:.1f} s"
    )


if __name__ == "__main__":
    run_case_or(main, measure)
