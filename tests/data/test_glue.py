"""GLUE: the published TSV of each task written small here, encoding, batches, and bad files."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.data import sources
from layer_tying.data.glue import TASKS, Example, GlueBatches, encode, load_task
from layer_tying.data.tokenizer import Tokenizer, load_tokenizer
from layer_tying.errors import InputError

REAL = os.environ.get(sources.ENVIRONMENT)
BYTES = load_tokenizer("bytes", "")
PUBLISHED = {  # folder, a file as it is published, and what it says
    "sst2": (
        "SST-2",
        "sentence\tlabel\nhide new secretions \t0\nthat loves its characters \t1\n",
        [("hide new secretions ", None, 0), ("that loves its characters ", None, 1)],
    ),
    "cola": (
        "CoLA",
        "gj04\t1\t\tOne more.\ngj04\t0\t*\tThey drank the pub.",  # no newline at the end
        [("One more.", None, 1), ("They drank the pub.", None, 0)],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tWhen?\tThen.\tentailment\n"
        '1\tWho?\t"Nobody.\tnot_entailment\n',
        [("When?", "Then.", 0), ("Who?", '"Nobody.', 1)],
    ),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t702876\t702977\tHe said "yes.\tHe agreed.\r\n'
        "0\t210\t211\tOne\ttwo\u2028\x0b\r\n",
        [('He said "yes.', "He agreed.", 1), ("One", "two\u2028\x0b", 0)],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [("A.", "B.", 1), ("C.", "D.", 0)],
    ),
}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv(sources.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Tokenizer:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, and the letters from 5 on."""
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    return load_tokenizer(str(file), "")


