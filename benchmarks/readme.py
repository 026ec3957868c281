"""The parts of the README that are written from results."""

from __future__ import annotations

from pathlib import Path

from layer_tying.files import write_text_whole

README = Path(__file__).resolve().parent.parent / "README.md"


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put a table or the like between two lines of a page."""
    start, end = marks
    before, rest = page.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    write_text_whole(page, f"{before}{start}\n{text}\n\n{end}{after}")
