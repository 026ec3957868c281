"""What the benchmarks share: models of the paper's kind, peaks of memory, processes, results."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from layer_tying.core.patterns import pattern
from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import TextInput
from layer_tying.runs.memory import peak_bytes, return_freed_memory
from layer_tying.runs.summary import environment
from layer_tying.tasks.cross_entropy import language_model_loss

Case = dict[str, Any]  # what is measured; with what was measured added, a row of the results
RESULTS = Path(__file__).parent / "results"
QUICK = Path("runs/quick")
VOCABULARY = 50257  # GPT-2's
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("bitsandbytes", "apollo-torch", "peft")  # of others, that are compared with


def gpt2(num_layers: int, width: int, heads: int, length: int, tying: Tying) -> PreTrainedModel:
    """A GPT-2 in bf16 on the device, built already tied."""
    config = transformers_config(
        ModelConfig("gpt2", num_layers, heads, width), TextInput(VOCABULARY, length)
    )
    config.use_cache = False
    return build_model(config, tying, device=DEVICE, dtype=torch.bfloat16)


def batch(length: int, seed: int = 0, sequences: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, [sequences, length] each."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (sequences, length + 1), generator=rng).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def train_step(model: PreTrainedModel, optimizer: Optimizer, length: int, seed: int = 0) -> float:
    """One optimizer step on one sequence; the loss."""
    loss = language_model_loss(model, *batch(length, seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model: nn.Module) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def own_bytes(make_optimizer: Callable[[nn.Module], Optimizer] = adamw) -> int:
    """What the process holds once it has trained a toy: libraries and kernels, but no model."""
    model = gpt2(2, 64, 2, 32, pattern("all", 2))
    train_step(model, make_optimizer(model), 32)
    del model
    return held_bytes()


def peak_of_phase() -> int:
    """The most memory in use since this was last called, and begin anew."""
    peak = peak_bytes(DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # Linux: the high-water mark of the resident set
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak


def held_bytes() -> int:
    """What is in use now, with what was freed handed back; a phase begins here."""
    gc.collect()
    if DEVICE.type == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak_of_phase()
    return peak_of_phase()


def random_tying(num_layers: int, num_independent: int, seed: int) -> Tying:
    """A tying with so many independent layers, drawn uniformly among their places and owners."""
    rng = random.Random(seed)
    owners = [0, *sorted(rng.sample(range(1, num_layers), num_independent - 1))]
    return Tying.from_action(
        [
            layer if layer in owners else rng.choice([o for o in owners if o < layer])
            for layer in range(num_layers)
        ]
    )


def arguments(
    doc: str | None, name: str, folder: str | None = None, **choices: Iterable[str]
) -> argparse.Namespace:
    """The command line of a benchmark.

    Args:
        doc: its docstring.
        name: of the file of its results.
        folder: what the folder holds that has to be named, if one has.
        choices: options that name what to measure, each with all there is; all by default.
    """
    parser = argparse.ArgumentParser(description=(doc or name).splitlines()[0])
    if folder:
        parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("--quick", action="store_true", help="small models, into runs/quick")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/{name}")
    for option, values in choices.items():
        parser.add_argument(f"--{option}", nargs="+", choices=list(values), default=list(values))
    options = parser.parse_args()
    options.output = options.output or (QUICK if options.quick else RESULTS) / name
    return options


def measure_all(
    script: str,
    cases: Iterable[Case],
    options: argparse.Namespace,
    line: Callable[[Case, list[Case]], str],
    write_page: Callable[[Path], Path],
) -> None:
    """Measure each case in a process of its own; write the results after each, the page at the end.

    A case that was measured before, in the same environment, is left alone, so what was stopped
    goes on; one that failed is tried again.
    """
    rows = rows_so_far(options.output)
    for case in cases:
        known = [row for row in rows if case.items() <= row.items()]
        if not known or options.again or "error" in known[0]:
            rows = [row for row in rows if row not in known]
            rows.append(in_a_process(script, case))
            write_results(options.output, rows)
            print(line(rows[-1], rows), flush=True)
    print(f"{options.output}, {write_page(options.output.parent)}")


def rows_so_far(path: Path) -> list[Case]:
    """The rows of a file of results, if there is one."""
    if not path.exists():
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("environment") != full_environment():
        sys.exit(f"{path} was measured with other versions or hardware: move it away first")
    return results["rows"]


def name_of(row: Case, setting: str) -> str:
    """What a line about a row begins with."""
    checkpointing = ", checkpointing" if row["checkpointing"] else ""
    return f"{row['independent']:>3} of {row['layers']}{setting}{checkpointing}"


def in_a_process(script: str, case: Case) -> Case:
    """Run ``script --case CASE`` in a process of its own: the case, with what was measured.

    A side that runs out of memory is a result too: it has the entry ``error``.
    """
    command = [sys.executable, script, "--case", json.dumps(case)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode < 0:
        return {**case, "error": f"killed by {signal.Signals(-ended.returncode).name}"}
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return {**case, "error": lines[-1]}
    return {**case, **json.loads(ended.stdout.splitlines()[-1])}


def write_results(path: Path, rows: list[Case]) -> None:
    """Write what has been measured so far, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "environment": full_environment(),
        "rows": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def full_environment() -> dict[str, Any]:
    """The versions, those of what it is compared with among them, and the hardware."""
    found = environment(DEVICE)
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {**found, "versions": found["versions"] | versions}


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def with_several_rates(rows: Iterable[Case], *names: str) -> list[tuple[Any, ...]]:
    """The values of these entries for which rows have more than one learning rate."""
    rates: dict[tuple[Any, ...], set[float]] = {}
    for row in rows:
        rates.setdefault(tuple(row[name] for name in names), set()).add(row["lr"])
    return [values for values, tried in rates.items() if len(tried) > 1]


def run_case_or(main: Callable[[], None], measure: Callable[[Case], Case]) -> None:
    """The entry point of a benchmark: of the whole, or of one side in its own process."""
    if len(sys.argv) == 3 and sys.argv[1] == "--case":
        return_freed_memory()  # as the command does
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
