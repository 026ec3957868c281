"""What else saves training memory: the same model and step under the methods that people use.

A GPT-2 of 48 layers x 1600 in bf16, one sequence of 256 tokens a step, each method in a process of
its own. Memory is the peak above the interpreter's own; time is the faster of two steps after the
first. What the methods do to the quality of a model is not compared here: tying and LoRA train
fewer parameters, the others train all of them.

Needs ``pip install 'dynamic-layer-tying[bench]'``; a method that is not installed gives an error in
its row.

    python benchmarks/alternatives.py            # 11 minutes on two CPU cores; goes on if stopped
    python benchmarks/alternatives.py --quick    # 12 x 256 instead, a minute, into runs/quick
    python benchmarks/alternatives.py --optimizers AdamW LoRA
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Container, Iterator

import torch
from common import (
    Case,
    adamw,
    arguments,
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
from torch import nn
from torch.optim import Optimizer

from layer_tying.runs.memory import model_state

LR = 1e-4
SHAPE = {"layers": 48, "width": 1600, "heads": 25, "length": 256}
QUICK_SHAPE = {"layers": 12, "width": 256, "heads": 4, "length": 64}


def adamw8bit(model: nn.Module) -> Optimizer:
    return importlib.import_module("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=LR)


def apollo_mini(model: nn.Module) -> Optimizer:
    """As its authors set it up: rank 1 for the layers' matrices, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    projected = {
        **{"params": matrices, "rank": 1, "proj": "random", "scale_type": "tensor"},
        **{"scale": 128, "update_proj_gap": 200, "proj_type": "std"},
    }
    module = importlib.import_module("apollo_torch")
    return module.APOLLOAdamW([{"params": rest}, projected], lr=LR)


def lora(model: nn.Module) -> Optimizer:
    """Rank 16 on every matrix of the layers; all else is frozen."""
    peft = importlib.import_module("peft")
    matrices = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=16, target_modules=matrices, fan_in_fan_out=True)
    peft.inject_adapter_in_model(config, model)
    return adamw(model)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": adamw,
    "8-bit AdamW": adamw8bit,
    "APOLLO-Mini": apollo_mini,
    "LoRA": lora,
}
# (optimizer, share of the layers that are independent, checkpointing)
METHODS = [
    ("AdamW", 1, False),
    ("AdamW", 1, True),
    ("8-bit AdamW", 1, True),
    ("APOLLO-Mini", 1, True),
    ("LoRA", 1, True),
    ("AdamW", 7 / 48, False),
    ("AdamW", 7 / 48, True),
    ("8-bit AdamW", 7 / 48, True),
]


def measure(case: Case) -> Case:
    """Train three steps; what it took, in bytes and seconds."""
    own = own_bytes(OPTIMIZERS[case["optimizer"]])
    torch.manual_seed(0)
    tying = random_tying(case["layers"], case["independent"], seed=0)
    model = gpt2(case["layers"], case["width"], case["heads"], case["length"], tying)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = OPTIMIZERS[case["optimizer"]](model)
    seconds = []
    for step in range(3):
        start = time.perf_counter()
        train_step(model, optimizer, case["length"], seed=step)
        seconds.append(time.perf_counter() - start)
    state = model_state(model, [optimizer])
    return {
        "above_own_bytes": peak_of_phase() - own,
        "trained_parameters": state.num_trainable,
        "parameter_bytes": state.parameter_bytes,
        "gradient_bytes": state.gradient_bytes,
        "optimizer_state_bytes": state.optimizer_state_bytes,
        "step_seconds": min(seconds[1:]),
    }


def main() -> None:
    options = arguments(__doc__, "alternatives.json", optimizers=OPTIMIZERS)
    measure_all(__file__, cases(options.quick, options.optimizers), options, line, write_page)


def cases(is_quick: bool, optimizers: Container[str]) -> Iterator[Case]:
    shape = QUICK_SHAPE if is_quick else SHAPE
    for optimizer, share, checkpointing in METHODS:
        if optimizer in optimizers:
            independent = max(1, round(share * shape["layers"]))
            case = {**shape, "optimizer": optimizer, "independent": independent}
            yield {**case, "checkpointing": checkpointing}


def line(row: Case, rows: list[Case]) -> str:
    name = name_of(row, f" layers, {row['optimizer']}")
    if "error" in row:
        return f"{name}: {row['error']}"
    return f"{name}: {row['above_own_bytes'] / 1e6:,.0f} MB, {row['step_seconds']:.2f} s a step"


if __name__ == "__main__":
    run_case_or(main, measure)