def write_task(folder: Path, train: str | bytes, dev: str | bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in (("train", train), ("dev", train if dev is None else dev)):
        data = content.encode() if isinstance(content, str) else content
        (folder / f"{split}.tsv").write_bytes(data)
    return folder


def fails(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("parent", ["glue", "glue_data", "."])
def test_published_files(tmp_path, monkeypatch, task, parent):
    folder, content, expected = PUBLISHED[task]
    write_task(tmp_path / parent / folder, content)
    monkeypatch.setenv(sources.ENVIRONMENT, str(tmp_path))
    loaded = load_task(task)
    assert [(e.text_a, e.text_b, e.label) for e in loaded.train] == expected
    assert loaded.dev == loaded.train
    assert len(loaded.labels) == 2


def test_other_spellings_of_the_folder(tmp_path):
    for name in ("sst-2", "sst2"):
        write_task(tmp_path / name / "glue" / name, PUBLISHED["sst2"][1])
        assert len(load_task("sst2", tmp_path / name).train) == 2


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst2", "sentence\tlabel\ngood\t1\nbad\n", "train.tsv:3: 1 column(s), expected 2"),
        ("sst2", "sentence\tlabel\ngood\t1\textra\n", "train.tsv:2: 3 column(s)"),
        ("sst2", "sentence\tlabel\ngood\t1\n\n", "train.tsv:3: 1 column(s)"),
        ("sst2", "sentence\tlabel\ngood\t2\n", "train.tsv:2: label '2', expected 0 or 1"),
        ("sst2", "sentence\tlabel\ngood\t\n", "train.tsv:2: label ''"),
        ("sst2", "good\t1\nbad\t0\n", "train.tsv:1: expected the header sentence, label"),
        ("sst2", "sentence\tlabel\n", "train.tsv: no example after the header"),
        ("cola", "gj04\t1\t\ta\ngj04\t1\tb\n", "train.tsv:2: 3 column(s), expected 4"),
        ("cola", "gj04\t1\t\ta\ngj04\t-1\t\tb\n", "train.tsv:2: label '-1'"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", "train.tsv:2: label 'n"),
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\n", "train.tsv:2: 4 c"),
        ("sst2", "sentence\tlabel\r\ngood\t1\nbad\t0\r\n", "train.tsv:2: mixed line ends"),
        ("sst2", "sentence\tlabel\ngood\t1\nba\rd\t0\n", "train.tsv:3: mixed line ends"),
        ("sst2", b"sentence\tlabel\ngood\t1\nb\xe4d\t0\n", "train.tsv: not UTF-8 (byte 0xe4 in l"),
        ("sst2", b"sentence\tlabel\ng\0od\t1\n", "train.tsv: binary file"),
        ("sst2", "", "train.tsv: the file is empty"),
    ],
)
def test_a_bad_file_gets_one_line_with_its_place(tmp_path, task, content, message):
    folder = write_task(tmp_path / PUBLISHED[task][0], content)
    error = fails(load_task, task, tmp_path)
    assert message in error
    assert str(folder) in error


def test_what_is_not_there(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources.socket, "getaddrinfo", refuse)
    assert "expected one of sst2, cola, qnli, mrpc, rte" in fails(load_task, "mnli", tmp_path)
    message = fails(load_task, "rte", tmp_path)
    assert f"put glue/RTE/ with train.tsv and dev.tsv under {tmp_path}" in message
    folder = write_task(tmp_path / "glue" / "RTE", PUBLISHED["rte"][1])
    (folder / "dev.tsv").unlink()
    assert "dev.tsv: no such file" in fails(load_task, "rte", tmp_path)


def test_from_the_hub_when_it_is_reachable(monkeypatch):
    def load_dataset(path, config, *, split):
        assert path == "nyu-mll/glue"
        texts = {"sentence": ["a", "b"]} if config == "sst2" else {"question": ["q", "p"]}
        return {**texts, "sentence": ["a", split], "label": [1, 0]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no look at the network: the stand-in answers
    assert load_task("sst2").dev == (Example("a", None, 1), Example("validation", None, 0))
    assert load_task("qnli").train == (Example("q", "a", 1), Example("p", "train", 0))


def test_encoding_by_hand(bert):
    batch = encode([Example("a b", "c", 1), Example("D", None, 0)], bert, 16)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 7, 3], [2, 8, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert batch["labels"].tolist() == [1, 0]
    assert all(array.dtype == np.int64 for array in batch.values())


def test_encoding_agrees_with_transformers(bert, tmp_path):
    from transformers import BertTokenizer

    bert.save(tmp_path)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    pairs = [("a b c", "d e f g h a b"), ("a b c d e f g", "h"), ("a", "b"), ("a b c d", "e f g h")]
    ours = encode([Example(a, b, 0) for a, b in pairs], bert, 9)
    first, second = zip(*pairs, strict=True)
    expected = theirs(
        list(first), list(second), truncation="longest_first", max_length=9, padding=True
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert ours[name].tolist() == expected[name], name


def test_a_tokenizer_without_bert_tokens_uses_what_it_has(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    gpt2 = load_tokenizer(str(tmp_path), "")
    batch = encode([Example("a", "b", 0), Example("a", None, 0)], gpt2, 8)
    assert batch["input_ids"].tolist() == [[0, 2, 1, 2], [0, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@given(
    a=st.text(alphabet="ab", max_size=30),
    b=st.none() | st.text(alphabet="cd", max_size=30),
    max_length=st.integers(5, 40),
)
def test_truncation_takes_from_the_longer(a, b, max_length):
    batch = encode([Example(a, b, 0)], BYTES, max_length)
    ids = batch["input_ids"][0].tolist()
    special = 2 if b is None else 3
    assert len(ids) == min(max_length, len(a) + len(b or "") + special)
    assert (ids[0], ids[-1]) == (BYTES.cls_id, BYTES.sep_id)
    end = ids.index(BYTES.sep_id)
    kept_a, kept_b = BYTES.decode(ids[:end]), BYTES.decode(ids[end:])
    assert a.startswith(kept_a)
    assert (b or "").startswith(kept_b)
    assert batch["token_type_ids"][0].sum() == len(ids) - end - 1
    if len(kept_a) < len(a) and b is not None:  # a was cut: b is no longer than it, or it is even
        assert len(kept_b) <= len(kept_a)
    if len(kept_b) < len(b or ""):
        assert len(kept_a) <= len(kept_b) + 1


def test_no_room_for_text():
    assert "leaves no room" in fails(encode, [Example("a", "b", 0)], BYTES, 4)


@given(before=st.integers(0, 12), batch_size=st.integers(1, 7))
def test_batches_resume_and_pad_only_as_needed(before, batch_size):
    source = [Example("a" * i, None, i % 2) for i in range(1, 12)]
    whole = GlueBatches(source, BYTES, 10, batch_size, seed=2)
    for _ in range(before):
        batch = next(whole)
        assert batch["attention_mask"].sum(axis=1).max() == batch["input_ids"].shape[1]
    resumed = GlueBatches(source, BYTES, 10, batch_size, seed=2)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for _ in range(3):
        expected, found = next(whole), next(resumed)
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    seen = {int(n) for _ in range(22) for n in next(whole)["attention_mask"].sum(axis=1)}
    assert seen == {min(i + 2, 10) for i in range(1, 12)}


@pytest.mark.skipif(not REAL, reason=f"{sources.ENVIRONMENT} is not set")
@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [
        ("sst2", 67_349, 872),
        ("cola", 8_551, 1_043),
        ("qnli", 9_999, 5_463),
        ("mrpc", 3_668, 408),
        ("rte", 2_490, 277),
    ],
)
def test_published_counts(task, train, dev):
    loaded = load_task(task, REAL)
    assert (len(loaded.train), len(loaded.dev)) == (train, dev)
    labels = np.array([example.label for example in loaded.dev])
    assert 0.3 < labels.mean() < 0.7
    assert all(example.text_a.strip() for example in loaded.train)
