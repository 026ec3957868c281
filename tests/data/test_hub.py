"""Data sets of the hub by name, with a stand-in for the hub."""

import datasets
import numpy as np
import pytest
from PIL import Image

from layer_tying.data.images import load_images
from layer_tying.data.texts import load_texts
from layer_tying.errors import InputError

ROWS = [f"row {i} of the text" for i in range(100)]


@pytest.fixture
def hub(monkeypatch):
    """What the hub holds, by path and configuration."""
    held: dict[tuple[str, str | None], dict[str, datasets.Dataset]] = {}

    def load_dataset(path, name=None):
        if (path, name) not in held:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return datasets.DatasetDict(held[path, name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no look at the network: the stand-in answers
    return held


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def images(count: int, **columns) -> datasets.Dataset:
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    pictures = [Image.fromarray(np.full((8, 8), 100 * (i % 2), np.uint8)) for i in range(count)]
    values = {"picture": pictures, "kind": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(values, features=features)


def fails(load, name: str) -> str:
    with pytest.raises(InputError) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_that_comes_in_three_splits(hub):
    hub["me/mine", None] = {
        "train": rows(text=["a", "b\n"], author=["x", "y"]),
        "validation": rows(text=["c"], author=["x"]),
        "test": rows(text=["d"], author=["x"]),
    }
    texts = load_texts("hub:me/mine")
    assert (texts.train, texts.validation, texts.test) == ("a\nb\n", "c\n", "d\n")
    assert (texts.name, texts.words) == ("hub:me/mine", False)


def test_a_column_of_large_strings_is_one_of_strings(hub):
    features = {"text": datasets.Value("large_string"), "id": datasets.Value("string")}
    columns = {"text": ROWS, "id": ["x"] * len(ROWS)}
    hub["me/mine", None] = {
        "train": datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    }
    assert "column 'text'" in load_texts("hub:me/mine").source


def test_a_text_that_is_cut_and_has_a_configuration(hub):
    hub["me/mine", "large"] = {"train": rows(story=ROWS, number=list(range(100)))}
    texts = load_texts("hub:me/mine/large")
    assert texts.train + texts.validation + texts.test == "".join(f"{row}\n" for row in ROWS)
    assert texts.source == "column 'story' of hub:me/mine/large, cut 90/5/5 in order"


@pytest.mark.parametrize("load", [load_texts, load_images])
@pytest.mark.parametrize("name", ["hub:mine", "hub:", "hub:a/b/c/d", "hub:/b"])
def test_names_that_are_none(load, name):
    assert "expected hub:OWNER/NAME or hub:OWNER/NAME/CONFIGURATION" in fails(load, name)


def test_what_the_hub_does_not_have(hub):
    message = fails(load_texts, "hub:me/mine")
    assert "data set 'hub:me/mine': the hub failed (Dataset 'me/mine' doesn't exist" in message
    assert message.endswith("name a local file or folder")


def test_columns_and_splits_that_do_not_tell(hub):
    hub["a/b", None] = {"train": rows(one=["x"], two=["y"])}
    assert "no column 'text', nor exactly one of strings: its columns are one, two" in fails(
        load_texts, "hub:a/b"
    )
    assert "needs exactly one column of type Image" in fails(load_images, "hub:a/b")
    hub["a/b", None] = {"one": rows(text=["x"]), "two": rows(text=["y"])}
    assert "has no split 'train', only one, two" in fails(load_texts, "hub:a/b")


@pytest.mark.parametrize(("test", "sizes"), [("test", (36, 4, 6)), ("validation", (36, 4, 6))])
def test_images_with_a_test_split(hub, test, sizes):
    hub["a/b", None] = {"train": images(40), test: images(6)}
    found = load_images("hub:a/b")
    assert (len(found.x_train), len(found.x_validation), len(found.x_test)) == sizes
    assert found.classes == ("cat", "dog")
    assert found.x_train.shape[1:] == (8, 8, 1)
    assert np.array_equal(found.x_test[:, 0, 0, 0], 100 * found.y_test)


def test_images_whose_test_labels_are_not_published(hub):
    hidden = images(6).map(lambda row: row | {"kind": -1})
    hub["a/b", None] = {"train": images(40), "test": hidden, "validation": images(4)}
    assert len(load_images("hub:a/b").x_test) == 4
    hub["a/b", None] = {"train": images(40), "test": hidden}
    found = load_images("hub:a/b")  # a part of the training split takes its place
    assert (len(found.x_test), found.y_test.min()) == (4, 0)
    hub["a/b", None] = {"train": hidden}
    assert fails(load_images, "hub:a/b") == "hub:a/b, image 0: its label -1 is none of the classes"


def test_images_that_are_cut(hub):
    hub["a/b", None] = {"train": images(40)}
    found = load_images("hub:a/b")
    assert (len(found.x_train), len(found.x_validation), len(found.x_test)) == (34, 2, 4)
