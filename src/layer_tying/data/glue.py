"""Five tasks of GLUE (Wang et al. 2019): reading their TSV files, and batches for fine-tuning.

Facts:
- sst2 (is a film review positive?) and cola (is a sentence acceptable?) have one text; qnli, rte
  (entailment) and mrpc (paraphrase) have two.
- The published test sets carry no labels; `dev` is what results are reported on.
- Fields are split at tabs and nothing else: quote characters are text (MRPC has unbalanced ones).
- Labels are numbered as on the hub: 0 is negative, unacceptable, no paraphrase, or entailment.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import processors

from layer_tying.data.batches import ShuffledBatches
from layer_tying.data.sources import data_folder, first_existing, from_hub, place, read_exactly
from layer_tying.data.tokenizer import Tokenizer
from layer_tying.errors import InputError


@dataclass(frozen=True)
class Example:
    """One or two texts, and the index of the label."""

    text_a: str
    text_b: str | None
    label: int


@dataclass(frozen=True)
class GlueExamples:
    """A task's examples, and the names of its labels in the order of their indices."""

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """How a task's files look: their folder's name, their columns, and where things stand in them.

    `hub_texts` names the columns of the texts in the hub's version, and `metrics` what the task is
    reported by (see `tasks/metrics.py`).
    """

    folder: str
    columns: tuple[str, ...]
    texts: tuple[int, ...]
    label: int
    labels: tuple[str, ...]
    hub_texts: tuple[str, ...]
    header: bool = True
    metrics: tuple[str, ...] = ("accuracy",)


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
FORMATS = {
    "sst2": Format("SST-2", ("sentence", "label"), (0,), 1, BINARY, ("sentence",)),
    "cola": Format(
        "CoLA",
        ("source", "label", "author's mark", "sentence"),
        (3,),
        1,
        BINARY,
        ("sentence",),
        header=False,
        metrics=("accuracy", "matthews_correlation"),
    ),
    "qnli": Format(
        "QNLI",
        ("index", "question", "sentence", "label"),
        (1, 2),
        3,
        ENTAILMENT,
        ("question", "sentence"),
    ),
    "mrpc": Format(
        "MRPC",
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        (3, 4),
        0,
        BINARY,
        PAIR,
        metrics=("accuracy", "f1"),
    ),
    "rte": Format("RTE", ("index", "sentence1", "sentence2", "label"), (1, 2), 3, ENTAILMENT, PAIR),
}
TASKS = tuple(FORMATS)
PARENTS = ("glue", "glue_data", "GLUE", ".")


def load_task(task: str, data_dir: str | Path | None = None) -> GlueExamples:
    """The training and development examples of a task in `TASKS`.

    `data_dir` None means the folder that $LAYER_TYING_DATA names. Raises InputError for an unknown
    task (listing the known), for a bad file (with the line), and where the hub cannot be reached
    (saying which files to put where).
    """
    if task not in FORMATS:
        raise InputError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    form, folder = FORMATS[task], data_folder(data_dir)
    spellings = dict.fromkeys((form.folder, form.folder.lower(), task))
    local = first_existing(
        folder, *(f"{parent}/{name}" for parent in PARENTS for name in spellings)
    )
    if local:
        train, dev = (_read_tsv(local / f"{split}.tsv", form) for split in ("train", "dev"))
    else:
        instead = place(folder, f"glue/{form.folder}/ with train.tsv and dev.tsv")
        train, dev = from_hub(f"task {task!r}", instead, lambda: _fetch(task, form))
    return GlueExamples(task, train, dev, form.labels)


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
) -> dict[str, np.ndarray]:
    """A batch for a classifier: int64 arrays [B, T], and `labels` [B].

    A row of `input_ids` is CLS a SEP, or CLS a SEP b SEP, at most `max_length` long; of a pair the
    longer text is shortened first. Rows are padded on the right to the longest; `attention_mask` is
    0 there. `token_type_ids` is 1 on b and its SEP. Special tokens that the tokenizer lacks are
    left out. Raises InputError where `max_length` leaves no room for text.
    """
    rows = [_row(example, tokenizer, max_length) for example in examples]
    length = max(len(ids) for ids, _ in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": np.full(shape, tokenizer.pad_id or 0, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
        "labels": np.array([example.label for example in examples], np.int64),
    }
    for i, (ids, types) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["token_type_ids"][i, : len(ids)] = types
    return batch


