"""Writes docs/performance.md and its picture from what the benchmarks measured.

Every benchmark does this when it ends; this script does it again.

    python benchmarks/performance_page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performance_gpu import gpu_tables
from performance_pictures import draw_memory
from performance_speed import speed_tables, speed_targets
from performance_tables import (
    Row,
    Target,
    alternatives_table,
    exports_table,
    memory_tables,
    memory_targets,
    with_the_paper,
)

from layer_tying.report.markdown import markdown_table

BENCHMARKS = Path(__file__).resolve().parent
FILES = ("memory", "speed", "alternatives", "exports", "gpu")
COMMANDS = {name: f"make bench-{name}" for name in FILES} | {
    "gpu": "benchmarks/gpu.sh",
    "exports": "python benchmarks/exports.py RUN ...",
}
Results = dict[str, dict[str, Any]]


def write_page(folder: Path = BENCHMARKS / "results") -> Path:
    """The page of a folder of results: in docs/ for the committed ones, else next to them."""
    is_committed = folder.resolve() == BENCHMARKS / "results"
    place = BENCHMARKS.parent / "docs" if is_committed else folder
    files = {name: folder / f"{name}.json" for name in FILES}
    results = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }
    page = place / "performance.md"
    page.write_text(performance_page(results), encoding="utf-8")
    if "memory" in results:
        (place / "images").mkdir(exist_ok=True)
        draw_memory(results["memory"]["rows"]).savefig(place / "images" / "memory.png", dpi=160)
    return page


def performance_page(results: Results) -> str:
    """Markdown of all that has been measured."""
    parts = ["# Performance", *_introduction(results)]
    rows = {name: result["rows"] for name, result in results.items()}
    targets = [*memory_targets(rows.get("memory", [])), *speed_targets(rows.get("speed", []))]
    if "gpu" in rows:
        targets += _targets_of_gpu(rows["gpu"], results["gpu"]["environment"])
    if targets:
        parts += [
            "## Targets",
            markdown_table(
                ("target", "limit", "measured", "met"),
                map(_line, sorted(targets, key=lambda target: target.is_met)),
            ),
        ]
    if "memory" in rows:
        parts += ["## Memory", *_memory(rows["memory"])]
    if "alternatives" in rows:
        parts += [
            "## Compared with other ways to save memory",
            *_alternatives(rows["alternatives"]),
        ]
    if "speed" in rows:
        parts += ["## Speed", SPEED, *speed_tables(rows["speed"])]
    if "exports" in rows:
        parts += ["## Size and quality of exports", EXPORTS, exports_table(rows["exports"])]
    if "gpu" in rows:
        parts += ["## On a GPU", *gpu_tables(rows["gpu"])]
    return "\n\n".join(parts) + "\n"


def _targets_of_gpu(rows: Sequence[Row], environment: dict[str, Any]) -> list[Target]:
    """The same targets, of what was measured on a GPU, with its name."""
    found = [
        *memory_targets([row for row in rows if row["measure"] == "memory"]),
        *speed_targets([row for row in rows if row["measure"] == "speed"]),
    ]
    device = environment["hardware"]["device"]
    return [target._replace(name=f"{target.name}, {device}") for target in found]


def _line(target: Target) -> tuple[str, ...]:
    return target.name, target.limit, target.measured, "**yes**" if target.is_met else "no"


def _introduction(results: Results) -> list[str]:
    if not results:
        return ["Nothing has been measured yet: `make bench-memory`."]
    lines = [
        f"- `{COMMANDS[name]}`: {_machine(result['environment'])}"
        for name, result in results.items()
    ]
    return [
        "What tying saves in memory and costs or gains in time, by the size of model that the "
        "paper trains: GPT-2, 48 layers x 1600, 25 heads, a vocabulary of 50,257. Where nothing "
        "else is said, weights and optimizer state are in bf16, the optimizer is fused AdamW, and "
        "a step has one sequence. The targets are this project's own. Written by the benchmarks "
        "from `benchmarks/results/*.json`:",
        "\n".join(lines),
    ]


def _machine(environment: dict[str, Any]) -> str:
    versions, hardware = environment["versions"], environment["hardware"]
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{hardware['processor']} ({hardware['device']}, {threads}); {libraries}"


def _memory(rows: Sequence[Row]) -> list[str]:
    return [
        "*Peak* is the largest resident set of a process that builds the model and trains it; a "
        "tied one also goes through ten transitions. *Above baseline* is the peak minus the memory "
        "of a process that has trained a tiny model: libraries and kernels. *Bound* is the ratio "
        "of the model states (parameters, gradients and optimizer state); activations keep a run "
        "from reaching it. *The rest* is the peak above the baseline minus the model state: "
        "activations, temporaries, the allocator. It can be small, since not all of the state "
        "need exist at the peak. MB are 10^6 bytes.",
        "![Peak memory above the baseline, by component](images/memory.png)",
        *memory_tables(rows),
        "The peaks that the paper gives for 48 layers x 1600, and ours. The runs may differ in "
        "batch and precision, so compare the ratios; ours are of whole peaks here, with the "
        "baseline included:",
        with_the_paper(rows),
    ]


def _alternatives(rows: Sequence[Row]) -> list[str]:
    return [
        "The same model and step, 1 x 256 tokens, with other common methods, one process "
        "each. *Less memory* and *of the time* are against AdamW without checkpointing. Tying and "
        "LoRA train fewer parameters, the others all of them; quality is not "
        "measured here. LoRA starts from a pretrained model, which the others do not need.",
        alternatives_table(rows),
    ]


SPEED = (
    "Sides that are compared take turns in one process; the fastest of their repeats counts (of "
    "decisions the median). `sum` is true tying; in mode `owner` a shared weight learns from its "
    "owner's position alone. A decision is the agent's choice, the transition, the evaluation and "
    "the update of its network. Layers are compiled one by one, in the command's own setting: "
    "8 x 128 tokens, float32 weights, products in bf16. Generating: a prompt of 16 tokens, 32 new "
    "ones, greedy, batch 1, with a KV cache."
)

EXPORTS = (
    "Compact exports of two runs of the [results](results.md) and of a model that was "
    "[compressed](compress.md) to mixtures of four layers, by the type of the stored weights, and "
    "the test perplexity of what is loaded from them, computed in float32. With `int8`, "
    "matrices are stored as 8-bit integers and a scale for each row. They are loaded in float32 on "
    "every device, so that a GPU computes with the same weights as a CPU; no arithmetic is done in "
    "8 bits."
)


if __name__ == "__main__":
    print(write_page(*map(Path, sys.argv[1:])))
