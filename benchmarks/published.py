"""The published code, measured: does it hold as many independent layers as it claims?

Its training loop, agent and model run as they are, from a checkout of
https://github.com/tamirdh/Dynamic-Layer-Tying that is named by its path; only the data are ours,
and nothing is written to disk. After each of its decisions we count the independent layers that its
state claims, and the distinct storages that there are. On the same model, data, steps and seeds
train `DynamicTying` with the paper's agent, and the model without tying.

    python benchmarks/published.py PATH_TO_THE_CHECKOUT    # 9 runs, 40 minutes of a thread; resumes

Results: `benchmarks/results/published.json` and `docs/published.md`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common import Case, arguments, measure_all, run_case_or
from published_page import SIDES, write_page
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from layer_tying import DynamicTying
from layer_tying.data.texts import load_texts
from layer_tying.tasks.evaluation import evaluating

CHECKOUT = "PUBLISHED_CHECKOUT"  # environment variable of the processes that measure
BYTES = range(256)  # the vocabulary; the published code asks only for its length
STEPS_OF_A_DECISION = 4  # in the published code
HELD_OUT, VALIDATION = 200_000, 20_000  # bytes
SHAPE = {"layers": 12, "width": 64, "heads": 2, "length": 64, "batch": 8, "lr": 1e-3}
SEEDS = (0, 1, 2)


class Blocks(Dataset[dict[str, Tensor]]):
    """A text's bytes in blocks, and for each byte the next one."""

    def __init__(self, text: str, length: int) -> None:
        self._bytes = torch.tensor(list(text.encode()))
        self._length = length

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = index * self._length, (index + 1) * self._length
        return {
            "input_ids": self._bytes[start:end],
            "labels": self._bytes[start + 1 : end + 1],
        }


@dataclass
class Run:
    """One side in training, and what is noted after its decisions and its evaluations."""

    case: Case
    model: nn.Module
    train: Blocks
    validation: Blocks
    optimizer: Optimizer | None = None
    claimed: list[int] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)

    def note_decision(self, claimed: int) -> None:
        """Count the storages of the layers, and the bytes of the model in training."""
        self.claimed.append(claimed)
        blocks: Any = self.model.get_submodule("transformer.h")
        stored = {tuple(p.data_ptr() for p in block.parameters()) for block in blocks}
        self.storages.append(len(stored))
        self.state_bytes.append(_state_bytes(self.model, self.optimizer))


def measure(case: Case) -> Case:
    """Train one side; its record, its test perplexity, seconds and peak memory."""
    torch.manual_seed(case["seed"])
    np.random.seed(case["seed"])  # of the published agent's exploration
    texts = load_texts("wiki2")
    train = Blocks(texts.train, case["length"])
    validation = Blocks(texts.validation[:VALIDATION], case["length"])
    test = Blocks(texts.test[:HELD_OUT], case["length"])
    models = published("quantum_models")
    shape = (case[name] for name in ("layers", "heads", "width"))
    model = models.DynamicGPT(models.GPTConfig(case["length"], len(BYTES), *shape))
    run = Run(case, model, train, validation)
    start = time.process_time()
    TRAIN[case["side"]](run)
    return {
        "processor_seconds": time.process_time() - start,
        "test_perplexity": _perplexity(model, test),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "claimed": run.claimed,
        "storages": run.storages,
        "state_bytes_mean": sum(run.state_bytes) / len(run.state_bytes),
        "state_bytes_peak": max(run.state_bytes),
        "validation_perplexities": run.perplexities,
        "published_commit": _git_commit(),
    }


def train_published(run: Run) -> None:
    """The published loop, untouched; its evaluations see our validation split."""
    trainer, models = published("dqn_trainer"), published("quantum_models")
    apply_action = models.DynamicGPT.apply_action

    def apply_and_note(self: Any, action: int, layer: int) -> None:
        apply_action(self, action, layer)
        run.note_decision(sum(i == owner for i, owner in enumerate(self.state)))

    class NotingAccelerator(Accelerator):
        def prepare(self, *objects: Any, **options: Any) -> Any:
            run.optimizer = run.optimizer or objects[0]  # the first of the first call
            return super().prepare(*objects, **options)

        def log(self, values: dict[str, Any], *_: Any, **__: Any) -> None:
            run.perplexities += [v for k, v in values.items() if k.startswith("perplexity")]

        def save(self, *_: Any, **__: Any) -> None:
            """It would write the whole model whenever it is better."""

    case = run.case
    layers = case["layers"]
    args = argparse.Namespace(
        **{"lr": case["lr"], "batch_size": case["batch"], "eval_batch_size": 32},
        **{"epochs": case["episodes"], "nlayers": layers, "exp": "measured"},
    )
    agent = trainer.get_dqn_net(layers, sum(range(1, layers + 1)))
    models.DynamicGPT.apply_action = apply_and_note
    data, accelerator = (run.train, run.validation), NotingAccelerator(cpu=True)
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for the text files that it writes
        trainer.q_learn_loop(run.model, agent, *data, args, accelerator, BYTES)
        os.chdir(home)


