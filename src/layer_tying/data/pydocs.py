"""`pydocs`, the text that every CPython carries: its language reference and its docstrings.

Facts:
- Documents are the topics of `pydoc_data` (the language reference) and, for each module of the
  standard library, its docstrings; read from source with `ast`, nothing is imported or run.
- The reference repeats whole sections under several topics. A paragraph is kept where it stands
  first and dropped everywhere else, so no paragraph of one split occurs in another.
- The same CPython gives the same text everywhere, another version another: `Texts.sha256` tells.
"""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from layer_tying.data.splits import Texts, texts_of
from layer_tying.errors import InputError

# Tests, what users installed, and three packages that parse slowly and document next to nothing.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED |= {"encodings", "lib2to3", "pydoc_data"}


def pydocs_texts() -> Texts:
    """The three splits."""
    source = "language reference and standard library docstrings of this Python"
    return texts_of("pydocs", split_documents(python_documents()), source)


def python_documents() -> dict[str, str]:
    """Name -> text of every document, each paragraph kept only where it stands first.

    Raises InputError where this Python came without its documentation (some embedded builds).
    """
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in [*_topics(), *_modules(Path(sysconfig.get_paths()["stdlib"]))]:
        fresh = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.rstrip())
        if fresh:
            documents[name] = "\n\n".join(fresh) + "\n\n"
    if not documents:
        raise InputError("pydocs: this Python carries no documentation; name a text file instead")
    return documents


def split_documents(documents: dict[str, str], share: float = 0.05) -> tuple[str, str, str]:
    """Train, validation and test text; the latter two hold about `share` of the characters each.

    Each document lies in one split whole. Topics and modules are dealt out separately, in the order
    of the hash of their names, so that the three splits have the same mix.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for kind in ("topic", "module"):
        names = [name for name in documents if name.startswith(f"{kind} ")]
        size = share * sum(len(documents[name]) for name in names)
        room = [0.0, size, size]
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
            text = documents[name]
            split = next((i for i in (2, 1) if len(text) <= room[i]), 0)
            room[split] -= len(text)
            parts[split].append(text)
    train, validation, test = ("".join(part) for part in parts)
    return train, validation, test


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic {name}", topics[name]


def _modules(library: Path) -> Iterator[tuple[str, str]]:
    for file in _sources(library):
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):  # unreadable, or another version's syntax
            continue
        text = "\n\n".join(_docstrings(tree))
        if text:  # a lone surrogate in a docstring has no UTF-8
            name = file.relative_to(library).as_posix()
            yield f"module {name}", text.encode("utf-8", "ignore").decode()


def _sources(library: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=Path.as_posix)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in the order of the source; only bodies are searched, expressions hold none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, block, ())
        for child in children if isinstance(children, list) else ():  # a lambda's body is none
            yield from _docstrings(child)