def for_others(tokenizer: Tokenizer, with_token_types: bool) -> Tokenizer:
    """A tokenizer that adds to one text or two, in transformers, what ``encode`` adds.

    Args:
        tokenizer: of the run.
        with_token_types: whether the model reads them.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    ids = _start_and_end(tokenizer)
    start, end = ([backend.id_to_token(id) for id in part] for part in ids)
    single = [*start, "$A", *end]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=list(zip([*start, *end], [*ids[0], *ids[1]], strict=True)),
    )
    names = ["input_ids", *["token_type_ids"] * with_token_types, "attention_mask"]
    return replace(
        tokenizer, backend=backend, config={**tokenizer.config, "model_input_names": names}
    )


class GlueBatches(ShuffledBatches[dict[str, np.ndarray]]):
    """Training batches as `encode` makes them, each padded to its own longest row."""

    def __init__(
        self,
        source: Sequence[Example],
        tokenizer: Tokenizer,
        max_length: int,
        batch_size: int,
        seed: int,
    ):
        self.source, self.tokenizer, self.max_length = source, tokenizer, max_length
        super().__init__(len(source), batch_size, seed)

    def examples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The encoded examples with these indices."""
        return encode([self.source[i] for i in indices], self.tokenizer, self.max_length)


def _start_and_end(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before the first text and after each: CLS and SEP, where there are such."""
    start = [] if tokenizer.cls_id is None else [tokenizer.cls_id]
    end = [] if tokenizer.sep_id is None else [tokenizer.sep_id]
    return start, end


def _row(example: Example, tokenizer: Tokenizer, max_length: int) -> tuple[list[int], list[int]]:
    """Ids and token types of one example."""
    start, end = _start_and_end(tokenizer)
    a = tokenizer.encode(example.text_a)
    b = None if example.text_b is None else tokenizer.encode(example.text_b)
    room = max_length - len(start) - len(end) * (1 if b is None else 2)
    if room < 2:
        raise InputError(f"maximum length {max_length}: leaves no room for text, use at least 8")
    if b is None:
        first = [*start, *a[:room], *end]
        return first, [0] * len(first)
    # Shorten the longer text first, so a short one keeps all it has.
    a, b = a[: max(room - len(b), room - room // 2)], b[: max(room - len(a), room // 2)]
    first, second = [*start, *a, *end], [*b, *end]
    return first + second, [0] * len(first) + [1] * len(second)


def _read_tsv(file: Path, form: Format) -> tuple[Example, ...]:
    lines = _lines(file)
    start = 1
    if form.header:
        if tuple(lines.pop(0).split("\t")) != form.columns:
            raise InputError(f"{file}:1: expected the header {', '.join(form.columns)}")
        start = 2
    if not lines:
        raise InputError(f"{file}: no example after the header")
    return tuple(_example(f"{file}:{i}", line, form) for i, line in enumerate(lines, start))


def _lines(file: Path) -> list[str]:
    """The lines of a file all of which end in the same way.

    Where they do not, a stray carriage return may be text or the end of a row.
    """
    text = read_exactly(file)
    ends = re.findall(r"\r\n|\n|\r", text) or ["\n"]
    odd = next((i for i, end in enumerate(ends, start=1) if end != ends[0]), None)
    if odd:
        raise InputError(
            f"{file}:{odd}: mixed line ends, this one is {ends[odd - 1]!r} and line 1's {ends[0]!r}"
        )
    return text.removesuffix(ends[0]).split(ends[0])


def _example(where: str, line: str, form: Format) -> Example:
    fields = line.split("\t")
    if len(fields) != len(form.columns):
        expected = f"{len(form.columns)} ({', '.join(form.columns)})"
        raise InputError(f"{where}: {len(fields)} column(s), expected {expected}")
    if fields[form.label] not in form.labels:
        expected = " or ".join(form.labels)
        raise InputError(f"{where}: label {fields[form.label]!r}, expected {expected}")
    text_a, text_b = (*(fields[i] for i in form.texts), None)[:2]
    assert text_a is not None
    return Example(text_a, text_b, form.labels.index(fields[form.label]))


def _fetch(task: str, form: Format) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    import datasets

    def split(name: str) -> tuple[Example, ...]:
        rows = datasets.load_dataset("nyu-mll/glue", task, split=name)
        texts = [rows[column] for column in form.hub_texts]
        second = texts[1] if len(texts) == 2 else [None] * len(texts[0])
        return tuple(map(Example, texts[0], second, rows["label"]))

    return split("train"), split("validation")
