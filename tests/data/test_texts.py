"""Corpora and batches: published layouts written here, splits, caches, and bad files."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_tying.data import sources
from layer_tying.data.batches import Batches, evaluation_windows, mask_tokens
from layer_tying.data.pydocs import python_documents, split_documents
from layer_tying.data.splits import Texts, cut_text
from layer_tying.data.texts import CORPORA, load_last_words, load_texts
from layer_tying.data.tokenizer import load_tokenizer
from layer_tying.data.tokens import count_words, tokenize
from layer_tying.errors import InputError

REAL = os.environ.get(sources.ENVIRONMENT)
BYTES = load_tokenizer("bytes", "")
LINES = "".join(f"line {i} of a text .\n" for i in range(200))


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv(sources.ENVIRONMENT, raising=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources.socket, "getaddrinfo", refuse)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fails(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_texts(train="ab cd\n" * 50, validation="ef\n", test="gh ij\n", words=True) -> Texts:
    digest = hashlib.sha256("|".join((train, validation, test)).encode()).hexdigest()
    return Texts("made", train, validation, test, digest, "made here", words)


# --- the embedded default


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return python_documents()


def test_pydocs_are_split_by_document(documents):
    splits = split_documents(documents)
    sizes = [len(split) for split in splits]
    assert sum(sizes) > 1_000_000
    assert [round(size / sum(sizes), 2) for size in sizes] == [0.90, 0.05, 0.05]

    topics = {name: text for name, text in documents.items() if name.startswith("topic ")}
    share = sum(map(len, topics.values())) / sum(sizes)
    for split in splits:  # the same mix everywhere
        assert abs(sum(len(t) for t in topics.values() if t in split) / len(split) - share) < 0.02


def test_pydocs_are_the_same_each_time():
    """Of a part of the library, in processes that hash strings, and so order sets, differently."""
    code = "import json, sysconfig\n"
    code += "sysconfig.get_paths = lambda: {'stdlib': json.__path__[0]}\n"
    code += "from layer_tying.data.texts import load_texts\n"
    code += "texts = load_texts('pydocs')\n"
    code += "print('JSON' in texts.train + texts.validation + texts.test, texts.sha256)\n"
    command = [sys.executable, "-c", code]
    one, other = (
        subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in "01"
    )
    assert one == other and one.startswith("True")


def test_pydocs_never_repeat_a_paragraph(documents):
    seen = set()
    for split in split_documents(documents):
        paragraphs = [" ".join(p.split()) for p in split.split("\n\n") if p.strip()]
        assert len(set(paragraphs)) == len(paragraphs)
        assert not seen & set(paragraphs)
        seen |= set(paragraphs)


def test_pydocs_come_from_source_and_skip_what_does_not_parse(tmp_path, monkeypatch):
    write(tmp_path / "good.py", '"""Of the module."""\nif 1:\n    def f():\n        """Of f."""\n')
    write(tmp_path / "bad.py", '"""Lost."""\ndef (:\n')
    write(tmp_path / "test" / "inside.py", '"""Skipped."""\n')
    write(tmp_path / "boom.py", '"""Not run."""\nraise SystemExit("imported!")\n')
    monkeypatch.setattr("layer_tying.data.pydocs.sysconfig.get_paths", lambda: {"stdlib": tmp_path})
    modules = {name: text for name, text in python_documents().items() if name[0] == "m"}
    assert modules == {
        "module good.py": "Of the module.\n\nOf f.\n\n",
        "module boom.py": "Not run.\n\n",
    }


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60))
def test_documents_are_dealt_whole(sizes):
    documents = {f"{'topic' if i % 3 else 'module'} {i}": f"<{i}>" * n for i, n in enumerate(sizes)}
    splits = split_documents(documents)
    for text in documents.values():
        assert sum(text in split for split in splits) == 1
    assert sum(map(len, splits)) == sum(map(len, documents.values()))
    assert max(len(splits[1]), len(splits[2])) <= 0.05 * sum(map(len, splits))


# --- published layouts


@pytest.mark.parametrize(
    ("dataset", "layout"),
    [
        ("wiki2", "wikitext2/{}.txt"),
        ("wiki2", "wikitext-2/wiki.{}.tokens"),
        ("wiki103", "wikitext-103/wiki.{}.tokens"),
        ("ptb", "ptb/ptb.{}.txt"),
        ("ptb", "simple-examples/data/ptb.{}.txt"),
    ],
)
def test_three_published_files(tmp_path, dataset, layout):
    for split in ("train", "valid", "test"):
        write(tmp_path / layout.format(split), f" = {split} = \n \n words here \n")
    texts = load_texts(dataset, tmp_path)
    assert texts.validation == " = valid = \n \n words here \n"
    assert (texts.words, texts.name) == (True, dataset)
    assert str(tmp_path) not in texts.source  # goes into published results
    (tmp_path / layout.format("valid")).unlink()
    assert "no such file" in fails(load_texts, dataset, tmp_path)


def test_data_folder_from_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "shakespeare" / "input.txt", LINES)
    monkeypatch.setenv(sources.ENVIRONMENT, str(tmp_path))
    texts = load_texts("shake")
    assert texts.train + texts.validation + texts.test == LINES
    assert "90/5/5" in texts.source
    monkeypatch.setenv(sources.ENVIRONMENT, str(tmp_path / "nowhere"))
    assert "($LAYER_TYING_DATA) does not exist" in fails(load_texts, "shake")


def test_one_billion_words_as_published(tmp_path):
    base = tmp_path / "1-billion-word-language-modeling-benchmark-r13output"
    for i in (1, 2):
        shard = f"training-monolingual.tokenized.shuffled/news.en-0000{i}-of-00100"
        write(base / shard, f"train {i}\n")
    for i in (0, 1):
        shard = f"heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{i}-of-00050"
        write(base / shard, f"held {i}\n")
    texts = load_texts("1b", tmp_path)
    assert (texts.train, texts.validation, texts.test) == (
        "train 1\ntrain 2\n",
        "held 1\n",
        "held 0\n",
    )
    (base / shard).unlink()
    assert "two held-out shards" in fails(load_texts, "1b", tmp_path)


def test_a_lone_heldout_shard_is_cut_by_lines(tmp_path):
    write(tmp_path / "lm1b" / "heldout-00000-of-00050.txt", LINES)
    texts = load_texts("1b", tmp_path)
    assert texts.train + texts.validation + texts.test == LINES
    assert all(text.endswith("\n") for text in (texts.train, texts.validation))
    assert "no training shard" in texts.source
    assert texts.words


def lambada_json(count: int) -> str:
    rows = [{"text": f"Passage {i}, and\n\nthe last word is w{i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_lambada_test_file_is_scored_and_cut(tmp_path):
    write(tmp_path / "lambada" / "lambada_test.jsonl", lambada_json(100))
    pairs = load_last_words("lambada", tmp_path, held_out=False)
    assert len(pairs) == 100
    assert pairs[7] == ("Passage 7, and\n\nthe last word is", "w7")
    texts = load_texts("lambada", tmp_path)
    assert "no training novels" in texts.source
    held_out = load_last_words("lambada", tmp_path)
    assert len(held_out) == 5
    for context, word in held_out:  # what is scored was not trained on
        assert f"{context} {word}\n" in texts.test
        assert f"{context} {word}\n" not in texts.train + texts.validation


def test_lambada_as_published(tmp_path):
    base = tmp_path / "lambada-dataset"
    write(base / "train-novels" / "Romance" / "1.txt", "a novel\n")
    write(base / "train-novels" / "Horror" / "2.txt", "another\n")
    write(base / "lambada_development_plain_text.txt", "the dev passage\n")
    write(base / "lambada_test_plain_text.txt", "the test passage\nand one more\n")
    texts = load_texts("lambada", tmp_path)
    assert texts.train == "another\na novel\n"
    assert texts.validation == "the dev passage\n"
    assert texts.words
    expected = [("the test", "passage"), ("and one", "more")]
    assert (
        load_last_words("lambada", tmp_path, held_out=False)
        == load_last_words("lambada", tmp_path)
        == expected
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "torn', 'expected {"text": "..."}'),
        ('{"words": "a b"}', 'expected {"text": "..."}'),
        ('["a b"]', 'expected {"text": "..."}'),
        ('{"text": 3}', 'expected {"text": "..."}'),
        ('{"text": "alone"}', "a context and a last word"),
        ("", 'expected {"text": "..."}'),
    ],
)
def test_a_malformed_lambada_line_is_named(tmp_path, line, message):
    write(tmp_path / "lambada" / "lambada_test.jsonl", f"{lambada_json(2)}{line}\n")
    error = fails(load_last_words, "lambada", tmp_path)
    assert "lambada_test.jsonl:3: " in error
    assert message in error


# --- the hub


def test_the_hub_is_asked_where_there_are_no_files(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, config=None, *, split, revision=None):
        asked.append((path, config, split))
        if path == "EleutherAI/lambada_openai":
            return {"text": ["one two three"]}
        return {"text": ["", f" = {split} = \n", " words \n"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no look at the network: the stand-in answers
    texts = load_texts("wiki2", tmp_path)
    assert texts.test == " \n = test = \n words \n"  # as in the published file
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-v1", "train")
    assert "hub: Salesforce/wikitext" in texts.source
    assert load_last_words("lambada", tmp_path, held_out=False) == [("one two", "three")]


@pytest.mark.parametrize("dataset", [name for name in CORPORA if name != "pydocs"])
def test_without_files_or_network_it_says_what_to_put_where(dataset, tmp_path, no_network):
    message = fails(load_texts, dataset, tmp_path)
    assert "huggingface.co cannot be reached" in message
    assert "put " in message
    assert f"under {tmp_path}" in message
    assert "$LAYER_TYING_DATA" in fails(load_texts, dataset)


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'dynamic-layer-tying[data]'" in fails(load_texts, "wiki2")
    assert "pip install" in fails(load_last_words, "lambada")


# --- paths, and files that cannot be used


def test_a_file_is_cut_in_order_at_line_ends(tmp_path):
    texts = load_texts(str(write(tmp_path / "mine.txt", LINES)))
    assert texts.train + texts.validation + texts.test == LINES
    assert all(split.startswith("line") for split in (texts.train, texts.validation, texts.test))
    assert texts.source == "mine.txt, cut 90/5/5 in order"


@given(st.text(alphabet="ab \n", min_size=1, max_size=400))
def test_cutting_loses_nothing_and_swallows_no_part(text):
    texts = cut_text("x", text, "x")
    assert texts.train + texts.validation + texts.test == text
    if len(text) >= 40:
        assert texts.train
        assert texts.validation
        assert texts.test


def test_a_folder_with_splits_and_one_without(tmp_path):
    for name in ("a.train.txt", "a.valid.txt", "a.test.txt"):
        write(tmp_path / "splits" / name, f"{name}\n")
    texts = load_texts(str(tmp_path / "splits"))
    assert (texts.train, texts.validation) == ("a.train.txt\n", "a.valid.txt\n")
    (tmp_path / "splits" / "a.test.txt").unlink()
    assert "needs a valid and a test file" in fails(load_texts, str(tmp_path / "splits"))

    write(tmp_path / "plain" / "b" / "2.txt", "second\n" * 50)
    write(tmp_path / "plain" / "a.md", "first\n" * 49 + "first")
    write(tmp_path / "plain" / ".hidden" / "x.txt", "hidden")
    write(tmp_path / "plain" / "empty.txt", "")
    texts = load_texts(str(tmp_path / "plain"))
    assert texts.train + texts.validation + texts.test == "first\n" * 50 + "second\n" * 50
    assert "2 file(s)" in texts.source
    (tmp_path / "nothing").mkdir()
    assert "holds no text" in fails(load_texts, str(tmp_path / "nothing"))


def test_names_of_splits_may_begin_with_a_capital(tmp_path):
    for name in ("Train", "Valid", "Test"):
        write(tmp_path / f"{name}.txt", f"{name}\n")
    texts = load_texts(str(tmp_path))
    assert (texts.train, texts.validation, texts.test) == ("Train\n", "Valid\n", "Test\n")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("train-0.txt", "train-1.txt", "valid.txt", "test.txt"), "holds test and valid, which"),
        (("train/a.txt", "Valid/a.txt", "test/a.txt"), "holds test and train and valid, which"),
        (("train.txt", "valid.txt", "test.txt"), "train.txt: the file is empty"),
    ],
)
def test_a_test_part_is_never_trained_on(tmp_path, names, says):
    for name in names:
        write(tmp_path / name, "" if name == "train.txt" else "some words\n" * 50)
    assert says in fails(load_texts, str(tmp_path))


def test_a_folder_of_programs_may_hold_one_that_is_called_test(tmp_path):
    for name in ("model.py", "test.py", "tests/test.py"):
        write(tmp_path / name, "some words\n" * 50)
    assert "3 file(s)" in load_texts(str(tmp_path)).source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text\0text", "binary file"),
        (b"one\ntwo \xff three", "not UTF-8 (byte 0xff in line 2)"),
        ("später".encode("latin-1"), "not UTF-8"),
    ],
)
def test_an_unusable_file_gets_one_line(tmp_path, content, message):
    file = write(tmp_path / "bad.txt", content)
    error = fails(load_texts, str(file))
    assert message in error
    assert str(file) in error


def test_unknown_names_list_the_known():
    message = fails(load_texts, "wikitext-9")
    assert "unknown data set 'wikitext-9'" in message
    assert all(name in message for name in CORPORA)


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path):
    mixed = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n")
    assert sources.read_text(mixed) == "one\ntwo\nthree\n\n"


# --- tokens


@pytest.mark.parametrize("spec", ["bytes", "bpe:270"])
def test_tokenised_splits_decode_to_the_texts(tmp_path, spec):
    texts = make_texts()
    tokenizer = load_tokenizer(spec, texts.train)
    for _ in range(2):  # made, then read from the cache
        corpus = tokenize(texts, tokenizer, tmp_path)
        assert tokenizer.decode(corpus.train.tokens) == texts.train
        assert tokenizer.decode(corpus.test.tokens) == texts.test
        assert corpus.validation.tokens.dtype == np.uint16  # half of the memory of int32
    assert (corpus.train.num_bytes, corpus.train.num_words) == (300, 150)
    assert (corpus.name, corpus.sha256, corpus.source) == ("made", texts.sha256, "made here")
    assert tokenize(make_texts(words=False), tokenizer, tmp_path).train.num_words is None
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_is_used_and_keyed_by_text_and_tokenizer(tmp_path, monkeypatch):
    texts, other = make_texts(), make_texts(train="zz\n" * 9)
    bpe = load_tokenizer("bpe:270", texts.train)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for text, tokenizer in ((texts, BYTES), (texts, bpe), (other, BYTES)):
        tokenize(text, tokenizer)
    assert len(list((tmp_path / "layer-tying").iterdir())) == 3

    def encode(self, text):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("layer_tying.data.tokenizer.Tokenizer.encode", encode)
    assert BYTES.decode(tokenize(other, BYTES).train.tokens) == other.train


def test_a_damaged_cache_is_made_anew(tmp_path):
    texts = make_texts()
    whole = tokenize(texts, BYTES, tmp_path)
    (cache,) = tmp_path.iterdir()
    sound = cache.read_bytes()
    flipped = bytearray(sound)
    flipped[sound.index(np.frombuffer(b"ab cd", np.uint8).astype(np.uint16).tobytes())] ^= 1
    wrong = []
    for ids in (np.array([999], np.uint16), np.array([1], np.int64)):
        np.savez(tmp_path / "wrong.npz", train=ids, validation=ids, test=ids)
        wrong.append((tmp_path / "wrong.npz").read_bytes())
    method = sound.rindex(b"PK\1\2") + 10  # of compression, of the last file in the zip
    flipped_method = sound[:method] + bytes([sound[method] ^ 4]) + sound[method + 1 :]
    broken = [flipped_method, b"", b"junk", sound[: len(sound) // 2], sound[:-1], bytes(flipped)]
    for content in [*broken, *wrong]:
        cache.write_bytes(content)
        again = tokenize(texts, BYTES, tmp_path)
        assert np.array_equal(again.train.tokens, whole.train.tokens)
        assert cache.read_bytes() == sound


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    occupied = write(tmp_path / "file", "in the way")
    corpus = tokenize(make_texts(), BYTES, occupied)
    assert BYTES.decode(corpus.train.tokens) == make_texts().train


def tokenize_repeatedly(folder: str) -> None:
    texts = make_texts(train="ab cd\n" * 20_000)
    for _ in range(15):
        for file in Path(folder).glob("*.npz"):
            file.unlink(missing_ok=True)
        assert BYTES.decode(tokenize(texts, BYTES, folder).train.tokens) == texts.train


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [context.Process(target=tokenize_repeatedly, args=(str(tmp_path),)) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]  # no temporary file is left


@given(st.text(alphabet="ab \n\u00a0", max_size=200))
def test_words_are_counted_with_one_end_mark_a_line(text):
    lines = text.split("\n")
    assert count_words(text) == sum(len(line.split()) for line in lines) + len(lines) - 1


# --- batches


@given(
    num_tokens=st.integers(5, 300),
    length=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_batches_see_every_window_once_an_epoch(num_tokens, length, batch_size, seed):
    tokens = np.arange(num_tokens, dtype=np.int32)
    if num_tokens <= length:
        assert "shorter than one sequence" in fails(Batches, tokens, length, batch_size, seed)
        return
    batches = Batches(tokens, length, batch_size, seed)
    num_windows = (num_tokens - 1) // length
    epochs = [next(batches) for _ in range(2 * num_windows)]  # batch_size epochs and more
    inputs = np.concatenate([batch[0] for batch in epochs])
    labels = np.concatenate([batch[1] for batch in epochs])
    assert inputs.shape == labels.shape == (2 * num_windows * batch_size, length)
    assert inputs.dtype == labels.dtype == np.int64
    assert np.array_equal(labels, inputs + 1)  # tokens count up: each label is the true next one
    starts = inputs[:, 0].reshape(-1, num_windows)
    assert (np.sort(starts) == np.arange(num_windows) * length).all()
    assert batches.batches_per_epoch * batch_size >= num_windows
    assert (batches.batches_per_epoch - 1) * batch_size < num_windows


@given(before=st.integers(0, 40), after=st.integers(1, 20), batch_size=st.integers(1, 20))
def test_resumed_batches_are_those_that_would_have_come(before, after, batch_size):
    tokens = np.arange(100, dtype=np.int32)
    whole = Batches(tokens, 7, batch_size, seed=3)
    for _ in range(before):
        next(whole)
    resumed = Batches(tokens, 7, batch_size, seed=3)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for _ in range(after):
        assert np.array_equal(next(whole), next(resumed))
    assert whole.state() == resumed.state()


def test_streams_differ_by_seed_and_epoch():
    tokens = np.arange(1001, dtype=np.int32)
    first, second = Batches(tokens, 10, 100, seed=0), Batches(tokens, 10, 100, seed=1)
    epochs = [next(first)[0][:, 0], next(first)[0][:, 0], next(second)[0][:, 0]]
    assert not any(np.array_equal(a, b) for a, b in pairwise(epochs))


@pytest.mark.parametrize("state", [{}, {"epoch": -1, "position": 0}, {"epoch": 0, "position": 99}])
def test_a_foreign_data_position_is_refused(state):
    assert "data position" in fails(Batches(np.arange(20), 5, 2, 0).restore, state)


def test_bad_batch_arguments():
    assert "batch size 0" in fails(Batches, np.arange(9), 2, 0, 0)
    assert "sequence length 0" in fails(Batches, np.arange(9), 0, 1, 0)
    assert "nothing to predict" in fails(evaluation_windows, np.arange(1), 4)


@given(num_tokens=st.integers(2, 200), length=st.integers(1, 30))
def test_evaluation_predicts_each_token_but_the_first_once(num_tokens, length):
    inputs, labels = evaluation_windows(np.arange(num_tokens, dtype=np.int32), length)
    assert inputs.shape == labels.shape == (-(-(num_tokens - 1) // length), length)
    real = labels != -100
    assert labels[real].tolist() == list(range(1, num_tokens))
    assert np.array_equal(inputs[real] + 1, labels[real])
    assert (inputs[~real] == 0).all()


@given(rows=st.integers(1, 4), length=st.integers(1, 40), seed=st.integers(0, 999))
def test_masking_labels_what_it_chose_and_leaves_the_rest(rows, length, seed):
    inputs = np.random.default_rng(seed).integers(0, 256, size=(rows, length))
    inputs[:, length // 2 + 1 :] = BYTES.pad_id
    masked, labels = mask_tokens(inputs, np.random.default_rng(seed), BYTES)
    chosen = labels != -100
    assert chosen.any(axis=1).all()
    assert np.array_equal(labels[chosen], inputs[chosen])
    assert np.array_equal(masked[~chosen], inputs[~chosen])
    assert not chosen[inputs == BYTES.pad_id].any()
    assert masked.min() >= 0
    assert masked.max() < BYTES.vocab_size


def test_masking_rates_are_those_of_bert():
    inputs = np.full((200, 500), 65)
    masked, labels = mask_tokens(inputs, np.random.default_rng(0), BYTES)
    chosen = labels != -100
    assert abs(chosen.mean() - 0.15) < 0.005
    assert abs((masked[chosen] == BYTES.mask_id).mean() - 0.8) < 0.01
    assert abs((masked[chosen] == 65).mean() - 0.1) < 0.01
    again, _ = mask_tokens(inputs, np.random.default_rng(0), BYTES)
    assert np.array_equal(masked, again)


def test_masking_needs_a_mask_token(tmp_path):
    write(tmp_path / "vocab.json", '{"a": 0, "b": 1}')
    write(tmp_path / "merges.txt", "#version: 0.2\n")
    tokenizer = load_tokenizer(str(tmp_path), "")
    message = fails(mask_tokens, np.zeros((1, 2)), np.random.default_rng(0), tokenizer)
    assert "has no mask token" in message


# --- the real sets


@pytest.mark.skipif(not REAL, reason=f"{sources.ENVIRONMENT} is not set")
def test_published_counts(tmp_path):
    wiki2 = tokenize(load_texts("wiki2", REAL), BYTES, tmp_path)
    splits = (wiki2.train, wiki2.validation, wiki2.test)
    assert [split.num_words for split in splits] == [2_088_628, 217_646, 245_569]
    assert [split.num_bytes for split in splits] == [10_797_148, 1_121_681, 1_256_449]
    billion = load_texts("1b", REAL)
    parts = (billion.train, billion.validation, billion.test)
    assert sum(map(count_words, parts)) == 159_658
    shake = load_texts("shake", REAL)
    assert len(shake.train + shake.validation + shake.test) == 1_115_394
    assert len(load_last_words("lambada", REAL, held_out=False)) == 5_153
    trained_on = load_texts("lambada", REAL).train
    held_out = load_last_words("lambada", REAL)
    assert len(held_out) == 257
    assert not any(context in trained_on for context, _ in held_out)


def test_two_files_of_one_part_are_refused_and_val_is_a_name(tmp_path):
    for name in ("train.txt", "val.txt", "test.txt"):
        (tmp_path / name).write_text(f"{name} has words\n" * 20, encoding="utf-8")
    assert load_texts(str(tmp_path)).validation.startswith("val.txt")
    (tmp_path / "more.train.txt").write_text("more words\n" * 20, encoding="utf-8")
    with pytest.raises(InputError, match=r"more\.train\.txt and train\.txt are both its train"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x"])
def test_a_home_directory_that_is_not_there_is_one_line(name):
    for load in (load_texts, lambda name: load_texts("wiki2", name)):
        with pytest.raises(InputError, match="nobody-of-this-name"):
            load(name)
