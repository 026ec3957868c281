"""Writing files whole or not at all. Standard library only, for every part of the package."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file such that no reader ever sees a part of it.

    It is written under a temporary name in the same folder, synced to disk and renamed. Several
    processes may write the same path at once; one of them wins. Missing folders are made.

    Args:
        path: the file's final name.
        write: called with the open binary file.

    Raises:
        OSError: if it cannot be written (a full disk, say); what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # unlike mkstemp, readable for whom the umask allows
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def set_usual_mode(path: Path) -> None:
    """Make a file readable for whom the umask allows; safetensors writes for its owner only."""
    sample = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    sample.touch()
    path.chmod(sample.stat().st_mode)
    sample.unlink()


def write_text_whole(path: Path, text: str) -> None:
    """Write a text as UTF-8, as ``write_whole`` does; line ends stay as they are."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))
