"""Text corpora for language modelling: where they are found, how they are split and tokenised.

Facts:
- `pydocs` (see `pydocs.py`) needs no file. The other names are looked for under the data folder, in
  several layouts each (`LAYOUTS` and the functions below), then on the Hugging Face hub. Anything
  else is the path of a text file or of a folder of text files.
- Train, validation and test are always disjoint. What comes as one text is cut 90/5/5, in order, at
  line ends; `source` says so.
- Words are counted the way WikiText's perplexities are: whitespace-separated, and one end mark a
  line. That count exists only for sets that are published split into words.
"""

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layer_tying.data import lambada
from layer_tying.data.sources import (
    cache_folder,
    data_folder,
    from_hub,
    place,
    read_arrays,
    read_text,
)
from layer_tying.data.pydocs import python_documents, split_documents
from layer_tying.data.tokenizer import Tokenizer, pieces
from layer_tying.errors import InputError
from layer_tying.files import write_whole

DATASETS = ("pydocs", "shake", "ptb", "wiki2", "wiki103", "lambada", "1b")
WORDS = ("ptb", "wiki2", "wiki103", "1b")
SPLITS = ("train", "valid", "test")
LAYOUTS = {  # {} stands for each of SPLITS; a layout without {} is one text, cut 90/5/5
    "shake": ("shakespeare/input.txt", "tinyshakespeare/input.txt"),
    "ptb": ("ptb/{}.txt", "ptb/ptb.{}.txt", "simple-examples/data/ptb.{}.txt"),
    "wiki2": ("wikitext2/{}.txt", "wikitext-2/wiki.{}.tokens"),
    "wiki103": ("wikitext103/{}.txt", "wikitext-103/wiki.{}.tokens"),
}
BILLION_FOLDERS = ("lm1b", "1b", "1-billion-word-language-modeling-benchmark-r13output", ".")
PUBLISHED_SPLITS = ("train", "validation", "test")
PARQUET = "refs/convert/parquet"  # for sets whose main branch is a script, which is not run


@dataclass(frozen=True)
class HubTexts:
    """Where a corpus lies on the hub: rows of `column`, one line each."""

    path: str
    config: str | None
    column: str
    splits: tuple[str, str, str] = PUBLISHED_SPLITS
    revision: str | None = None
    blank: str = ""  # what an empty row was in the published file


HUB = {
    "shake": HubTexts("karpathy/tiny_shakespeare", None, "text"),
    "ptb": HubTexts("ptb-text-only/ptb_text_only", None, "sentence", revision=PARQUET),
    "wiki2": HubTexts("Salesforce/wikitext", "wikitext-2-v1", "text", blank=" "),
    "wiki103": HubTexts("Salesforce/wikitext", "wikitext-103-v1", "text", blank=" "),
    "lambada": HubTexts("cimec/lambada", None, "text"),
    # Held-out shard 0, the usual test set, has 6,075 sentences; what follows it validates.
    "1b": HubTexts(
        "billion-word-benchmark/lm1b",
        None,
        "text",
        ("train", "test[6075:12150]", "test[:6075]"),
        revision=PARQUET,
    ),
}


@dataclass(frozen=True)
class Texts:
    """A corpus before tokenisation: three disjoint texts.

    `sha256` is over the three splits, `source` says in one line where they came from, and `words`
    is true where the set is published split into words, so that perplexity per word makes sense.
    """

    name: str
    train: str
    validation: str
    test: str
    sha256: str
    source: str
    words: bool


@dataclass(frozen=True)
class Split:
    """One tokenised split: `tokens` int32 [N]; its size in UTF-8 bytes and, where known, words."""

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


def load_texts(dataset: str, data_dir: str | Path | None = None) -> Texts:
    """The three texts of a data set: a name of `DATASETS`, or the path of a file or folder.

    `data_dir` None means the folder that $LAYER_TYING_DATA names. Raises InputError for an unknown
    name (listing the known), for files that are missing, empty, binary or not UTF-8, and where the
    hub cannot be reached (saying which files to put where).
    """
    if dataset == "pydocs":
        source = "language reference and standard library docstrings of this Python"
        return _texts(dataset, split_documents(python_documents()), source, words=False)
    if dataset in DATASETS:
        folder = data_folder(data_dir)
        local = _local(dataset, folder) if folder else None
        return local or _hub_texts(dataset, folder)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _folder_texts(path)
    if path.exists():
        return _one_text(path.name, read_text(path), path.name, words=False)
    raise InputError(
        f"unknown data set {dataset!r}: not one of {', '.join(DATASETS)}, "
        "nor a text file or folder that exists"
    )


