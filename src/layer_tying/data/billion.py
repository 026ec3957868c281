"""The One Billion Word benchmark on disk (Chelba et al. 2013): shards of shuffled sentences."""

from __future__ import annotations

from pathlib import Path

from layer_tying.data.sources import place, read_text
from layer_tying.data.splits import Texts, cut_text, texts_of
from layer_tying.errors import InputError

FOLDERS = ("lm1b", "1b", "1-billion-word-language-modeling-benchmark-r13output", ".")


def billion_texts(folder: Path) -> Texts | None:
    """The published folders of shards; or held-out shards alone, which are then cut 90/5/5."""
    for base in (folder / name for name in FOLDERS):
        train = sorted(base.glob("training-monolingual.tokenized.shuffled/news.en-*"))
        heldout = sorted(base.glob("heldout-monolingual.tokenized.shuffled/news.en.heldout-*"))
        heldout = heldout or sorted(base.glob("*heldout-*-of-00050*"))
        if train:
            if len(heldout) < 2:
                raise InputError(f"{base}: needs two held-out shards, for validation and for test")
            parts = "".join(map(read_text, train)), read_text(heldout[1]), read_text(heldout[0])
            source = f"{len(train)} training shard(s), {heldout[1].name}, {heldout[0].name}"
            return texts_of("1b", parts, source, words=True)
        if heldout:
            text = "".join(map(read_text, heldout))
            source = f"{len(heldout)} held-out shard(s), no training shard"
            return cut_text("1b", text, source, words=True)
    return None


def where_to_put(folder: Path | None) -> str:
    """Words for an error: the files that would be read."""
    return place(folder, f"{FOLDERS[2]}/ as published", "lm1b/ with held-out shards")
