"""Tokenizers: bytes, byte-level BPE learned here, and the published GPT-2 and BERT vocabularies.

Facts:
- `bytes` needs no file: ids 0..255 are the bytes of UTF-8, then eos (also sep) 256, pad 257,
  mask 258, cls 259; 260 ids in all.
- GPT-2 (Radford et al. 2019): byte-level BPE, 50,257 ids, of which 50256 is <|endoftext|>.
- BERT uncased (Devlin et al. 2019): lower-casing WordPiece, 30,522 ids.
- A saved tokenizer is two files that `transformers.AutoTokenizer` reads as well.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from layer_tying.data.sources import (
    data_folder,
    expanded,
    first_existing,
    from_hub,
    place,
    read_text,
)
from layer_tying.errors import InputError

BYTES = "bytes"
FOLDER = "tokenizer"  # where a run folder keeps its own
PUBLISHED = {  # name -> (repository on the hub, the files to look for in a local folder)
    "gpt2": ("openai-community/gpt2", "vocab.json and merges.txt"),
    "bert-base-uncased": ("google-bert/bert-base-uncased", "vocab.txt"),
}
OWN_SPECIAL = {
    "eos": "<|endoftext|>",
    "pad": "<|pad|>",
    "mask": "<|mask|>",
    "cls": "<|cls|>",
}
SPECIAL = {  # the names under which published vocabularies hold their special tokens
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "cls": ("<|cls|>", "[CLS]"),
    "sep": ("[SEP]",),
}
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
KEPT = (  # of the configuration of a tokenizer that is saved again, for others who load it
    *("bos_token", "unk_token", "pad_token", "sep_token", "additional_special_tokens"),
    *("extra_special_tokens", "chat_template", "model_max_length", "padding_side"),
    *("truncation_side", "clean_up_tokenization_spaces", "model_input_names"),
)
PIECE = 1 << 16
# A cut here changes no token: every pre-tokenizer starts a new word at a lone space, and, unless a
# space is put before what is encoded, after a lone line end.
AT_SPACE = re.compile(r"(?<=\S) (?=\S)")
AT_SPACE_OR_LINE_END = re.compile(r"(?<=\S) (?=\S)|(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; every id is below `vocab_size`.

    Special ids are None where the vocabulary has none, except that sep and pad fall back on eos
    (GPT-2 has no other); padding is always masked as well, so the two are never confused.
    `config` is what its folder says, of which `save` keeps what others need.
    """

    name: str
    vocab_size: int
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [N]: no special token is added, and none is read out of it."""
        if self.name == BYTES:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        parts = [np.zeros(0, np.int32)]
        batch: list[str] = []
        gives_space = self._begins_texts_with_a_space()
        cut = AT_SPACE if gives_space else AT_SPACE_OR_LINE_END
        for number, piece in enumerate(pieces(text, cut=cut)):
            batch.append(piece[1:] if gives_space and number else piece)
            if len(batch) == 64:  # enough to keep every core busy, little enough to hold
                parts.append(self._encode_batch(batch))
                batch = []
        parts.append(self._encode_batch(batch))
        return np.concatenate(parts)

    def _encode_batch(self, batch: list[str]) -> np.ndarray:
        encodings = self.backend.encode_batch_fast(batch, add_special_tokens=False)
        return np.array([i for encoding in encodings for i in encoding.ids], np.int32)

    def _begins_texts_with_a_space(self) -> bool:
        """Whether a space is put before what is encoded, as by the tokenizers of Llama 2."""
        both, one, other = self._encode_batch(["a b"]), ["a"], ["b"]
        return bool(
            np.array_equal(both, self._encode_batch(one + other))
            and not np.array_equal(both, self._encode_batch([*one, " b"]))
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`: no special tokens, and U+FFFD for bytes that are not UTF-8."""
        if self.name == BYTES:
            array = np.asarray(ids, np.int64)
            return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens that there are."""
        ids = (self.eos_id, self.pad_id, self.mask_id, self.cls_id, self.sep_id)
        return frozenset(i for i in ids if i is not None)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that encoding depends on; part of the key of cached tokens."""
        return hashlib.sha256(f"{self.name}\n{self.backend.to_str()}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `read_tokenizer` reads back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "layer_tying_name": self.name,
            **{name: self.config[name] for name in KEPT if name in self.config},
        }
        for role in SPECIAL:
            token_id = getattr(self, f"{role}_id")
            if self.config and role in ("pad", "sep") and token_id == self.eos_id:
                continue  # a fallback of ours, or kept from the configuration
            token = None if token_id is None else self.backend.id_to_token(token_id)
            if token is not None:
                config[f"{role}_token"] = token
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(spec: str, train_text: str, data_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    spec: `bytes`; `bpe:N`, byte-level BPE of N ids (the special ones included) learned on
    `train_text`; `gpt2` or `bert-base-uncased`, from `data_dir`/tokenizers/NAME, `data_dir`/NAME or
    the hub; else the path of a tokenizer.json, a vocab.txt, or a folder that holds one of those or
    vocab.json and merges.txt.

    Raises InputError where there is no such tokenizer or its files cannot be used.
    """
    if spec == BYTES:
        return _from_backend(BYTES, _byte_backend())
    if spec.startswith("bpe:"):
        return _learn_bpe(spec, train_text)
    if spec in PUBLISHED:
        return _published(spec, data_folder(data_dir))
    path = expanded(spec)
    if path.exists():
        return _from_path(path, name=path.name)
    raise InputError(
        f"unknown tokenizer {spec!r}: not {BYTES}, bpe:N, {', '.join(PUBLISHED)}, "
        "nor a file or folder that exists"
    )


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`; InputError if there is none."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no saved tokenizer (no tokenizer.json)")
    name = _config(path.parent).get("layer_tying_name", path.parent.name)
    return _from_path(path, str(name))


def pieces(
    text: str, size: int = PIECE, cut: re.Pattern[str] = AT_SPACE_OR_LINE_END
) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters, between two words or lines."""
    start = 0
    while len(text) - start > size and (found := cut.search(text, start + size)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _byte_level(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE without a merge: the same ids as the bytes, in a form others can load."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's table: a printable byte stands for itself, the others take characters from 256 on.
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = _byte_level(tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])))
    backend.add_special_tokens(list(OWN_SPECIAL.values()))
    return backend


