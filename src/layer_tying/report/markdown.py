"""The one Markdown table, of the command's comparison and of the pages of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown: the first column to the left, all others, which hold numbers, right."""
    # As a row among others, the heads get no padding of their own, which costs a terminal columns.
    rule, *lines = tabulate(
        [[_escaped(cell) for cell in row] for row in (heads, *rows)],
        tablefmt="pipe",
        colalign=("left", *["right"] * (len(heads) - 1)),
        disable_numparse=True,  # cells are written already
    ).splitlines()
    return "\n".join([lines[0], rule, *lines[1:]])


def _escaped(cell: str) -> str:
    """A bar in a cell would end it."""
    return cell.replace("|", "\\|")
