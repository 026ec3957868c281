"""Tokenizers: round trips, published formats written here, and every way their files can be bad."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layer_tying.data import sources
from layer_tying.data.tokenizer import Tokenizer, load_tokenizer, pieces, read_tokenizer
from layer_tying.errors import InputError

TEXT = "The cat sat on the mat; the cat's mat, it's 12 o'clock.\n\n  The end \n of the tale.\n" * 40
REAL = os.environ.get(sources.ENVIRONMENT)
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "!"]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv(sources.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return load_tokenizer("bpe:300", TEXT)


def write_wordpiece(folder: Path, words=WORDPIECES) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def write_gpt2(folder: Path) -> Path:
    folder.mkdir(parents=True)
    words = ["h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\n")
    return folder


def fails(spec: str, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(spec, TEXT, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_are_what_the_documentation_says():
    bytes_ = load_tokenizer("bytes", "")
    assert bytes_.encode("héllo").tolist() == list("héllo".encode())
    assert bytes_.encode("héllo").dtype == np.int32
    ids = (bytes_.eos_id, bytes_.sep_id, bytes_.pad_id, bytes_.mask_id, bytes_.cls_id)
    assert ids == (256, 256, 257, 258, 259)
    assert bytes_.vocab_size == 260
    assert bytes_.special_ids == {256, 257, 258, 259}
    assert bytes_.decode([104, 256, 0xC3, 105]) == "h\ufffdi"


@given(st.text())
def test_bytes_round_trip(text):
    bytes_ = load_tokenizer("bytes", "")
    ids = bytes_.encode(text)
    assert bytes_.decode(ids) == text
    assert bytes_.backend.encode(text, add_special_tokens=False).ids == ids.tolist()


@given(text=st.text())
@example(text="<|mask|> is text, <|endoftext|> too")
def test_learned_bpe_round_trip_of_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_learned_bpe_compresses_its_text_and_is_learned_the_same_again(bpe):
    assert len(bpe.encode(TEXT)) < len(TEXT) / 1.5
    assert bpe.vocab_size <= 300
    assert len(bpe.special_ids) == 4
    assert max(bpe.special_ids) < bpe.vocab_size
    assert load_tokenizer("bpe:300", TEXT).fingerprint == bpe.fingerprint
    assert load_tokenizer("bpe:299", TEXT).fingerprint != bpe.fingerprint


@settings(max_examples=200)
@given(text=st.text(alphabet="ab's \n\t1.é\u00a0"), size=st.integers(1, 9))
def test_cutting_into_pieces_changes_no_token(bpe, text, size):
    assert "".join(pieces(text, size)) == text
    parts = [i for piece in pieces(text, size) for i in bpe.encode(piece)]
    assert parts == bpe.backend.encode(text, add_special_tokens=False).ids


def test_a_long_text_is_encoded_as_if_in_one_go(bpe):
    text = TEXT * 120
    assert len(list(pieces(text))) > 5
    whole = bpe.backend.encode(text, add_special_tokens=False).ids
    assert np.array_equal(bpe.encode(text), whole)


def test_a_space_that_is_put_before_a_text_is_not_put_before_its_pieces(tmp_path):
    """The tokenizers of Llama 2 do that."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    both = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    backend.normalizer = tokenizers.normalizers.Sequence(both)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, initial_alphabet=["\n"])
    backend.train_from_iterator(TEXT.split(), trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = (TEXT + " ") * 120
    assert len(list(pieces(text))) > 5
    whole = backend.encode(text, add_special_tokens=False).ids
    assert np.array_equal(load_tokenizer(str(tmp_path), "").encode(text), whole)


@pytest.mark.parametrize("kind", ["bytes", "bpe:300", "wordpiece"])
def test_saved_and_read_back(tmp_path, kind):
    spec = str(write_wordpiece(tmp_path / "words")) if kind == "wordpiece" else kind
    saved = load_tokenizer(spec, TEXT)
    saved.save(tmp_path / "saved")
    read = read_tokenizer(tmp_path / "saved")
    assert read == saved
    assert read.fingerprint == saved.fingerprint
    assert np.array_equal(read.encode("hello world!"), saved.encode("hello world!"))


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_transformers_reads_what_was_saved(tmp_path, spec):
    from transformers import AutoTokenizer

    ours = load_tokenizer(spec, TEXT)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat é\n")["input_ids"] == ours.encode("the cat é\n").tolist()
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token_id == ours.pad_id


def test_what_others_need_of_a_tokenizer_is_kept(tmp_path, bpe):
    """The beginning and unknown tokens, the chat template and the length of a model's tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend, bos_token="<|cls|>", unk_token="a", eos_token="<|endoftext|>"
    )
    theirs.model_max_length = 77
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_tokenizer(tmp_path / "theirs")
    for folder in ("once", "twice"):
        read.save(tmp_path / folder)
        again = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert (again.bos_token, again.unk_token) == ("<|cls|>", "a")
        assert again.eos_token == "<|endoftext|>"
        assert (again.pad_token, again.sep_token) == ("<|pad|>", None)
        assert again.model_max_length == 77
        chat = [{"role": "user", "content": "cat"}]
        assert again.apply_chat_template(chat, tokenize=False) == "cat"
        assert read_tokenizer(tmp_path / folder) == read
        read = read_tokenizer(tmp_path / folder)


def test_a_folder_called_bytes_holds_what_it_holds(tmp_path, bpe):
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "bytes").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "bytes" / "tokenizer.json")
    for read in (read_tokenizer(tmp_path / "bytes"), load_tokenizer(f"{tmp_path}/bytes", "")):
        assert np.array_equal(read.encode("the cat"), bpe.encode("the cat"))
        read.save(tmp_path / "saved")
        assert read_tokenizer(tmp_path / "saved") == read


def test_gpt2_files_under_a_data_folder(tmp_path):
    write_gpt2(tmp_path / "tokenizers" / "gpt2")
    gpt2 = load_tokenizer("gpt2", "", tmp_path)
    assert gpt2.encode("hello he").tolist() == [8, 4, 5]
    assert gpt2.decode([8, 4, 5, 9]) == "hello he"
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.sep_id, gpt2.pad_id) == (10, 9, 9, 9)
    assert gpt2.mask_id is None
    assert gpt2.cls_id is None


def test_bert_lowercases_and_has_its_special_tokens(tmp_path, monkeypatch):
    write_wordpiece(tmp_path / "bert-base-uncased")
    monkeypatch.setenv(sources.ENVIRONMENT, str(tmp_path))
    bert = load_tokenizer("bert-base-uncased", "")
    assert bert.encode("Hello WORLD!").tolist() == [5, 6, 7, 8]
    assert bert.encode("unknown").tolist() == [1]
    ids = (bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id, bert.eos_id)
    assert ids == (0, 2, 3, 4, None)
    cased = load_tokenizer(str(write_wordpiece(tmp_path / "cased", [*WORDPIECES, "Hello"])), "")
    assert cased.encode("Hello hello").tolist() == [9, 5]


def test_a_tokenizer_json_is_read_without_its_padding_and_truncation(tmp_path, bpe):
    bpe.backend.enable_truncation(3)
    bpe.backend.enable_padding(length=5)
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    bpe.backend.no_truncation()
    bpe.backend.no_padding()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert np.array_equal(load_tokenizer(str(path), "").encode(TEXT), bpe.encode(TEXT))


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:x", "bpe:-5", "bpe:259", "bpe:1e3", "bpe:³", f"bpe:{10**20}"]
)
def test_a_bad_bpe_size_is_refused(spec):
    assert "bpe:N with N from 260 to" in fails(spec)


def test_unusable_files_are_refused_in_one_line(tmp_path):
    assert "unknown tokenizer 'nope'" in fails("nope")
    assert "expected one of tokenizer.json" in fails(str(tmp_path))
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version":')
    assert f"{broken}: not a usable tokenizer" in fails(str(broken))
    assert "no [UNK]" in fails(str(write_wordpiece(tmp_path / "other", ["a", "b"])))
    lonely = write_gpt2(tmp_path / "lonely")
    (lonely / "merges.txt").unlink()
    assert "not a usable tokenizer" in fails(str(lonely))
    (lonely / "tokenizer_config.json").write_text("{")
    assert "vocab.json" in fails(str(lonely))
    with pytest.raises(InputError, match="holds no saved tokenizer"):
        read_tokenizer(tmp_path / "missing")
    assert "does not exist" in fails("gpt2", tmp_path / "nowhere")


def test_without_files_or_network_it_says_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*_):
        raise OSError("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources.socket, "getaddrinfo", no_network)
    message = fails("gpt2", tmp_path)
    assert "huggingface.co cannot be reached" in message
    assert f"put tokenizers/gpt2/ with vocab.json and merges.txt under {tmp_path}" in message
    assert "$LAYER_TYING_DATA" in fails("bert-base-uncased")


def test_from_the_hub_when_it_is_reachable(bpe, monkeypatch):
    asked = []

    def from_pretrained(repository):
        asked.append(repository)
        return bpe.backend

    hub = SimpleNamespace(Tokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr("layer_tying.data.tokenizer.tokenizers", hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no look at the network: the stand-in answers
    loaded = load_tokenizer("gpt2", "")
    assert asked == ["openai-community/gpt2"]
    assert np.array_equal(loaded.encode(TEXT), bpe.encode(TEXT))


@pytest.mark.skipif(not REAL, reason=f"{sources.ENVIRONMENT} is not set")
def test_published_vocabularies():
    gpt2 = load_tokenizer("gpt2", "", REAL)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.decode(gpt2.encode("naïve\n\n  text ")) == "naïve\n\n  text "
    bert = load_tokenizer("bert-base-uncased", "", REAL)
    assert bert.encode("hello world").tolist() == [7592, 2088]
    assert bert.encode("Hello World").tolist() == [7592, 2088]
    assert bert.vocab_size == 30522
    ids = (bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id)
    assert ids == (0, 101, 102, 103)