def load_lambada(
    data_dir: str | Path | None = None, held_out: bool = False
) -> list[tuple[str, str]]:
    """LAMBADA's test passages as (context, last word) pairs, for last-word accuracy.

    held_out: only those that `load_texts("lambada")` does not train on. They differ where it had to
    cut the test file itself, because the training novels are not there.
    """
    folder = data_folder(data_dir)
    passages = lambada.test_passages(folder)
    if passages is None:
        passages = from_hub("lambada", lambada.where_to_put(folder), _hub_passages)
    elif held_out and not lambada.novels(folder):
        train, _, test = _cut_list(passages)
        seen = "\n".join(train)  # a few passages overlap longer ones from the same page
        passages = [passage for passage in test if passage not in seen]
    pairs = (passage.rsplit(maxsplit=1) for passage in passages)
    return [(context, word) for context, word in pairs]


def tokenize(texts: Texts, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> Corpus:
    """Tokenise the three splits, or read them from the cache if that has been done before.

    The cache is one file in `cache_dir` (the user's cache folder if None), its name a hash over
    text and tokenizer. A damaged one is made anew; a folder that cannot be written only costs time.
    """
    splits = dict(zip(PUBLISHED_SPLITS, (texts.train, texts.validation, texts.test), strict=True))
    key = hashlib.sha256(f"1 {texts.sha256} {tokenizer.fingerprint}".encode()).hexdigest()[:32]
    file = Path(cache_dir or cache_folder()) / f"tokens-{key}.npz"
    tokens = _read_cache(file, tokenizer)
    if tokens is None:
        tokens = {name: tokenizer.encode(text) for name, text in splits.items()}
        small = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        train, validation, test = (tokens[name].astype(small) for name in PUBLISHED_SPLITS)
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
        arrays = read_arrays(file, *PUBLISHED_SPLITS)
    except InputError:  # not there, or damaged
        return None
    tokens = {name: ids.astype(np.int32) for name, ids in arrays.items()}
    sound = all(
        ids.ndim == 1 and (not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size)
        for ids in tokens.values()
    )
    return tokens if sound else None


def _texts(name: str, splits: Iterable[str], source: str, words: bool) -> Texts:
    train, validation, test = splits
    digest = hashlib.sha256()
    for split in (train, validation, test):
        data = split.encode()
        digest.update(f"{len(data)}\n".encode())
        digest.update(data)
    return Texts(name, train, validation, test, digest.hexdigest(), source, words)


def _one_text(name: str, text: str, source: str, words: bool) -> Texts:
    """Cut one text 90/5/5, in order."""
    first, second = (_line_end(text, len(text) * share // 100) for share in (90, 95))
    splits = (text[:first], text[first:second], text[second:])
    return _texts(name, splits, f"{source}, cut 90/5/5 in order", words)


def _line_end(text: str, at: int) -> int:
    """Where to cut near `at`: after a line, else after a word, else right there."""
    near = at + len(text) // 40  # half a split of 5 %, so that no part is ever swallowed
    ends = (text.find(mark, at, near) for mark in ("\n", " "))
    return next((end + 1 for end in ends if end >= 0), at)


def _cut_list(items: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Cut distinct items 90/5/5, in order."""
    items = list(dict.fromkeys(items))
    first, second = len(items) * 90 // 100, len(items) * 95 // 100
    return items[:first], items[first:second], items[second:]


def _local(dataset: str, folder: Path) -> Texts | None:
    if dataset == "lambada":
        return _lambada_texts(folder)
    if dataset == "1b":
        return _billion_texts(folder)
    for layout in LAYOUTS[dataset]:
        files = [folder / layout.format(split) for split in SPLITS]
        if not any(file.exists() for file in files):
            continue
        words = dataset in WORDS
        if "{}" not in layout:
            return _one_text(dataset, read_text(files[0]), layout, words)
        return _texts(dataset, map(read_text, files), _spell(layout), words)
    return None


def _folder_texts(folder: Path) -> Texts:
    """A folder's train, valid(ation) and test files; without them, all its files as one text."""
    files = sorted(file for file in folder.rglob("*") if _has_content(file, folder))
    if not files:
        raise InputError(f"{folder}: the folder holds no text, expected text files")
    named = {file.stem.split(".")[-1]: file for file in files if file.parent == folder}
    if "train" in named:
        validation = named.get("validation") or named.get("valid") or named.get("dev")
        if not (validation and "test" in named):
            raise InputError(f"{folder}: has a train file, so it needs a valid and a test file too")
        files = [named["train"], validation, named["test"]]
        source = f"{', '.join(file.name for file in files)} of {folder.name}"
        return _texts(folder.name, map(read_text, files), source, words=False)
    text = "".join(text if text.endswith("\n") else text + "\n" for text in map(read_text, files))
    return _one_text(folder.name, text, f"{len(files)} file(s) of {folder.name}", words=False)


def _has_content(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and file.stat().st_size > 0


def _billion_texts(folder: Path) -> Texts | None:
    """The published folders of shards; or held-out shards alone, which are then cut 90/5/5."""
    for base in (folder / name for name in BILLION_FOLDERS):
        train = sorted(base.glob("training-monolingual.tokenized.shuffled/news.en-*"))
        heldout = sorted(base.glob("heldout-monolingual.tokenized.shuffled/news.en.heldout-*"))
        heldout = heldout or sorted(base.glob("*heldout-*-of-00050*"))
        if train:
            if len(heldout) < 2:
                raise InputError(f"{base}: needs two held-out shards, for validation and for test")
            parts = "".join(map(read_text, train)), read_text(heldout[1]), read_text(heldout[0])
            source = f"{len(train)} training shard(s), {heldout[1].name}, {heldout[0].name}"
            return _texts("1b", parts, source, words=True)
        if heldout:
            text = "".join(map(read_text, heldout))
            source = f"{len(heldout)} held-out shard(s), no training shard"
            return _one_text("1b", text, source, words=True)
    return None


def _lambada_texts(folder: Path) -> Texts | None:
    """As published if the novels are there; else the test passages, cut 90/5/5."""
    novels = lambada.novels(folder)
    if novels:
        source = f"{len(novels)} training novel(s), development and test passages as published"
        return _texts("lambada", lambada.published_splits(folder), source, words=True)
    passages = lambada.test_passages(folder)
    if passages is None:
        return None
    parts = ("".join(f"{passage}\n" for passage in part) for part in _cut_list(passages))
    source = "the test passages, no training novels, cut 90/5/5 in order"
    return _texts("lambada", parts, source, words=False)


def _spell(layout: str) -> str:
    return layout.format("{train,valid,test}")


def _hub_passages() -> list[str]:
    import datasets

    rows = datasets.load_dataset("EleutherAI/lambada_openai", split="test")["text"]
    return [text.strip() for text in rows]


def _hub_texts(dataset: str, folder: Path | None) -> Texts:
    entry = HUB[dataset]
    names = map(_spell, LAYOUTS.get(dataset, ()))
    instead = {
        "lambada": lambada.where_to_put(folder),
        "1b": place(folder, f"{BILLION_FOLDERS[2]}/ as published", "lm1b/ with held-out shards"),
    }.get(dataset) or place(folder, *names)

    def fetch() -> list[str]:
        import datasets

        texts = []
        for split in entry.splits:
            rows = datasets.load_dataset(
                entry.path, entry.config, split=split, revision=entry.revision
            )[entry.column]
            texts.append("".join(f"{row.removesuffix(chr(10)) or entry.blank}\n" for row in rows))
        return texts

    words = dataset in WORDS or dataset == "lambada"
    parts = from_hub(f"data set {dataset!r}", instead, fetch)
    return _texts(dataset, parts, f"hub: {entry.path} {entry.config or ''}".strip(), words)