LARGEST = 10_000_000  # vocabulary


def _learn_bpe(spec: str, train_text: str) -> Tokenizer:
    size, least = spec.removeprefix("bpe:"), 256 + len(OWN_SPECIAL)
    if not (size.isascii() and size.isdigit() and least <= int(size) <= LARGEST):
        raise InputError(
            f"tokenizer {spec!r}: expected bpe:N with N from {least} to {LARGEST:,}, as bpe:4096"
        )
    backend = _byte_level(tokenizers.Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        min_frequency=2,
        special_tokens=list(OWN_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces(train_text), trainer)
    return _from_backend(spec, backend)


def _published(name: str, folder: Path | None) -> Tokenizer:
    repository, files = PUBLISHED[name]
    local = first_existing(folder, f"tokenizers/{name}", name)
    if local:
        return _from_path(local, name)
    backend = from_hub(
        f"tokenizer {name!r}",
        place(folder, f"tokenizers/{name}/ with {files}"),
        lambda: tokenizers.Tokenizer.from_pretrained(repository),
    )
    return _from_backend(name, backend)


def _from_path(path: Path, name: str) -> Tokenizer:
    folder = path if path.is_dir() else path.parent
    candidates = ("tokenizer.json", "vocab.json", "vocab.txt")
    file = first_existing(path, *candidates) if path.is_dir() else path
    if file is None:
        raise InputError(f"{path}: no tokenizer there; expected one of {', '.join(candidates)}")
    try:
        if file.name == "vocab.json":
            model = models.BPE.from_file(str(file), str(folder / "merges.txt"))
            backend = _byte_level(tokenizers.Tokenizer(model))
        elif file.suffix == ".txt":
            backend = _wordpiece(file, _config(folder))
        else:
            backend = tokenizers.Tokenizer.from_file(str(file))
    except InputError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exceptions
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a usable tokenizer ({reason})") from error
    config = _config(folder)
    if name == BYTES and config.get("layer_tying_name") != BYTES:
        name = f"./{name}"  # a folder of that name, which holds another tokenizer
    return _from_backend(name, backend, config)


def _wordpiece(file: Path, config: dict) -> tokenizers.Tokenizer:
    words = read_text(file).removesuffix("\n").split("\n")
    vocab = {word: i for i, word in enumerate(words)}
    if "[UNK]" not in vocab:
        raise InputError(f"{file}: not a WordPiece vocabulary (no [UNK] in it), one piece a line")
    capitals = any(word != word.lower() for word in words if not word.startswith("["))
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", not capitals))
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _from_backend(
    name: str, backend: tokenizers.Tokenizer, config: Mapping[str, Any] = MappingProxyType({})
) -> Tokenizer:
    """Wrap a loaded tokenizer; its special tokens are those `config` names, else the usual ones."""
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "[MASK]" in a text is text, as it is among bytes
    ids: dict[str, int | None] = {}
    for role, usual in SPECIAL.items():
        named = config.get(f"{role}_token")
        if isinstance(named, dict):  # how transformers writes a token with its options
            named = named.get("content")
        candidates = [named, *usual] if isinstance(named, str) else usual
        present = [token for token in candidates if backend.token_to_id(token) is not None]
        ids[role] = backend.token_to_id(present[0]) if present else None
        backend.add_special_tokens(present[:1])
    return Tokenizer(
        name=name,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=ids["eos"],
        pad_id=ids["eos"] if ids["pad"] is None else ids["pad"],
        mask_id=ids["mask"],
        cls_id=ids["cls"],
        sep_id=ids["eos"] if ids["sep"] is None else ids["sep"],
        backend=backend,
        config=config,
    )


def _config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder, with its chat template; empty if there is none."""
    file, template = folder / CONFIG, folder / TEMPLATE
    if not file.is_file():
        return {}
    try:
        config = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object")
    return {"chat_template": read_text(template), **config} if template.is_file() else config
