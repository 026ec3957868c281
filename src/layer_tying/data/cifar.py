"""CIFAR-10 (Krizhevsky 2009): 32x32 RGB in ten classes, 50,000 to train and 10,000 to test.

Read from the published binary version, a lossless .npz subset, or the hub. The published Python
version is pickled, and nothing is unpickled here. `cifar10-jpeg` holds all 60,000 images,
compressed with loss; results are not comparable with published ones.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from layer_tying.data.own_images import Labelled, open_image
from layer_tying.data.sources import first_existing, from_hub, place, read_arrays
from layer_tying.errors import InputError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHAPE = (32, 32, 3)
BINARY_FOLDERS = ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin")
PICKLED_FOLDERS = ("cifar-10-batches-py", "cifar10/cifar-10-batches-py")
SUBSET = "cifar10/cifar10_subset.npz"
JPEG = "cifar10/cifar10_jpeg_all.npz"


def load_cifar(folder: Path | None) -> tuple[Labelled, Labelled]:
    """The published binary version if it is there, else the subset, else the hub."""
    binary = first_existing(folder, *BINARY_FOLDERS)
    if binary:
        batches = [_read_binary(binary / f"data_batch_{i}.bin") for i in range(1, 6)]
        x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return (x, y), _read_binary(binary / "test_batch.bin")
    subset = first_existing(folder, SUBSET)
    if subset:
        arrays = read_arrays(subset, "x_train", "y_train", "x_test", "y_test")
        return (
            _checked(f"{subset} (train)", arrays["x_train"], arrays["y_train"]),
            _checked(f"{subset} (test)", arrays["x_test"], arrays["y_test"]),
        )
    instead = place(folder, f"{BINARY_FOLDERS[0]}/ (the published binary version)", SUBSET)
    pickled = first_existing(folder, *PICKLED_FOLDERS)
    if pickled:
        raise InputError(f"{pickled}: pickled files are not read, they can run code; {instead}")
    return from_hub("data set 'cifar10'", instead, _fetch_cifar)


def load_cifar_jpeg(folder: Path | None) -> tuple[Labelled, Labelled]:
    """All images, compressed with loss, from one .npz file; InputError where it is not there."""
    file = first_existing(folder, JPEG)
    if file is None:
        raise InputError(f"data set 'cifar10-jpeg': no local file; {place(folder, JPEG)}")
    arrays = read_arrays(file, "jpeg", "offsets", "labels", "is_test")
    packed, offsets = arrays["jpeg"], arrays["offsets"]
    labels, is_test = arrays["labels"], arrays["is_test"].astype(bool)
    lengths = {len(offsets) - 1, len(labels), len(is_test)}
    whole = np.issubdtype(offsets.dtype, np.integer) and len(lengths) == 1
    if not whole or (np.diff(offsets) < 0).any() or offsets[-1] > len(packed):
        raise InputError(f"{file}: offsets, labels and is_test do not fit each other")
    x = np.empty((len(labels), *SHAPE), np.uint8)
    data = packed.tobytes()
    for i in range(len(labels)):
        x[i] = _decode(f"{file}, image {i}", data[offsets[i] : offsets[i + 1]])
    x, y = _checked(str(file), x, labels)
    return (x[~is_test], y[~is_test]), (x[is_test], y[is_test])


def _decode(where: str, data: bytes) -> np.ndarray:
    pixels = np.asarray(open_image(where, io.BytesIO(data)).convert("RGB"))
    if pixels.shape != SHAPE:
        raise InputError(f"{where}: shape {pixels.shape}, expected {SHAPE}")
    return pixels


def _read_binary(file: Path) -> Labelled:
    """Records of one label byte and 3,072 pixel bytes: all red, then all green, then all blue."""
    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    size = 1 + int(np.prod(SHAPE))
    if not len(data) or len(data) % size:
        raise InputError(f"{file}: truncated, {len(data)} bytes are no multiple of {size}")
    records = data.reshape(-1, size)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(str(file), np.ascontiguousarray(pixels), records[:, 0])


def _checked(where: str, x: np.ndarray, y: np.ndarray) -> Labelled:
    """CIFAR-10 images and labels, or an InputError that says what is wrong with them."""
    if x.dtype != np.uint8 or x.shape[1:] != SHAPE or not len(x):
        raise InputError(
            f"{where}: images of shape {x.shape}, {x.dtype}; expected (N, 32, 32, 3), uint8"
        )
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{where}: labels of shape {y.shape}, {y.dtype}, for {len(x)} images")
    wrong = np.flatnonzero((y < 0) | (y >= len(CLASSES)))
    if len(wrong):
        raise InputError(f"{where}: image {wrong[0]} has label {y[wrong[0]]}, expected 0 to 9")
    return x, y.astype(np.int64)


def _fetch_cifar() -> tuple[Labelled, Labelled]:
    import datasets

    def split(name: str) -> Labelled:
        rows = datasets.load_dataset("uoft-cs/cifar10", split=name)
        x = np.stack([np.asarray(image.convert("RGB")) for image in rows["img"]])
        return _checked(f"hub: uoft-cs/cifar10 ({name})", x, np.array(rows["label"]))

    return split("train"), split("test")
