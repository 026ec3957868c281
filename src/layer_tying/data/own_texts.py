"""Text files of one's own: a file, or a folder of files."""

from __future__ import annotations

from pathlib import Path

from layer_tying.data.sources import read_text
from layer_tying.data.splits import Texts, cut_text, texts_of
from layer_tying.errors import InputError


def own_texts(path: Path) -> Texts:
    """The text of a file, cut 90/5/5, or of a folder.

    A folder's train, validation (valid, val, dev) and test files are its splits; without them, all
    its files in order are one text.

    Raises:
        InputError: if a file cannot be used, or the folder has some of these files or folders and
            not the others: a test part would be trained on.
    """
    if path.is_dir():
        return _folder_texts(path)
    return cut_text(path.name, read_text(path), path.name)


VALIDATION = ("validation", "valid", "val", "dev")
SPLITS = ("train", *VALIDATION, "test")


def _folder_texts(folder: Path) -> Texts:
    found = sorted(file for file in folder.rglob("*") if _is_visible(file, folder))
    files = [file for file in found if file.stat().st_size]
    if not files:
        raise InputError(f"{folder}: the folder holds no text, expected text files")
    named: dict[str, Path] = {}
    for file in (each for each in found if each.parent == folder):
        role = file.stem.split(".")[-1].lower()
        if role in SPLITS and role in named:
            raise InputError(f"{folder}: {named[role].name} and {file.name} are both its {role}")
        named[role] = file
    if "train" in named:
        validation = next((named[name] for name in VALIDATION if name in named), None)
        if not (validation and "test" in named):
            raise InputError(f"{folder}: has a train file, so it needs a valid and a test file too")
        files = [named["train"], validation, named["test"]]
        source = f"{', '.join(file.name for file in files)} of {folder.name}"
        return texts_of(folder.name, map(read_text, files), source)
    folders = {file.relative_to(folder).parts[0].lower() for file in files if file.parent != folder}
    for names in (named.keys(), folders):
        if len(parts := names & {*SPLITS}) > 1:
            raise InputError(
                f"{folder}: holds {' and '.join(sorted(parts))}, which would become one text: make "
                f"it three files, train.txt, valid.txt and test.txt"
            )
    text = "".join(text if text.endswith("\n") else text + "\n" for text in map(read_text, files))
    return cut_text(folder.name, text, f"{len(files)} file(s) of {folder.name}")


def _is_visible(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()
