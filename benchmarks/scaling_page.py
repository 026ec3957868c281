"""Writes docs/scaling.md and its picture from what scaling.py measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from layer_tying.report.markdown import markdown_table
from layer_tying.report.style import CONVENTIONAL, OTHERS, STYLE

BENCHMARKS = Path(__file__).resolve().parent
Row = dict[str, Any]
SHAPE = {"layers": 48, "layer": 12 * 1600**2 + 13 * 1600, "rest": 50257 * 1600 + 1026 * 1600}
DEVICES = (1, 2, 4, 8, 16, 64, 256, 1024)
LINKS = {"1 Gbit/s": 1.25e8, "10 Gbit/s": 1.25e9, "100 Gbit/s": 1.25e10, "NVLink, 450 GB/s": 4.5e11}
SPEED = 2e14  # floating-point operations per second of one device, in the table of overlap
MOST_OF_DDP, MOST_OFF = 1.05, 0.05  # the aims


def replicated_bytes(independent: float, layer: int, rest: int, devices: int) -> float:
    """Bytes that all devices send in a step: a ring's all-reduce of float32 gradients."""
    return 2 * (devices - 1) * 4 * (independent * layer + rest)


def sharded_bytes(layers: int, layer: int, rest: int, devices: int) -> float:
    """Bytes that all send: each use of a layer gathers twice, and adds up gradients once."""
    return 3 * (devices - 1) * 4 * (layers * layer + rest)


def state_bytes(independent: float, layer: int, rest: int, parts: int = 1) -> float:
    """Weights, gradients and AdamW's state in float32, on a device that holds one of the parts."""
    return 16 * (independent * layer + rest) / parts


def write_page(folder: Path = BENCHMARKS / "results") -> Path:
    """The page of a folder of results: in docs/ for the committed ones, else next to them."""
    is_committed = folder.resolve() == BENCHMARKS / "results"
    place = BENCHMARKS.parent / "docs" if is_committed else folder
    results = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
    (place / "images").mkdir(exist_ok=True)
    drawn().savefig(place / "images" / "scaling.png", dpi=160)
    page = place / "scaling.md"
    page.write_text(scaling_page(results), encoding="utf-8")
    return page


def scaling_page(results: dict[str, Any]) -> str:
    """Markdown of what was measured, and of what follows from it on paper."""
    rows = [row for row in results["rows"] if "error" not in row]
    steps = [row for row in rows if row["part"] == "steps"]
    memory = [row for row in rows if row["part"] == "memory"]
    parts = [
        "# Scaling",
        *_verdicts(steps, memory),
        _introduction(results["environment"]),
        "## Steps and bytes, measured",
        STEPS,
        _step_table(steps),
        "## Memory of a process, measured",
        MEMORY,
        _memory_table(memory),
        *_beyond(),
    ]
    return "\n\n".join(parts) + "\n"


def _verdicts(steps: Sequence[Row], memory: Sequence[Row]) -> list[str]:
    """What missed its aim, and what was not measured, before all else."""
    missed = [
        f"- {_where(row)}: a step takes {row['of_ddp']['ours']:.2f} of "
        f"`DistributedDataParallel`'s; the aim is at most {MOST_OF_DDP}."
        for row in steps
        if row["of_ddp"]["ours"] > MOST_OF_DDP
    ]
    missed += [
        f"- {_where(row)}: a process holds {row['of_share']:.3f} of its share; the aim is within "
        f"{100 * MOST_OFF:.0f} %."
        for row in memory
        if abs(row["of_share"] - 1) > MOST_OFF
    ]
    missed += [
        f"- {_where(row)}: before it is sharded, each process builds the whole model, which takes "
        f"{row['built_bytes'] / 1e6:,.0f} MB where it trains with {row['held_bytes'] / 1e6:,.0f}."
        for row in memory
        if row["built_bytes"] > row["held_bytes"]
    ]
    if not any(row["layers"] == 48 for row in memory):
        missed.append("- The memory of a step at 48 x 1600 was not measured.")
    missed.append("- Sharded steps send more than the model says, with gloo; see below.")
    missed.append("- Nothing was measured on several GPUs, or over a link between machines.")
    return ["What missed its aim, or was not measured:", "\n".join(missed)]


