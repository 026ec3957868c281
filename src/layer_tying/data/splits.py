"""Texts in three disjoint splits, and how one text is cut into them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    """A corpus before tokenisation: three disjoint texts.

    Attributes:
        name: of the data set.
        train, validation, test: the texts.
        sha256: over the three of them.
        source: in one line, where they come from and how they were split.
        words: whether the set is published split into words, so that perplexity per word makes
            sense.
    """

    name: str
    train: str
    validation: str
    test: str
    sha256: str
    source: str
    words: bool


def texts_of(name: str, splits: Iterable[str], source: str, words: bool = False) -> Texts:
    """Texts that come in three splits: train, validation and test."""
    train, validation, test = splits
    digest = hashlib.sha256()
    for split in (train, validation, test):
        data = split.encode()
        digest.update(f"{len(data)}\n".encode())
        digest.update(data)
    return Texts(name, train, validation, test, digest.hexdigest(), source, words)


def cut_text(name: str, text: str, source: str, words: bool = False) -> Texts:
    """One text, cut 90/5/5 in order."""
    first, second = (_line_end(text, len(text) * share // 100) for share in (90, 95))
    splits = (text[:first], text[first:second], text[second:])
    return texts_of(name, splits, f"{source}, cut 90/5/5 in order", words)


def cut_list(items: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Distinct items, cut 90/5/5 in order."""
    items = list(dict.fromkeys(items))
    first, second = len(items) * 90 // 100, len(items) * 95 // 100
    return items[:first], items[first:second], items[second:]


def as_lines(rows: Iterable[str | None], blank: str = "") -> str:
    """Rows as one text, each with one line end; an empty row, or none, becomes ``blank``."""
    return "".join(f"{(row or '').removesuffix(chr(10)) or blank}\n" for row in rows)


def _line_end(text: str, at: int) -> int:
    """Where to cut near `at`: after a line, else after a word, else right there."""
    near = at + len(text) // 40  # half a split of 5 %, so that no part is ever swallowed
    ends = (text.find(mark, at, near) for mark in ("\n", " "))
    return next((end + 1 for end in ends if end >= 0), at)
