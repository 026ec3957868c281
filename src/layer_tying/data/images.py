"""Labelled images: one record a data set, and where else images come from.

Facts:
- `digits` (scikit-learn's, which need no file): 1,797 grey images of 8x8 pixels in ten classes;
  0..16 there, scaled to 0..255 here.
- `cifar10` and `cifar10-jpeg`: see `cifar.py`.
- Any other name is a data set of the hub (`hub:OWNER/NAME`), or the path of a folder or .npz file
  (see `own_images.py`).
- Validation is a seeded tenth of the training part; the test part is only ever tested on.

To add a set of images, add its record to `IMAGE_SETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layer_tying.data import cifar
from layer_tying.data.batches import ShuffledBatches
from layer_tying.data.hub import hub_images, is_on_hub
from layer_tying.data.own_images import Labelled, Parts, own_images
from layer_tying.data.sources import data_folder, expanded
from layer_tying.errors import InputError


@dataclass(frozen=True)
class Images:
    """Three disjoint splits: images uint8 [N, H, W, C], labels int64 [N] that index `classes`."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ImageSet:
    """A set of images by name.

    Attributes:
        load: its training and test part, from the data folder if there is one.
        classes: what its labels mean.
    """

    load: Callable[[Path | None], tuple[Labelled, Labelled]]
    classes: tuple[str, ...]


class ImageBatches(ShuffledBatches[Labelled]):
    """Training batches: (images uint8 [batch_size, H, W, C], labels int64 [batch_size])."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, seed: int):
        self.x, self.y = x, y
        super().__init__(len(x), batch_size, seed)

    def examples(self, indices: np.ndarray) -> Labelled:
        """The images with these indices, and their labels."""
        return self.x[indices], self.y[indices]


def load_images(dataset: str, data_dir: str | Path | None = None) -> Images:
    """The images of a data set.

    Args:
        dataset: a name in `IMAGE_SETS`, `hub:OWNER/NAME`, or the path of a folder or .npz file.
        data_dir: the folder of local data sets; by default what $LAYER_TYING_DATA names.

    Raises:
        InputError: for an unknown name (listing the known), files that are damaged or hold
            something else, images that differ in size or are not square, a class with too few
            images, and where the hub cannot be reached (saying which files to put where).
    """
    if dataset in IMAGE_SETS:
        record = IMAGE_SETS[dataset]
        return _images(dataset, *record.load(data_folder(data_dir)), record.classes)
    if is_on_hub(dataset):
        return _own_images(dataset, hub_images(dataset))
    path = expanded(dataset)
    if dataset and path.exists():
        return _own_images(path.name, own_images(path))
    raise InputError(
        f"unknown image data set {dataset!r}: not one of {', '.join(IMAGE_SETS)}, not "
        "hub:OWNER/NAME, nor a folder or .npz file that exists"
    )


def _images(name: str, train: Labelled, test: Labelled, classes: tuple[str, ...]) -> Images:
    """A seeded tenth of the training part validates."""
    x, y = train
    held, kept = np.split(np.random.default_rng(0).permutation(len(x)), [len(x) // 10])
    return Images(name, x[kept], y[kept], x[held], y[held], *test, classes)


def _own_images(name: str, parts: Parts) -> Images:
    """As `_images`, but a tenth of each class is held out, one image at least."""
    (x, y), test, classes = parts
    _check_classes(name, y, classes, least=2 if test else 3)
    if test is None:
        held, kept = _tenth_of_each_class(y, seed=1)
        test, (x, y) = (x[held], y[held]), (x[kept], y[kept])
    if test[0].shape[1:] != x.shape[1:]:
        raise InputError(
            f"{name}: images to train on have the shape {x.shape[1:]} (height, width, channels), "
            f"those to test on {test[0].shape[1:]}; make them alike"
        )
    held, kept = _tenth_of_each_class(y, seed=0)
    return Images(name, x[kept], y[kept], x[held], y[held], *test, classes)


def _check_classes(name: str, y: np.ndarray, classes: tuple[str, ...], least: int) -> None:
    counts = np.bincount(y, minlength=len(classes))
    if len(classes) < 2:
        raise InputError(f"{name}: one class only, expected at least two")
    for label, count in zip(classes, counts.tolist(), strict=True):
        if count < least:
            splits = "train, validate and test" if least == 3 else "train and validate"
            raise InputError(
                f"{name}: class {label!r} has {count} image(s) to train on, expected at least "
                f"{least}: one each to {splits}"
            )


def _tenth_of_each_class(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled indices: a tenth of each class, one at least, and the others."""
    order = np.random.default_rng(seed).permutation(len(y))
    held = [order[y[order] == label] for label in np.unique(y)]
    held = [mine[: max(1, len(mine) // 10)] for mine in held]
    is_held = np.isin(order, np.concatenate(held))
    return order[is_held], order[~is_held]


def _digits(_: Path | None) -> tuple[Labelled, Labelled]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"digits: {error.name} is not installed (pip install 'dynamic-layer-tying[data]')"
        ) from error
    grey, y = load_digits(return_X_y=True)
    x = np.round(grey.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    y = y.astype(np.int64)
    order = np.random.default_rng(1).permutation(len(x))
    test, train = np.split(order, [len(x) // 10])
    return (x[train], y[train]), (x[test], y[test])


IMAGE_SETS: dict[str, ImageSet] = {
    "digits": ImageSet(_digits, tuple("0123456789")),
    "cifar10": ImageSet(cifar.load_cifar, cifar.CLASSES),
    "cifar10-jpeg": ImageSet(cifar.load_cifar_jpeg, cifar.CLASSES),
}