def _introduction(environment: dict[str, Any]) -> str:
    versions, hardware = environment["versions"], environment["hardware"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Written by `make bench-scaling` from `benchmarks/results/scaling.json`: processes of one "
        f"machine that talk by gloo over the loopback interface; {hardware['processor']} "
        f"({hardware['device']}); {libraries}."
    )


STEPS = (
    "GPT-2 in float32, 2 x 64 tokens a process. *Of DDP* is the median ratio of the time of a step "
    "to that of `DistributedDataParallel` on a model with the same, fixed tying; the two take "
    "turns. "
    "*MB* are what all processes sent in a step, and *model* is what the model below says. The "
    "processes share the cores that the table names, so seconds say little; ratios "
    "say more. Sharded steps send more here than the model says because gloo adds up gradients on "
    "all processes where each needs its rows only."
)
MEMORY = (
    "The bytes of all tensors that the fullest process holds when the optimizer has stepped: its "
    "rows of weights, gradients and AdamW's state. *Of its share* is against (independent layers + "
    "rest) / processes. *Peak* is the most that is taken within a step of 2 x 16 tokens, as the "
    "growth of the process says: gathered weights, whole gradients, activations and the buffers of "
    "gloo in addition. *As built* are the weights before they are sharded. The seconds were taken "
    "while other work ran, unlike the steps above."
)


def _where(row: Row) -> str:
    return (
        f"{row['layers']} x {row['width']}, {row['independent']} independent, "
        f"{row['processes']} processes"
    )


def _step_table(rows: Sequence[Row]) -> str:
    heads = (
        "",
        "cores",
        "s, DDP",
        "of DDP",
        "sharded",
        "MB, DDP",
        "ours",
        "model",
        "sharded",
        "model",
    )
    lines = []
    for row in rows:
        size = (row["layer_parameters"], row["rest_parameters"], row["processes"])
        sent = row["bytes"]
        numbers = (
            [
                sent["ddp"],
                sent["ours"],
                replicated_bytes(row["independent"], *size),
                sent["sharded"],
                sharded_bytes(row["layers"], *size),
            ]
            if sent
            else []
        )
        cells = [f"{number / 1e6:,.1f}" for number in numbers] or ["-"] * 5
        ratios = [f"{row['of_ddp'][way]:.2f}" for way in ("ours", "sharded")]
        seconds = f"{row['step_seconds']['ddp']:.2f}"
        lines.append((_where(row), str(row["cores"]), seconds, *ratios, *cells))
    return markdown_table(heads, lines)


def _memory_table(rows: Sequence[Row]) -> str:
    heads = ("", "MB held", "share", "of its share", "MB peak", "MB as built", "s a step")
    lines = []
    for row in rows:
        held, built = row["held_bytes"] / 1e6, row["built_bytes"] / 1e6
        share, seconds = held / row["of_share"], row["step_seconds"]
        peak = row["peak_bytes"] / 1e6
        cells = [f"{held:,.1f}", f"{share:,.1f}", f"{row['of_share']:.3f}"]
        cells += [f"{peak:,.1f}", f"{built:,.1f}", f"{seconds:.1f}"]
        lines.append((_where(row), *cells))
    return markdown_table(heads, lines)


