"""LAMBADA on disk (Paperno et al. 2016): passages whose last word has to be predicted.

Facts:
- Published: novels to train on, and development and test passages as plain text, split into words.
- OpenAI's detokenised version of the 5,153 test passages, one {"text": ...} a line, is the one that
  language models are usually scored on.
"""

import json
from pathlib import Path

from layer_tying.data.sources import first_existing, is_encodable, place, read_text
from layer_tying.data.splits import Texts, cut_list, texts_of
from layer_tying.errors import InputError

FOLDERS = ("lambada", "lambada-dataset")


def novels(folder: Path | None) -> list[Path]:
    """The published training novels under a data folder, if they are there."""
    base = first_existing(folder, *FOLDERS)
    return sorted(base.glob("train-novels/**/*.txt")) if base else []


def published_splits(folder: Path) -> tuple[str, str, str]:
    """Train, development and test text as published; the novels must be there."""
    base = first_existing(folder, *FOLDERS) or folder
    development, test = (
        read_text(base / f"lambada_{split}_plain_text.txt") for split in ("development", "test")
    )
    return "".join(map(read_text, novels(folder))), development, test


def test_passages(folder: Path | None) -> list[str] | None:
    """The test passages: OpenAI's JSON lines, else the published plain text, else None.

    Raises InputError with the line number for a line that is not a passage of two words or more.
    """
    base = first_existing(folder, *FOLDERS)
    file = first_existing(base, "lambada_test.jsonl", "lambada_test_plain_text.txt")
    if file is None:
        return None
    lines = read_text(file).removesuffix("\n").split("\n")
    parse = _json_text if file.suffix == ".jsonl" else str.strip
    passages = []
    for number, line in enumerate(lines, start=1):
        passage = parse(line)
        if passage is None:
            raise InputError(f'{file}:{number}: expected {{"text": "..."}}, found {line[:40]!r}')
        if len(passage.split()) < 2:
            raise InputError(f"{file}:{number}: expected a context and a last word: {passage!r}")
        passages.append(passage)
    return passages


def lambada_texts(folder: Path) -> Texts | None:
    """As published if the novels are there; else the test passages, cut 90/5/5."""
    files = novels(folder)
    if files:
        source = f"{len(files)} training novel(s), development and test passages as published"
        return texts_of("lambada", published_splits(folder), source, words=True)
    passages = test_passages(folder)
    if passages is None:
        return None
    parts = ("".join(f"{passage}\n" for passage in part) for part in cut_list(passages))
    source = "the test passages, no training novels, cut 90/5/5 in order"
    return texts_of("lambada", parts, source)


def hub_passages() -> list[str]:
    """OpenAI's version of the test passages, from the hub."""
    import datasets

    rows = datasets.load_dataset("EleutherAI/lambada_openai", split="test")["text"]
    return [text.strip() for text in rows]


def where_to_put(folder: Path | None) -> str:
    """Words for an error: the files that would be read."""
    return place(folder, "lambada/lambada_test.jsonl", "lambada/ as published, with train-novels/")


def _json_text(line: str) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    text = row.get("text") if isinstance(row, dict) else None
    return text.strip() if isinstance(text, str) and is_encodable(text) else None
