"""The tables and targets of docs/performance.md that are about speed."""

from __future__ import annotations

from collections.abc import Sequence

from performance_tables import Row, Target, megabytes, shape

from layer_tying.report.markdown import markdown_table

PARTS = ("forward", "backward", "optimizer", "step")


def of_part(rows: Sequence[Row], part: str) -> list[Row]:
    """The rows of a part that came to an end, larger models first."""
    done = [row for row in rows if row["part"] == part and "error" not in row]
    return sorted(done, key=lambda row: -row["layers"] * row["width"])


def side(row: Row) -> str:
    return f"{shape(row)}, {row['independent']} independent"


def speed_tables(rows: Sequence[Row]) -> list[str]:
    """A titled table a part."""
    tables = {
        "Steps": _steps(of_part(rows, "steps")),
        "Learned mixtures": _mixtures(of_part(rows, "mixture")),
        "Decisions of the agent": _decisions(of_part(rows, "decision")),
        "Compiled layers": _compiled(of_part(rows, "compile")),
        "Generating": _generating(of_part(rows, "generate")),
        "Loading": _loading(of_part(rows, "load")),
    }
    found = [(title, text) for title, text in tables.items() if text.count("\n") > 1]
    failed = [f"- {side(r)}, `{r['part']}`: {r['error']}" for r in rows if "error" in r]
    parts = [part for title, text in found for part in (f"### {title}", text)]
    return [*parts, *(["### Could not be measured", "\n".join(failed)] if failed else [])]


def _steps(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for name, seconds in row["seconds"].items():
            shares = row["of_conventional"].get(name, {})
            cells = [
                f"{seconds[part]:.3f}" + (f" ({shares[part]:.2f})" if shares else "")
                for part in PARTS
            ]
            label = shape(row) if name == "conventional" else side(row)
            lines.append([f"{label}, {name}", *cells])
    return markdown_table(("seconds (of conventional)", *PARTS), lines)


def _mixtures(rows: Sequence[Row]) -> str:
    heads = ("model", "tokens", "checkpointing", "tied, s/step", "mixed, s/step", "of tied")
    return markdown_table(
        (*heads, "peak, MB more"),
        [
            [
                side(row),
                f"{row['sequences']} x {row['length']:,}",
                "yes" if row["checkpointing"] else "no",
                f"{row['seconds']['tied']['step']:.3f}",
                f"{row['seconds']['mixed']['step']:.3f}",
                f"{row['mixed_of_tied']['step']:.2f}",
                f"{(row['peaks']['mixed'] - row['peaks']['tied']) / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )


def _decisions(rows: Sequence[Row]) -> str:
    heads = ("model", "step, s", "decision, s", "decision, in steps", "share at every = 50")
    return markdown_table(
        heads,
        [
            [
                side(row),
                f"{row['step_seconds']:.3f}",
                f"{row['decision_seconds']:.3f}",
                f"{row['decision_in_steps']:.2f}",
                f"{row['share_at_every_50']:.1%}",
            ]
            for row in rows
        ],
    )


def _family(row: Row) -> str:
    return f"{row['family']}, {side(row)}"


def _compiled(rows: Sequence[Row]) -> str:
    heads = (
        *("model", "eager, s/step", "compiled, s/step", "of eager", "graphs"),
        *("made by transitions", "first two steps, s"),
    )
    return markdown_table(
        heads,
        [
            [
                _family(row),
                f"{row['seconds']['eager']:.3f}",
                f"{row['seconds']['compiled']:.3f}",
                f"{row['compiled_of_eager']:.2f}",
                str(row["graphs"]),
                f"{row['graphs_made_by_transitions']} in {row['transitions']}",
                f"{row['first_steps_seconds']:.1f}",
            ]
            for row in rows
        ],
    )


def _generating(rows: Sequence[Row]) -> str:
    heads = ("model", "compact, tokens/s", "expanded, tokens/s", "compact / expanded")
    return markdown_table(
        heads,
        [
            [
                side(row),
                *(f"{row['tokens_per_second'][form]:.2f}" for form in ("compact", "expanded")),
                f"{row['compact_of_expanded']:.2f}",
            ]
            for row in rows
        ],
    )


def _loading(rows: Sequence[Row]) -> str:
    heads = ("model", "file, MB", "loading, s", "peak above baseline, MB")
    return markdown_table(
        heads,
        [
            [
                f"{side(row)}, {row['format']}",
                megabytes(row["file_bytes"]),
                f"{row['load_seconds']:.2f}",
                megabytes(row["above_own_bytes"]),
            ]
            for row in rows
        ],
    )


def speed_targets(rows: Sequence[Row]) -> list[Target]:
    """Each target, for each model that was measured."""
    targets = []
    for row in of_part(rows, "steps"):
        for mode, limit in (("sum", 1.0), ("owner", 0.8)):
            share = row["of_conventional"][mode]["step"]
            name = f"step of conventional, `{mode}`, {side(row)}"
            targets.append(Target(name, f"<= {limit:.2f}", f"{share:.2f}", share <= limit))
    for row in of_part(rows, "mixture"):
        share = row["mixed_of_tied"]["step"]
        tokens = f"{row['sequences']} x {row['length']:,} tokens"
        name = f"step with mixtures of tied, {side(row)}, {tokens}"
        if row["checkpointing"]:
            name += ", checkpointed"
        targets.append(Target(name, "<= 1.10", f"{share:.2f}", share <= 1.1))
    for row in of_part(rows, "decision"):
        steps, share = row["decision_in_steps"], row["share_at_every_50"]
        targets += [
            Target(f"a decision, in steps, {side(row)}", "<= 1", f"{steps:.2f}", steps <= 1),
            Target(f"the agent at every = 50, {side(row)}", "<= 2%", f"{share:.1%}", share <= 0.02),
        ]
    for row in of_part(rows, "compile"):
        made, share = row["graphs_made_by_transitions"], row["compiled_of_eager"]
        name = f"graphs made by {row['transitions']} transitions, {_family(row)}"
        targets += [
            Target(name, "0", str(made), made == 0),
            Target(f"compiled step of eager, {_family(row)}", "< 1", f"{share:.2f}", share < 1),
        ]
    return targets
