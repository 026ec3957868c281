"""Tokenised texts, and the cache that keeps them.

Words are counted the way WikiText's perplexities are: whitespace-separated, and one end mark a
line. That count exists only for sets that are published split into words.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layer_tying.data.sources import cache_folder, read_arrays
from layer_tying.data.splits import Texts
from layer_tying.data.tokenizer import Tokenizer, pieces
from layer_tying.errors import InputError
from layer_tying.files import write_whole

ENCODING = 2  # counts the changes of what a text is encoded as; part of the key of cached tokens
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One tokenised split: `tokens` [N]; its size in UTF-8 bytes and, where known, words.

    Tokens are uint16 where the vocabulary allows, or else uint32: a text may have billions.
    """

    tokens: np.ndarray
    num_bytes: int
    num_words: int | None


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; `name`, `sha256` and `source` are those of its `Texts`."""

    name: str
    sha256: str
    source: str
    train: Split
    validation: Split
    test: Split
    tokenizer: Tokenizer


def tokenize(texts: Texts, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> Corpus:
    """Tokenise the three splits, or read them from the cache if that has been done before.

    The cache is one file in `cache_dir` (the user's cache folder if None), its name a hash over
    text and tokenizer. A damaged file is replaced; a folder that cannot be written only costs time.
    """
    splits = dict(zip(SPLITS, (texts.train, texts.validation, texts.test), strict=True))
    named = f"{ENCODING} {texts.sha256} {tokenizer.fingerprint}"
    key = hashlib.sha256(named.encode()).hexdigest()[:32]
    file = Path(cache_dir or cache_folder()) / f"tokens-{key}.npz"
    tokens = _read_cache(file, tokenizer)
    if tokens is None:
        small = _type_of_tokens(tokenizer)
        tokens = {name: tokenizer.encode(text).astype(small) for name, text in splits.items()}
        train, validation, test = (tokens[name] for name in SPLITS)
        # A full disk or a read-only home is no reason to stop: the next run tokenises again.
        with contextlib.suppress(OSError):
            write_whole(
                file, lambda out: np.savez(out, train=train, validation=validation, test=test)
            )
    counted = (
        Split(tokens[name], len(text.encode()), count_words(text) if texts.words else None)
        for name, text in splits.items()
    )
    return Corpus(texts.name, texts.sha256, texts.source, *counted, tokenizer=tokenizer)


def count_words(text: str) -> int:
    """Whitespace-separated words, and one end mark a line."""
    return sum(len(piece.split()) for piece in pieces(text)) + text.count("\n")


def _read_cache(file: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray] | None:
    try:
        tokens = read_arrays(file, *SPLITS)
    except InputError:  # not there, or damaged
        return None
    sound = all(
        ids.ndim == 1
        and ids.dtype == _type_of_tokens(tokenizer)
        and (not len(ids) or ids.max() < tokenizer.vocab_size)
        for ids in tokens.values()
    )
    return tokens if sound else None


def _type_of_tokens(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
