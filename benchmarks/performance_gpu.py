"""The part of docs/performance.md that was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from performance_speed import speed_tables
from performance_tables import Row, memory_tables

from layer_tying.report.markdown import markdown_table


def gpu_tables(rows: Sequence[Row]) -> list[str]:
    """Numerics against the CPU, memory, speed, and the pair of training runs."""
    done = {name: [r for r in rows if r["measure"] == name] for name in ("memory", "speed")}
    return [
        *_numerics([r for r in rows if r["measure"] == "numerics" and "error" not in r]),
        *memory_tables(done["memory"]),
        *speed_tables(done["speed"]),
        *_training([r for r in rows if r["measure"] == "training" and r.get("curve")]),
    ]


def _numerics(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    heads = ("gradient mode", "largest difference of a loss", "of a weight, relative")
    lines = [
        [
            r["gradient"],
            f"{r['largest_loss_difference']:.1e}",
            f"{r['relative_weight_difference']:.1e}",
        ]
        for r in rows
    ]
    return [
        "20 steps with 5 transitions in float32, against the same on the CPU:",
        markdown_table(heads, lines),
    ]


def _training(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    config = rows[0]["config"]
    checkpointing = "with" if config["checkpointing"] else "without"
    about = (
        f"The first steps of training on WikiText-2, of {config['batch_size']} x {config['bptt']} "
        f"tokens, {checkpointing} gradient checkpointing. So few steps show "
        f"what a step costs, but nothing about quality."
    )
    heads = ("policy", "steps", "s/step", "validation perplexity", "independent", "peak, MB")
    table = markdown_table(
        heads,
        [
            [
                *(r["config"]["policy"], f"{r['steps']:,}", f"{r['step_seconds']:.3f}"),
                *(f"{r['curve'][-1]['perplexity']:.2f}", f"{r['curve'][-1]['independent_layers']}"),
                f"{r['peak_bytes'] / 1e6:,.0f}",
            ]
            for r in rows
        ],
    )
    return [about, table]
