"""The tables and targets of docs/performance.md: rows of results in, Markdown out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from layer_tying.paper.published import GPT2_WIKITEXT2
from layer_tying.report.markdown import markdown_table

Row = dict[str, Any]


class Target(NamedTuple):
    """What was aimed at, what was measured, and whether that meets it."""

    name: str
    limit: str
    measured: str
    is_met: bool


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f}"


def shape(row: Row) -> str:
    return f"{row['layers']} x {row['width']}"


# Memory


def setting(row: Row) -> str:
    checkpointing = "with" if row["checkpointing"] else "without"
    return f"{shape(row)}, 1 x {row['length']:,} tokens, {checkpointing} gradient checkpointing"


def conventional_side(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that a tied one is compared with, if both came to an end."""
    same = [other for other in rows if setting(other) == setting(row)]
    found = [other for other in same if other["independent"] == row["layers"]]
    return found[0] if found and "error" not in row and "error" not in found[0] else None


def ratio_and_bound(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """How many times less memory than conventionally: measured, and of the model state alone."""
    whole = conventional_side(row, rows)
    if whole is None:
        return None
    return (
        whole["above_own_bytes"] / row["above_own_bytes"],
        whole["model_state_bytes"] / row["model_state_bytes"],
    )


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each setting: fewer tokens first, checkpointing first, most layers first."""
    ordered = sorted(
        rows, key=lambda r: (r["length"], not r["checkpointing"], -r["independent"], r["layers"])
    )
    return {name: [r for r in ordered if setting(r) == name] for name in map(setting, ordered)}


MEMORY_HEADS = (
    *("independent", "peak, MB", "above baseline", "ratio", "bound", "of bound"),
    *("parameters", "gradients", "optimizer state", "the rest", "by transitions", "built in"),
)


def memory_tables(rows: Sequence[Row]) -> list[str]:
    """A table a setting."""
    parts = []
    for name, group in by_setting(rows).items():
        parts += [
            f"**{name}**",
            markdown_table(MEMORY_HEADS, [_memory_line(r, rows) for r in group]),
        ]
    return parts


def _memory_line(row: Row, rows: Sequence[Row]) -> list[str]:
    is_conventional = row["independent"] == row["layers"]
    name = f"{row['independent']}, conventional" if is_conventional else f"{row['independent']}"
    if "error" in row:
        return [name, row["error"], *["-"] * (len(MEMORY_HEADS) - 2)]
    ratios = ["-"] * 3
    if found := ratio_and_bound(row, rows):
        ratio, bound = found
        ratios = [f"{ratio:.2f}x", f"{bound:.2f}x", f"{ratio / bound:.0%}"]
    sizes = ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes")
    return [
        *(name, megabytes(row["peak_bytes"]), megabytes(row["above_own_bytes"]), *ratios),
        *(megabytes(row[size]) for size in sizes),
        megabytes(row["above_own_bytes"] - row["model_state_bytes"]),
        "-" if is_conventional else f"+{megabytes(row['raised_by_transitions_bytes'])}",
        f"{row['build_seconds']:.1f} s",
    ]


def with_the_paper(rows: Sequence[Row]) -> str:
    """The paper's peaks, and ours at 7 independent layers."""
    whole, tied = (row["peak_memory_bytes"] / 1e6 for row in GPT2_WIKITEXT2.values())
    lines = [["the paper, as published", f"{whole:,.2f}", f"{tied:,.2f}", f"{whole / tied:.2f}x"]]
    for row in (r for group in by_setting(rows).values() for r in group):
        if row["independent"] == 7 and (other := conventional_side(row, rows)):
            peaks = other["peak_bytes"], row["peak_bytes"]
            cells = [f"{megabytes(p)}" for p in peaks]
            lines.append([f"here, {setting(row)}", *cells, f"{peaks[0] / peaks[1]:.2f}x"])
    return markdown_table(("whole peak, MB", "conventional", "tied", "ratio"), lines)


def memory_targets(rows: Sequence[Row]) -> list[Target]:
    """Those of memory: of each tied side that was measured with checkpointing."""
    tied = [r for r in rows if r["checkpointing"] and conventional_side(r, rows)]
    tied = [
        r for group in by_setting(tied).values() for r in group if r["independent"] < r["layers"]
    ]
    targets = []
    for row in tied:
        ratio, bound = ratio_and_bound(row, rows) or (0.0, 1.0)
        place = f"1 x {row['length']:,}, {row['independent']} independent"
        if row["independent"] == 7:
            name = f"times less memory above the baseline, {place}"
            targets.append(Target(name, ">= 4.5", f"{ratio:.2f}", ratio >= 4.5))
        share = ratio / bound
        name = f"share of the bound, {place}"
        targets.append(Target(name, ">= 80%", f"{share:.0%}", share >= 0.8))
    moved = [r for r in rows if r.get("raised_by_transitions_bytes")]
    if tied:
        most = max(moved or tied, key=lambda r: r["raised_by_transitions_bytes"])
        raised, block = most["raised_by_transitions_bytes"], most["block_state_bytes"]
        limit = f"<= {megabytes(block)} MB"
        name = "peak raised by transitions, at most (limit: a block's state)"
        targets.append(Target(name, limit, f"{megabytes(raised)} MB", raised <= block))
    return targets


# Other methods


def alternatives_table(rows: Sequence[Row]) -> str:
    """Each method against plain AdamW without checkpointing, the first row."""
    first = next((r for r in rows if "error" not in r and not r["checkpointing"]), None)
    heads = (
        *("method", "independent", "above baseline, MB", "less memory", "s/step", "of the time"),
        *("trained, M", "optimizer state, MB"),
    )
    return markdown_table(heads, [_alternatives_line(row, first) for row in rows])


def _alternatives_line(row: Row, first: Row | None) -> list[str]:
    name = row["optimizer"] + (", checkpointing" if row["checkpointing"] else "")
    if row["independent"] < row["layers"]:
        name = f"tied, {name}"
    head = [name, f"{row['independent']} of {row['layers']}"]
    if "error" in row or first is None:
        return [*head, row.get("error", "-"), *["-"] * 5]
    return [
        *head,
        megabytes(row["above_own_bytes"]),
        f"{first['above_own_bytes'] / row['above_own_bytes']:.2f}x",
        f"{row['step_seconds']:.2f}",
        f"{row['step_seconds'] / first['step_seconds']:.2f}",
        f"{row['trained_parameters'] / 1e6:,.1f}",
        megabytes(row["optimizer_state_bytes"]),
    ]


def exports_table(rows: Sequence[Row]) -> str:
    """Size and perplexity of exports, and how they compare with float32."""
    whole = {row["run"]: row for row in rows if row["dtype"] == "fp32"}
    heads = ("run", "weights", "bytes", "of fp32", "perplexity", "of fp32")
    lines = []
    for row in rows:
        of_size, of_quality = (row[key] / whole[row["run"]][key] for key in ("bytes", "perplexity"))
        cells = (f"{row['bytes']:,}", f"{of_size:.2f}")
        quality = (f"{row['perplexity']:.3f}", f"{of_quality:.4f}")
        lines.append((f"`{row['run']}`", row["dtype"], *cells, *quality))
    return markdown_table(heads, lines)