def train_ours(run: Run) -> None:
    """The same steps with ``DynamicTying``: the paper's agent, and its reward."""
    run.model.requires_grad_(True)
    run.optimizer = _adamw(run)
    batches = _shuffled(run)
    tying = DynamicTying(
        *(run.model, run.optimizer, "dqn"),
        every=STEPS_OF_A_DECISION,
        seed=run.case["seed"],
        layers="transformer.h",
    )

    def reward() -> float:
        with evaluating(run.model):
            return -math.exp(_loss(run.model, next(batches)).item())

    def decide() -> None:
        if tying.step(reward=reward):
            run.note_decision(tying.tying.num_independent)

    _train(run, batches, decide)


def train_untied(run: Run) -> None:
    """The same steps, all layers independent."""
    run.model.requires_grad_(True)
    run.optimizer = _adamw(run)
    _train(run, _shuffled(run), lambda: None)
    run.note_decision(run.case["layers"])


TRAIN = {"published": train_published, "layer-tying": train_ours, "untied": train_untied}


def _train(run: Run, batches: Iterator[dict[str, Tensor]], after_step: Callable[[], None]) -> None:
    """The steps of the published loop, with its optimizer and clipping."""
    assert run.optimizer
    steps_of_an_episode = STEPS_OF_A_DECISION * (run.case["layers"] - 1)
    for _ in range(run.case["episodes"]):
        for _ in range(steps_of_an_episode):
            _loss(run.model, next(batches)).backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=1.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
            after_step()
        run.perplexities.append(_perplexity(run.model, run.validation))


def _adamw(run: Run) -> Optimizer:
    return torch.optim.AdamW(run.model.parameters(), lr=run.case["lr"], weight_decay=0.01)


def _shuffled(run: Run) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from DataLoader(run.train, batch_size=run.case["batch"], shuffle=True)


def published(module: str) -> ModuleType:
    """A module of the published code, with stand-ins for what only its data loading needs."""
    folder = str(Path(os.environ[CHECKOUT]) / "code")
    if folder not in sys.path:
        sys.path.insert(0, folder)
        for name, function in (("torchinfo", "summary"), ("datasets", "load_dataset")):
            stand_in = ModuleType(name)
            setattr(stand_in, function, lambda *_, **__: None)
            sys.modules.setdefault(name, stand_in)
    return importlib.import_module(module)


def _git_commit() -> str:
    command = ["git", "-C", os.environ[CHECKOUT], "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits, _ = model(batch["input_ids"])
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _perplexity(model: nn.Module, data: Blocks) -> float:
    with evaluating(model):
        losses = [_loss(model, batch).item() for batch in DataLoader(data, batch_size=32)]
    return math.exp(sum(losses) / len(losses))


def _state_bytes(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Distinct weights, a gradient for each trainable parameter, and all the optimizer keeps."""
    parameters = list(model.parameters())
    stored = {p.data_ptr(): p.nbytes for p in parameters}
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    states = optimizer.state.values() if optimizer else ()
    kept = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum(stored.values()) + gradients + sum(v.nbytes for v in kept)


def main() -> None:
    options = arguments(__doc__, "published.json", folder="checkout of the published code")
    os.environ[CHECKOUT] = str(options.folder.resolve())
    if not (options.folder / "code/dqn_trainer.py").is_file():
        sys.exit(f"{options.folder} is no checkout of the published code: no code/dqn_trainer.py")
    shape = {**SHAPE, "episodes": 5 if options.quick else 120}
    cases = [{"side": side, "seed": seed, **shape} for seed in SEEDS for side in SIDES]
    measure_all(__file__, cases[: len(SIDES) if options.quick else None], options, line, write_page)


def line(row: Case, rows: list[Case]) -> str:
    name = f"{row['side']}, seed {row['seed']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    return (
        f"{name}: test perplexity {row['test_perplexity']:.3f}, claims {row['claimed'][-1]} "
        f"independent layers and holds {row['storages'][-1]}, {row['processor_seconds']:.0f} s"
    )


if __name__ == "__main__":
    run_case_or(main, measure)