def _beyond() -> list[str]:
    """The model of bytes and memory, and what it says of more devices."""
    return [
        "## The model, on paper",
        "With L layers of l parameters each, M of them independent, R parameters elsewhere, N "
        "devices and float32 weights:",
        "- replicated, a device sends 2 (N - 1) / N x 4 (M l + R) bytes in a step and holds "
        "16 (M l + R) bytes of weights, gradients and AdamW's state; on CPUs 4 (M l + R) more, in "
        "which gradients are sent, as `DistributedDataParallel` does everywhere;\n"
        "- sharded, it sends about 3 (N - 1) / N x 4 (L l + R) bytes, whatever M is (a little "
        "less: biases and embeddings are not gathered again), and holds 16 (M l + R) / N, with the "
        "gathered weights of the running layer in addition.",
        "What follows was computed and not measured, for 48 layers x 1600 with a vocabulary of "
        "50,257.",
        "![Memory and bytes of a device, by the number of devices](images/scaling.png)",
        _devices_table(),
        "Averaging goes on while backward does, and is hidden as long as a device's backward pass, "
        f"4 (L l + R) operations a token, takes longer. The table shows the "
        f"smallest number of tokens per device for which this holds at {SPEED:.0e} operations per "
        "second (many devices, replicated):",
        _overlap_table(),
        "So what tying saves on a slow link is the factor (L l + R) / (M l + R), as long as the "
        "link is what a step waits for; sharding saves memory and no traffic.",
    ]


def _devices_table() -> str:
    heads = (
        "devices",
        *(f"GB held, {m}" for m in (48, 7, 1)),
        *(f"sharded, {m}" for m in (48, 7, 1)),
    )
    lines = []
    for number in DEVICES:
        held = [_state(m, parts) / 1e9 for parts in (1, number) for m in (48, 7, 1)]
        lines.append((f"{number:,}", *(f"{each:,.3f}" for each in held)))
    return markdown_table(heads, lines)


def _state(independent: int, parts: int) -> float:
    return state_bytes(independent, SHAPE["layer"], SHAPE["rest"], parts)


def tokens_to_hide(independent: int, bytes_per_second: float) -> float:
    """Tokens a device from which averaging takes no longer than its backward pass, N large."""
    sent = 2 * 4 * (independent * SHAPE["layer"] + SHAPE["rest"])
    a_token = 4 * (SHAPE["layers"] * SHAPE["layer"] + SHAPE["rest"]) / SPEED
    return sent / bytes_per_second / a_token


def _overlap_table() -> str:
    heads = ("link of a device", *(f"{m} independent" for m in (48, 7, 1)))
    lines = [
        (name, *(f"{tokens_to_hide(m, speed):,.0f}" for m in (48, 7, 1)))
        for name, speed in LINKS.items()
    ]
    return markdown_table(heads, lines)


def drawn() -> Figure:
    """Memory held and bytes sent by a device, over the number of devices; computed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.8))
        memory, traffic = figure.subplots(1, 2)
        colours = (CONVENTIONAL, *OTHERS)
        for colour, m in zip(colours, (48, 7, 1), strict=False):
            held = [_state(m, 1) / 1e9] * len(DEVICES)
            memory.plot(DEVICES, held, color=colour, label=f"replicated, {m} independent")
            held = [_state(m, number) / 1e9 for number in DEVICES]
            memory.plot(DEVICES, held, "--", color=colour, label=f"sharded, {m} independent")
            size = (m, SHAPE["layer"], SHAPE["rest"])
            sent = [replicated_bytes(*size, n) / n / 1e9 for n in DEVICES[1:]]
            traffic.plot(DEVICES[1:], sent, color=colour)
        size = (SHAPE["layers"], SHAPE["layer"], SHAPE["rest"])
        sent = [sharded_bytes(*size, n) / n / 1e9 for n in DEVICES[1:]]
        traffic.plot(DEVICES[1:], sent, "--", color=colours[0])
        sent_by = "GB sent by it in a step (sharded: the same for all)"
        for axes, name in ((memory, "GB held by a device"), (traffic, sent_by)):
            axes.set(xscale="log", yscale="log", xlabel="devices", title=name)
        figure.set_layout_engine("constrained")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.canvas.draw()
    return figure


if __name__ == "__main__":
    print(write_page(*map(Path, sys.argv[1:])))
