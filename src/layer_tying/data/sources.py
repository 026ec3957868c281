"""What every loader does alike: find the data folder, read text strictly, ask the hub.

Local files come first, the hub second. Any failure is one `InputError` of one line.
"""

import os
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.lib.npyio import NpzFile

from layer_tying.errors import InputError

T = TypeVar("T")
ENVIRONMENT = "LAYER_TYING_DATA"


def data_folder(data_dir: str | Path | None) -> Path | None:
    """The folder of local data sets: `data_dir`, else $LAYER_TYING_DATA, else None.

    Raises InputError where the folder named does not exist.
    """
    named = data_dir or os.environ.get(ENVIRONMENT)
    if not named:
        return None
    folder = expanded(named)
    if not folder.is_dir():
        origin = "--data-dir" if data_dir else f"${ENVIRONMENT}"
        raise InputError(f"data folder {folder} ({origin}) does not exist: name a folder")
    return folder


def expanded(path: str | Path) -> Path:
    """A path with its ~ replaced; InputError if there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}") from None


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8, which half a character (a surrogate) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_existing(folder: Path | None, *names: str) -> Path | None:
    """The first of folder/name that exists, or None (also without a folder)."""
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).exists()), None)


def place(folder: Path | None, *names: str) -> str:
    """Words for an error: which files to put where."""
    where = str(folder) if folder else f"a folder that --data-dir or ${ENVIRONMENT} names"
    return f"put {' or '.join(names)} under {where}"


def read_text(path: Path) -> str:
    """As `read_exactly`, with line ends (LF, CRLF, CR, also mixed) all turned into LF."""
    return read_exactly(path).replace("\r\n", "\n").replace("\r", "\n")


def read_exactly(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark if it has one.

    Raises InputError, one line with the path, where the file is missing, unreadable, empty, binary
    (holds NUL bytes) or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if b"\0" in data:
        raise InputError(f"{path}: binary file (it holds NUL bytes), expected UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} in line {line}), convert it"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty, expected text")
    return text


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file; nothing is unpickled, and the checksums are checked.

    Raises InputError, one line with the path, where the file is missing or damaged, is something
    else, or lacks one of the arrays.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, NpzFile):
            raise ValueError("a single array")
        with arrays:
            return {name: arrays[name] for name in names}
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}; expected arrays {', '.join(names)}") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated or not an .npz file of arrays ({reason})") from error


def cache_folder() -> Path:
    """Where derived data are kept: $XDG_CACHE_HOME/layer-tying, usually ~/.cache/layer-tying."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "layer-tying"
    try:
        return Path.home() / ".cache" / "layer-tying"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "layer-tying"


def from_hub(what: str, instead: str, fetch: Callable[[], T]) -> T:
    """The result of `fetch`, which downloads from the Hugging Face hub.

    Every failure becomes one InputError that says what to do `instead` (see `place`): no network,
    no such data set, the optional packages not installed.
    """
    try:
        _check_network()
        return fetch()
    except ImportError as error:
        reason = f"{error.name} is not installed (pip install 'dynamic-layer-tying[data]')"
    except Exception as error:  # the hub's clients raise many unrelated kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    raise InputError(f"{what}: the hub failed ({reason}); {instead}")


def _check_network() -> None:
    """Fail at once where names do not resolve; the hub's client would retry for half a minute."""
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if proxied or os.environ.get("HF_HUB_OFFLINE"):  # offline: its own cache answers, or it fails
        return
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.getaddrinfo(name, int(port or 443))
    except OSError:
        raise ConnectionError(
            f"{name} cannot be reached; HF_HUB_OFFLINE=1 uses what its cache holds"
        ) from None
