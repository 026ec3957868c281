"""Data sets of the Hugging Face hub that a user names: ``hub:OWNER/NAME[/CONFIGURATION]``.

A data set with train, validation and test splits keeps them. Of any other the training split, or
the only one there is, is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layer_tying.data.own_images import Labelled, images_as_array
from layer_tying.data.sources import from_hub
from layer_tying.data.splits import Texts, as_lines, cut_text, texts_of
from layer_tying.errors import InputError

PREFIX = "hub:"
VALIDATION = ("validation", "valid", "dev")
STRINGS = ("string", "large_string", "string_view")  # the types of Arrow
HIDDEN = {-1, None}  # labels that are not published


def is_on_hub(dataset: str) -> bool:
    """Whether a name means a data set of the hub."""
    return dataset.startswith(PREFIX)


def hub_texts(dataset: str) -> Texts:
    """The texts of a data set of the hub: its column ``text``, else the only one of strings.

    Raises:
        InputError: if it cannot be had, or has no such column or no training split.
    """
    splits = _load(dataset)
    train = _training_split(dataset, splits)
    column = _text_column(dataset, train)
    validation = next((splits[name] for name in VALIDATION if name in splits), None)
    if validation is not None and "test" in splits:
        parts = (as_lines(part[column]) for part in (train, validation, splits["test"]))
        return texts_of(dataset, parts, f"column {column!r} of {dataset}")
    return cut_text(dataset, as_lines(train[column]), f"column {column!r} of {dataset}")


def hub_images(dataset: str) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
    """The labelled images of a data set of the hub: training and test part, names of the classes.

    The images are its only column of images, the labels its only column of class labels. Without a
    test split, the validation split is what is tested on.

    A split whose labels are not published, which the hub shows as -1, is not tested on.

    Raises:
        InputError: if it cannot be had, has no such columns or no training split, a label is no
            class, or its images differ in size.
    """
    splits = _load(dataset)
    train = _training_split(dataset, splits)
    image = _only_column(dataset, train, "Image")
    label = _only_column(dataset, train, "ClassLabel")
    classes = tuple(train.features[label].names)
    held_out = (splits[name] for name in ("test", *VALIDATION) if name in splits)
    test = next((part for part in held_out if set(part[label]) - HIDDEN), None)

    def labelled(part: Any) -> Labelled:
        for i, each in enumerate(part[label]):
            if each not in range(len(classes)):
                raise InputError(f"{dataset}, image {i}: its label {each} is none of the classes")
        named = ((f"{dataset}, image {i}", each) for i, each in enumerate(part[image]))
        return images_as_array(named), np.array(part[label], np.int64)

    return labelled(train), None if test is None else labelled(test), classes


def _load(dataset: str) -> Mapping[str, Any]:
    parts = dataset.removeprefix(PREFIX).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(
            f"data set {dataset!r}: expected {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME/CONFIGURATION"
        )

    def fetch() -> Mapping[Any, Any]:
        import datasets

        return dict(
            datasets.load_dataset("/".join(parts[:2]), name=parts[2] if parts[2:] else None)
        )

    return from_hub(f"data set {dataset!r}", "name a local file or folder", fetch)


def _training_split(dataset: str, splits: Mapping[str, Any]) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise InputError(f"data set {dataset!r} has no split 'train', only {', '.join(splits)}")


def _text_column(dataset: str, rows: Any) -> str:
    names = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in STRINGS
    ]
    if "text" in names:
        return "text"
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"data set {dataset!r} has no column 'text', nor exactly one of strings: its columns are "
        f"{', '.join(rows.features)}"
    )


def _only_column(dataset: str, rows: Any, kind: str) -> str:
    names = [name for name, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"data set {dataset!r} needs exactly one column of type {kind}: its columns are "
        f"{', '.join(rows.features)}"
    )
