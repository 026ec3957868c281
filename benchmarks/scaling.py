"""What is sent, how long steps take and what each process holds, replicated and sharded.

    python benchmarks/scaling.py            # on 2 and 4 processes of this machine; resumes
    python benchmarks/scaling.py --parts memory --large   # also one step at 48 x 1600
    python benchmarks/scaling.py --quick    # tiny numbers, into runs/quick

Bytes are those that the loopback interface counted (gloo; none with NCCL), of all processes
together. Steps take turns with those of DistributedDataParallel; ratios are medians over turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from common import (
    QUICK,
    RESULTS,
    Case,
    held_bytes,
    measure_all,
    peak_of_phase,
    run_case_or,
)
from scaling_page import state_bytes, write_page
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from layer_tying.core.averaging import GradientAveraging
from layer_tying.core.patterns import pattern
from layer_tying.core.sharding import shard_tied_layers
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.models.build import build_model, transformers_config
from layer_tying.models.config import ModelConfig
from layer_tying.models.families import TextInput
from layer_tying.runs.memory import return_freed_memory

VOCABULARY, SEQUENCES = 256, 2
SHARDED_TURNS = 5  # at most: such a step takes seconds with gloo
IS_CUDA = torch.cuda.device_count() > 1
Step = Callable[[], None]


def device() -> torch.device:
    return torch.device("cuda", dist.get_rank()) if IS_CUDA else torch.device("cpu")


def made(case: Case) -> PreTrainedModel:
    """A GPT-2 in float32, with equally many neighbours tied in each group."""
    torch.manual_seed(0)
    shape = ModelConfig("gpt2", case["layers"], case["heads"], case["width"])
    config = transformers_config(shape, TextInput(VOCABULARY, case["length"]))
    config.use_cache = False
    return build_model(config, tying_of(case), device=device())


def tying_of(case: Case) -> Tying:
    return pattern("sequence", case["layers"], case["independent"])


def step_of(model: Any, optimizer: Optimizer, length: int, zeroes: bool = True) -> Step:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(VOCABULARY, (SEQUENCES, length), generator=generator).to(device())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if zeroes:
            optimizer.zero_grad()

    return step


def side(case: Case, way: str) -> Step:
    model = made(case)
    if way == "sharded":
        shard_tied_layers(TiedLayers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    wrapped: Any = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    elif way == "ours":
        GradientAveraging(TiedLayers(model, optimizer).stack)
    return step_of(wrapped, optimizer, case["length"])


def measure_steps(case: Case) -> Case:
    """Seconds and bytes of a step, each way; the ways take turns."""
    ways = ("ddp", "ours", "sharded")
    steps = {way: side(case, way) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sent: dict[str, list[int]] = {way: [] for way in ways}
    order = random.Random(0)  # none has its own step before it more often than the others
    for turn in range(case["repeats"] + 1):
        taking_part = ways if turn <= SHARDED_TURNS else ways[:2]
        for way in order.sample(taking_part, len(taking_part)):
            dist.barrier()
            before, began = bytes_sent(), time.perf_counter()
            steps[way]()
            dist.barrier()
            if turn:  # the first warms up
                seconds[way].append(time.perf_counter() - began)
                sent[way].append(bytes_sent() - before)
    return {
        "step_seconds": {way: statistics.median(seconds[way]) for way in ways},
        "of_ddp": {
            way: statistics.median(a / b for a, b in zip(seconds[way], seconds["ddp"]))  # noqa: B905
            for way in ways
        },
        "bytes": None if IS_CUDA else {way: statistics.median(sent[way]) for way in ways},
        **sizes(case),
    }


def bytes_sent() -> int:
    """What the loopback interface has sent so far."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    (loopback,) = [line for line in lines if line.strip().startswith("lo:")]
    return int(loopback.partition(":")[2].split()[8])


