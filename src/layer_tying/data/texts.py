"""Text corpora for language modelling: one record each, and where else texts come from.

Facts:
- `pydocs` (see `pydocs.py`) needs no file. The other names are looked for under the data folder, in
  several layouts each, then on the Hugging Face hub.
- Any other name is a data set of the hub (`hub:OWNER/NAME`), or the path of a text file or of a
  folder of text files.
- Train, validation and test are always disjoint. What comes as one text is cut 90/5/5, in order, at
  line ends; `source` says so.

To add a corpus, add its record to `CORPORA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layer_tying.data import billion, lambada
from layer_tying.data.hub import hub_texts, is_on_hub
from layer_tying.data.own_texts import own_texts
from layer_tying.data.pydocs import pydocs_texts
from layer_tying.data.sources import data_folder, expanded, from_hub, place, read_text
from layer_tying.data.splits import Texts, as_lines, cut_list, cut_text, texts_of
from layer_tying.errors import InputError

LAYOUT_SPLITS = ("train", "valid", "test")
PARQUET = "refs/convert/parquet"  # for sets whose main branch is a script, which is not run


@dataclass(frozen=True)
class HubEntry:
    """Where a corpus lies on the hub: rows of `column`, one line each.

    An empty row becomes `blank`, what it was in the published file.
    """

    path: str
    config: str | None
    column: str
    splits: tuple[str, str, str] = ("train", "validation", "test")
    revision: str | None = None
    blank: str = ""


@dataclass(frozen=True)
class CorpusRecord:
    """Where a corpus is found, and what is special about it.

    Attributes:
        layouts: paths under the data folder. {} stands for train, valid and test; a layout without
            it is one text, cut 90/5/5.
        hub: where it lies on the hub.
        words: whether it is published split into words.
        read: reads it from a data folder, where layouts do not tell how; None if it is not there.
        make: makes it without any file.
        where: words for an error, which files to put where.
        has_last_words: whether it is scored by the last words of its test passages as well.
    """

    layouts: tuple[str, ...] = ()
    hub: HubEntry | None = None
    words: bool = False
    read: Callable[[Path], Texts | None] | None = None
    make: Callable[[], Texts] | None = None
    where: Callable[[Path | None], str] | None = None
    has_last_words: bool = False


CORPORA: dict[str, CorpusRecord] = {
    "pydocs": CorpusRecord(make=pydocs_texts),
    "shake": CorpusRecord(
        ("shakespeare/input.txt", "tinyshakespeare/input.txt"),
        HubEntry("karpathy/tiny_shakespeare", None, "text"),
    ),
    "ptb": CorpusRecord(
        ("ptb/{}.txt", "ptb/ptb.{}.txt", "simple-examples/data/ptb.{}.txt"),
        HubEntry("ptb-text-only/ptb_text_only", None, "sentence", revision=PARQUET),
        words=True,
    ),
    "wiki2": CorpusRecord(
        ("wikitext2/{}.txt", "wikitext-2/wiki.{}.tokens"),
        HubEntry("Salesforce/wikitext", "wikitext-2-v1", "text", blank=" "),
        words=True,
    ),
    "wiki103": CorpusRecord(
        ("wikitext103/{}.txt", "wikitext-103/wiki.{}.tokens"),
        HubEntry("Salesforce/wikitext", "wikitext-103-v1", "text", blank=" "),
        words=True,
    ),
    "lambada": CorpusRecord(
        hub=HubEntry("cimec/lambada", None, "text"),
        words=True,
        read=lambada.lambada_texts,
        where=lambada.where_to_put,
        has_last_words=True,
    ),
    "1b": CorpusRecord(
        # Held-out shard 0, the usual test set, has 6,075 sentences; what follows it validates.
        hub=HubEntry(
            "billion-word-benchmark/lm1b",
            None,
            "text",
            ("train", "test[6075:12150]", "test[:6075]"),
            revision=PARQUET,
        ),
        words=True,
        read=billion.billion_texts,
        where=billion.where_to_put,
    ),
}


def load_texts(dataset: str, data_dir: str | Path | None = None) -> Texts:
    """The three texts of a data set.

    Args:
        dataset: a name in `CORPORA`, `hub:OWNER/NAME`, or the path of a file or folder.
        data_dir: the folder of local data sets; by default what $LAYER_TYING_DATA names.

    Raises:
        InputError: for an unknown name (listing the known), for files that are missing, empty,
            binary or not UTF-8, and where the hub cannot be reached (saying which files to put
            where).
    """
    if dataset in CORPORA:
        return _named_texts(dataset, data_dir)
    if is_on_hub(dataset):
        return hub_texts(dataset)
    path = expanded(dataset)
    if dataset and path.exists():
        return own_texts(path)
    raise InputError(
        f"unknown data set {dataset!r}: not one of {', '.join(CORPORA)}, not hub:OWNER/NAME, "
        "nor a text file or folder that exists"
    )


def load_last_words(
    dataset: str, data_dir: str | Path | None = None, held_out: bool = True
) -> list[tuple[str, str]]:
    """Test passages as (context, last word) pairs, where a data set is scored by them.

    held_out: only those that `load_texts` does not train on. They differ where it had to cut the
    test file itself, because the training novels are not there.
    """
    if dataset not in CORPORA or not CORPORA[dataset].has_last_words:
        return []
    folder = data_folder(data_dir)
    passages = lambada.test_passages(folder)
    if passages is None:
        passages = from_hub(dataset, lambada.where_to_put(folder), lambada.hub_passages)
    elif held_out and not lambada.novels(folder):
        train, _, test = cut_list(passages)
        seen = "\n".join(train)  # a few passages overlap longer ones from the same page
        passages = [passage for passage in test if passage not in seen]
    pairs = (passage.rsplit(maxsplit=1) for passage in passages)
    return [(context, word) for context, word in pairs]


def _named_texts(dataset: str, data_dir: str | Path | None) -> Texts:
    record = CORPORA[dataset]
    if record.make:
        return record.make()
    folder = data_folder(data_dir)
    local = None
    if folder:
        local = record.read(folder) if record.read else _laid_out_texts(dataset, record, folder)
    return local or _hub_texts(dataset, record, folder)


def _laid_out_texts(dataset: str, record: CorpusRecord, folder: Path) -> Texts | None:
    for layout in record.layouts:
        files = [folder / layout.format(split) for split in LAYOUT_SPLITS]
        if not any(file.exists() for file in files):
            continue
        if "{}" not in layout:
            return cut_text(dataset, read_text(files[0]), layout, record.words)
        return texts_of(dataset, map(read_text, files), _spell(layout), record.words)
    return None


def _spell(layout: str) -> str:
    return layout.format("{train,valid,test}")


def _hub_texts(dataset: str, record: CorpusRecord, folder: Path | None) -> Texts:
    entry = record.hub
    assert entry is not None  # or it is made without a file
    instead = record.where(folder) if record.where else place(folder, *map(_spell, record.layouts))

    def fetch() -> list[str]:
        import datasets

        return [
            as_lines(
                datasets.load_dataset(
                    entry.path, entry.config, split=split, revision=entry.revision
                )[entry.column],
                entry.blank,
            )
            for split in entry.splits
        ]

    parts = from_hub(f"data set {dataset!r}", instead, fetch)
    return texts_of(dataset, parts, f"hub: {entry.path} {entry.config or ''}".strip(), record.words)
