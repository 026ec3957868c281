"""Labelled images of one's own: a folder of classes, IDX files, or an .npz file of arrays.

All images of a data set are square, of one size, and grey or RGB; where some are grey and some RGB,
all become RGB. How large they may be is the model's matter (see `models/families.py`).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from layer_tying.data.sources import read_arrays
from layer_tying.errors import InputError

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, C] and int64 [N]
Parts = tuple[Labelled, Labelled | None, tuple[str, ...]]  # training, test, names of the classes
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"}
SUFFIXES |= {".ppm", ".pgm"}
GREY = {"1", "L"}  # the modes of Pillow that have one channel of at most 8 bits
WIDE = ("I", "F")  # how its modes of more bits begin
TEST_FOLDERS = ("test", "val", "validation", "valid")
PARTS = {"train", "training", "testing", *TEST_FOLDERS}  # no class is called so
IDX_TESTS = ("t10k", "test")


def own_images(path: Path) -> Parts:
    """Training part, test part (None where there is none) and names of the classes.

    - A file NAME.npz holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``: uint8 [N, H, W] or
      [N, H, W, C], and integers from 0.
    - A folder with ``train-images*`` holds IDX files, as MNIST does; ``.gz`` is unpacked.
    - Any other folder holds a folder of images for each class, or such folders in ``train`` and
      ``test`` (or ``val``).

    Raises:
        InputError: if it is neither, or something in it cannot be used.
    """
    if path.is_file():
        return _npz(path)
    if any(path.glob("train-images*")):
        return _idx(path)
    return _class_folders(path)


def images_as_array(images: Iterable[tuple[str, Any]]) -> np.ndarray:
    """Pillow's images as uint8 [N, H, W, C].

    Args:
        images: each with the name that an error calls it by.

    Raises:
        InputError: if there is none, or they cannot be read, differ in size or are not square.
    """
    arrays: list[np.ndarray] = []
    first = ""
    for where, image in images:
        array = _pixels(where, image)
        if not arrays:
            first = where
            check_square(where, array.shape)
        elif array.shape[:2] != arrays[0].shape[:2]:
            raise InputError(
                f"{where} has {_size(array.shape)} pixels, {first} has {_size(arrays[0].shape)}: "
                f"resize them to one size"
            )
        arrays.append(array)
    if not arrays:
        raise InputError("there is no image")
    if len({array.shape[2] for array in arrays}) > 1:
        arrays = [np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays]
    return np.stack(arrays)


def open_image(where: str, source: Any) -> Any:
    """Pillow's image of a file or a binary stream.

    Raises:
        InputError: if Pillow is not installed, or cannot read it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            f"{where}: pillow is not installed (pip install 'dynamic-layer-tying[data]')"
        ) from error
    try:
        image = Image.open(source)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: cannot be decoded ({reason})") from error
    return image


def check_square(where: str, shape: tuple[int, ...]) -> None:
    """Raise an InputError if images of shape [..., H, W, C] are not square."""
    if shape[-3] != shape[-2]:
        raise InputError(f"{where}: {_size(shape[-3:])} pixels, expected a square; crop or pad it")


def check_labelled(where: str, x: np.ndarray, y: np.ndarray) -> Labelled:
    """Arrays of images and labels as they are used, or an InputError that says what is wrong."""
    if x.ndim == 3:
        x = x[..., None]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or not len(x):
        raise InputError(
            f"{where}: images of shape {x.shape}, {x.dtype}; expected (N, H, W), (N, H, W, 1) or "
            f"(N, H, W, 3), uint8"
        )
    check_square(where, x.shape)
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{where}: labels of shape {y.shape}, {y.dtype}, for {len(x)} images")
    if y.min() < 0:
        raise InputError(f"{where}: image {y.argmin()} has label {y.min()}, expected 0 or more")
    return x, y.astype(np.int64)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"  # width first, as image viewers have it


def _pixels(where: str, image: Any) -> np.ndarray:
    if image.mode.startswith(WIDE):
        raise InputError(f"{where}: more than 8 bits a pixel, convert it to 8")
    if image.has_transparency_data:  # what nobody sees has colours too: on white, as it is shown
        image = image.convert("RGBA")
        white = image.copy()
        white.paste((255, 255, 255, 255), (0, 0, *image.size))
        white.alpha_composite(image)
        image = white
    is_grey = image.mode in GREY
    array = np.asarray(image.convert("L" if is_grey else "RGB"))
    return array[..., None] if is_grey else array


def _class_folders(folder: Path) -> Parts:
    train = folder / "train"
    if not (train.is_dir() and any(each.is_dir() for each in train.iterdir())):
        classes = _class_names(folder)
        return _read_classes(folder, classes), None, classes
    classes = _class_names(train)
    test = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test is None:
        return _read_classes(train, classes), None, classes
    if extra := set(_class_names(test)) - set(classes):
        raise InputError(f"{test / min(extra)}: there is no such class in {train}")
    return _read_classes(train, classes), _read_classes(test, classes), classes


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(
        each.name
        for each in folder.iterdir()
        if each.is_dir() and not each.name.startswith((".", "__MACOSX"))
    )
    if {name.lower() for name in names} <= PARTS and len(names) > 1:
        raise InputError(
            f"{folder}: {' and '.join(names)} look like parts of the data, not like classes: name "
            f"the folders train and test"
        )
    if len(names) < 2:
        raise InputError(
            f"{folder}: expected a folder of images for each of two classes or more, found "
            f"{len(names)} folder(s)"
        )
    return tuple(names)


def _read_classes(folder: Path, classes: tuple[str, ...]) -> Labelled:
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        mine = sorted(
            file
            for file in (folder / name).rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not mine:
            raise InputError(f"{folder / name}: the class is empty, expected images in it")
        files += [(file, label) for file in mine]
    x = images_as_array((str(file), open_image(str(file), file)) for file, _ in files)
    return x, np.array([label for _, label in files], np.int64)


def _npz(file: Path) -> Parts:
    arrays = read_arrays(file, "x_train", "y_train", "x_test", "y_test")
    train, test = (
        check_labelled(f"{file} ({part})", arrays[f"x_{part}"], arrays[f"y_{part}"])
        for part in ("train", "test")
    )
    return train, test, _numbered(train, test)


def _idx(folder: Path) -> Parts:
    train = _idx_pair(folder, "train")
    test = next((name for name in IDX_TESTS if any(folder.glob(f"{name}-images*"))), None)
    if test is None:
        return train, None, _numbered(train)
    held_out = _idx_pair(folder, test)
    return train, held_out, _numbered(train, held_out)


def _numbered(*parts: Labelled) -> tuple[str, ...]:
    return tuple(str(label) for label in range(1 + max(int(y.max()) for _, y in parts)))


def _idx_pair(folder: Path, part: str) -> Labelled:
    files = [min(folder.glob(f"{part}-{kind}*"), default=None) for kind in ("images", "labels")]
    if files[0] is None or files[1] is None:
        raise InputError(
            f"{folder}: {part}-images and {part}-labels belong together, one is missing"
        )
    return check_labelled(f"{folder} ({part})", _read_idx(files[0]), _read_idx(files[1]))


def _read_idx(file: Path) -> np.ndarray:
    """An IDX file of bytes: 0 0 8 and the number of dimensions, their sizes, and the bytes."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InputError(f"{file}: not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], ">u4"))
    if len(shape) != data[3] or len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise InputError(
            f"{file}: truncated, {len(data)} bytes do not hold images of shape {shape}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