def sizes(case: Case) -> Case:
    """Parameters of one layer, and of all that is not in layers."""
    model = made({**case, "independent": 1})
    layer = sum(p.numel() for p in TiedLayers(model).parameters(0).values())
    return {
        "layer_parameters": layer,
        "rest_parameters": sum(p.numel() for p in model.parameters()) - layer,
    }


def measure_memory(case: Case) -> Case:
    """Bytes of the tensors of the fullest process, sharded: as built, held, and in a step."""
    size = sizes(case)
    model = made(case)
    built = live_bytes()
    shard_tied_layers(TiedLayers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    step = step_of(model, optimizer, case["length"], zeroes=False)
    began = time.perf_counter()
    for _ in range(case["repeats"]):
        optimizer.zero_grad()
        step()
    seconds = (time.perf_counter() - began) / case["repeats"]
    here = live_bytes()  # weights, gradients and optimizer state
    optimizer.zero_grad(set_to_none=False)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (here, here + most_above(step)))
    held, peak = (max(each) for each in zip(*found, strict=True))
    share = state_bytes(
        case["independent"],
        size["layer_parameters"],
        size["rest_parameters"],
        dist.get_world_size(),
    )
    return {
        **size,
        "built_bytes": built,
        "held_bytes": held,
        "of_share": held / share,
        "peak_bytes": peak,
        "step_seconds": seconds,
    }


def most_above(step: Step) -> int:
    """By how many bytes this process grows within a step, at most."""
    before = held_bytes()
    step()
    return peak_of_phase() - before


def live_bytes() -> int:
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and not issubclass(type(each), DTensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


PARTS = {"steps": measure_steps, "memory": measure_memory}


def measure(case: Case) -> Case:
    """Measure on as many processes as the case says; what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ.update(address, GLOO_SOCKET_IFNAME="lo", WORLD_SIZE=str(case["processes"]))
    context: Any = torch.multiprocessing.get_context("spawn" if IS_CUDA else "fork")
    found = context.SimpleQueue()
    ranks = [
        context.Process(target=_on_a_rank, args=(rank, case, found))
        for rank in range(case["processes"])
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"a process ended with {[rank.exitcode for rank in ranks]}")
    return {**found.get(), "cores": len(os.sched_getaffinity(0))}


def _on_a_rank(rank: int, case: Case, found: Any) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    return_freed_memory()
    if IS_CUDA:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if IS_CUDA else "gloo")
    result = PARTS[case["part"]](case)
    if rank == 0:
        found.put(result)
    dist.destroy_process_group()


def cases(options: argparse.Namespace) -> list[Case]:
    small = {"layers": 4, "width": 32, "heads": 2, "length": 16, "repeats": 2}
    speed = small if options.quick else {"layers": 12, "width": 256, "heads": 4, "length": 64}
    state = small if options.quick else {"layers": 12, "width": 768, "heads": 12, "length": 16}
    found: list[Case] = []
    for number in options.processes:
        case = {"part": "steps", "processes": number, "repeats": 40, **speed}
        found += [{**case, "independent": m} for m in (speed["layers"], 3, 1)]
        case = {"part": "memory", "processes": number, "repeats": 2, **state}
        found += [{**case, "independent": m} for m in (state["layers"], 3)]
    if options.large:
        large = {"layers": 48, "width": 1600, "heads": 25, "length": 16, "independent": 7}
        found.append({"part": "memory", "processes": 2, "repeats": 1, **large})
    most = torch.cuda.device_count() if IS_CUDA else max(options.processes)
    return [c for c in found if c["part"] in options.parts and c["processes"] <= most]


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, steps and memory on several processes.")
    parser.add_argument("--quick", action="store_true", help="tiny numbers, into runs/quick")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--large", action="store_true", help="also one step at 48 x 1600, sharded")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.output = options.output or (QUICK if options.quick else RESULTS) / "scaling.json"
    measure_all(__file__, cases(options), options, line, write_page)


def line(row: Case, rows: list[Case]) -> str:
    """What is printed of a row."""
    return json.dumps(row)


if __name__ == "__main__":
    run_case_or(main, measure)
