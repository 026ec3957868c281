"""The sides that the benchmarks of speed compare, and how their steps are timed."""

from __future__ import annotations

import time

import torch
from common import DEVICE, Case, adamw, batch, gpt2, random_tying
from torch.optim import Optimizer
from transformers import PreTrainedModel

from layer_tying.core.tying import Tying
from layer_tying.tasks.cross_entropy import language_model_loss

Side = tuple[PreTrainedModel, Optimizer]


def side(case: Case, tying: Tying) -> Side:
    torch.manual_seed(0)
    model = gpt2(case["layers"], case["width"], case["heads"], case["length"], tying)
    return model, adamw(model)


def both_sides(case: Case) -> tuple[Side, Side]:
    """The conventional model and the tied one."""
    tying = random_tying(case["layers"], case["independent"], seed=0)
    return side(case, Tying.independent(case["layers"])), side(case, tying)


def timed_step(
    model: PreTrainedModel, optimizer: Optimizer, length: int, sequences: int = 1
) -> dict[str, float]:
    """Seconds of each part of a training step, and of all of it."""
    marks = [now()]
    loss = language_model_loss(model, *batch(length, sequences=sequences))
    marks.append(now())
    loss.backward()
    marks.append(now())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(now())
    parts = {
        name: marks[i + 1] - marks[i] for i, name in enumerate(("forward", "backward", "optimizer"))
    }
    return {**parts, "step": marks[-1] - marks[0]}


def now() -> float:
    """The time when the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(repeats: list[dict[str, float]]) -> dict[str, float]:
    """The minimum of each part over the repeats."""
    return {name: min(each[name] for each in repeats) for name in repeats[0]}
