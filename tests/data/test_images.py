"""Images: every published form written small here, and every way a file can be wrong."""

import io
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layer_tying.data import sources
from layer_tying.data.cifar import SUBSET
from layer_tying.data.images import IMAGE_SETS, ImageBatches, load_images
from layer_tying.errors import InputError

REAL = os.environ.get(sources.ENVIRONMENT)
RNG = np.random.default_rng(0)
NAMES = ("x_train", "y_train", "x_validation", "y_validation", "x_test", "y_test")


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv(sources.ENVIRONMENT, raising=False)


def pixels(count: int) -> np.ndarray:
    return RNG.integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8)


def write_subset(folder: Path, **changes) -> Path:
    file = folder / SUBSET
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "x_train": pixels(30),
        "y_train": np.arange(30, dtype=np.uint8) % 10,
        "x_test": pixels(10),
        "y_test": np.arange(10, dtype=np.uint8),
        "classes": np.array(["a", "b"]),
    }
    np.savez_compressed(file, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return file


def write_binary(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    """The published binary version; the same images in each of its six files."""
    planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    records = np.concatenate([y[:, None].astype(np.uint8), planes], axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_jpeg(folder: Path, sizes=((32, 32),) * 20, **changes) -> None:
    packed = []
    for size in sizes:
        file = io.BytesIO()
        Image.new("RGB", size, (200, 30, 60)).save(file, "JPEG")
        packed.append(file.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(packed), np.uint8),
        "offsets": np.cumsum([0, *map(len, packed)]),
        "labels": np.arange(len(sizes), dtype=np.uint8) % 10,
        "is_test": (np.arange(len(sizes)) >= 15).astype(np.uint8),
        "classes": np.array(["a", "b"]),
    }
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "cifar10" / "cifar10_jpeg_all.npz", **{**arrays, **changes})


def fails(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_images(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_need_no_file():
    digits = load_images("digits")
    sizes = [len(digits.x_train), len(digits.x_validation), len(digits.x_test)]
    assert sum(sizes) == 1797
    assert sizes[1] == sizes[0] // 9
    assert digits.x_train.shape[1:] == (8, 8, 1)
    assert (digits.x_train.dtype, digits.y_train.dtype) == (np.uint8, np.int64)
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 255)
    assert digits.classes == tuple("0123456789")
    for labels in (digits.y_train, digits.y_validation, digits.y_test):
        assert set(labels) == set(range(10))
    again = load_images("digits")
    assert all(np.array_equal(getattr(digits, n), getattr(again, n)) for n in NAMES)


def test_digits_are_those_of_scikit_learn_each_in_one_split():
    from sklearn.datasets import load_digits

    digits = load_images("digits")
    x = np.concatenate([digits.x_train, digits.x_validation, digits.x_test]) / 255 * 16
    rows = np.round(x.reshape(-1, 64)).astype(int)
    y = np.concatenate([digits.y_train, digits.y_validation, digits.y_test])
    original, labels = load_digits(return_X_y=True)
    ours = sorted(tuple(row) for row in np.column_stack([rows, y]))
    assert ours == sorted(tuple(row) for row in np.column_stack([original, labels]).astype(int))


def test_cifar_subset(tmp_path, monkeypatch):
    x = np.zeros((30, 32, 32, 3), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None, None]
    write_subset(tmp_path, x_train=x)
    monkeypatch.setenv(sources.ENVIRONMENT, str(tmp_path))
    images = load_images("cifar10")
    assert (len(images.x_train), len(images.x_validation), len(images.x_test)) == (27, 3, 10)
    numbers = np.concatenate([images.x_train, images.x_validation])[:, 0, 0, 0]
    assert sorted(numbers) == list(range(30))  # disjoint, and nothing lost
    labels = np.concatenate([images.y_train, images.y_validation])
    assert np.array_equal(labels, numbers % 10)  # images keep their labels
    assert images.y_test.tolist() == list(range(10))
    assert images.classes[6] == "frog"


def test_cifar_binary_version_comes_first(tmp_path):
    write_subset(tmp_path)
    x, y = pixels(4), np.array([3, 1, 4, 9])
    write_binary(tmp_path / "cifar-10-batches-bin", x, y)
    images = load_images("cifar10", tmp_path)
    assert np.array_equal(images.x_test, x)
    assert images.y_test.tolist() == [3, 1, 4, 9]
    assert len(images.x_train) + len(images.x_validation) == 20


def test_cifar_binary_files_that_are_wrong(tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    write_binary(folder, pixels(2), np.array([3, 10]))
    assert "image 1 has label 10" in fails("cifar10", tmp_path)
    write_binary(folder, pixels(2), np.array([3, 4]))
    whole = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(whole[:-1])
    assert "data_batch_3.bin: truncated" in fails("cifar10", tmp_path)
    (folder / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin: cannot be read" in fails("cifar10", tmp_path)


def test_cifar_jpeg_archive(tmp_path):
    write_jpeg(tmp_path)
    images = load_images("cifar10-jpeg", tmp_path)
    assert (len(images.x_train), len(images.x_validation), len(images.x_test)) == (14, 1, 5)
    assert np.abs(images.x_test.astype(int) - [200, 30, 60]).max() < 6  # lossy
    assert images.y_test.tolist() == [5, 6, 7, 8, 9]


def test_cifar_jpeg_archives_that_are_wrong(tmp_path):
    assert "put cifar10/cifar10_jpeg_all.npz under" in fails("cifar10-jpeg", tmp_path)
    write_jpeg(tmp_path, sizes=((32, 32), (31, 32)))
    assert "image 1: shape (32, 31, 3)" in fails("cifar10-jpeg", tmp_path)
    write_jpeg(tmp_path, labels=np.full(20, 11))
    assert "label 11" in fails("cifar10-jpeg", tmp_path)
    write_jpeg(tmp_path, labels=np.arange(3))
    assert "do not fit each other" in fails("cifar10-jpeg", tmp_path)
    write_jpeg(tmp_path, offsets=np.arange(21) * 10**6)
    assert "do not fit each other" in fails("cifar10-jpeg", tmp_path)
    write_jpeg(tmp_path, offsets=np.arange(21))
    assert "image 0: cannot be decoded" in fails("cifar10-jpeg", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((30, 28, 28, 3), np.uint8)}, "images of shape (30, 28, 28, 3)"),
        ({"x_train": np.zeros((30, 3, 32, 32), np.uint8)}, "images of shape (30, 3, 32, 32)"),
        ({"x_train": np.zeros((30, 32, 32, 3))}, "float64"),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, "images of shape (0, 32, 32, 3)"),
        ({"y_train": np.zeros(29, np.uint8)}, "labels of shape (29,)"),
        ({"y_train": np.zeros(30)}, "float64, for 30 images"),
        ({"y_train": np.array([0, 1, 12] * 10)}, "image 2 has label 12"),
        ({"y_test": np.array([-1] * 10)}, "image 0 has label -1"),
        ({"y_test": None}, "y_test"),
        ({"x_train": np.array([object()])}, "truncated or not an .npz file"),
    ],
)
def test_a_wrong_subset_gets_one_line(tmp_path, changes, message):
    file = write_subset(tmp_path, **changes)
    error = fails("cifar10", tmp_path)
    assert message in error
    assert str(file) in error


def test_a_damaged_npz_gets_one_line(tmp_path):
    file = write_subset(tmp_path)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    loose = io.BytesIO()
    np.save(loose, np.zeros(3))
    for content in (b"", b"junk", whole[:-9], whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(content)
        assert f"{file}: truncated or not an .npz" in fails("cifar10", tmp_path)
    file.write_bytes(loose.getvalue())
    assert f"{file}: truncated or not an .npz" in fails("cifar10", tmp_path)


def test_nothing_is_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": 1}))
    message = fails("cifar10", tmp_path)
    assert "pickled files are not read" in message
    assert "cifar-10-batches-bin" in message


def test_without_files_or_network_it_says_what_to_put_where(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources.socket, "getaddrinfo", refuse)
    message = fails("cifar10", tmp_path)
    assert f"put cifar-10-batches-bin/ (the published binary version) or {SUBSET}" in message
    message = fails("mnist")
    assert all(name in message for name in IMAGE_SETS)


def test_from_the_hub_when_it_is_reachable(monkeypatch):
    def load_dataset(path, *, split):
        assert path == "uoft-cs/cifar10"
        count = {"train": 20, "test": 5}[split]
        return {"img": [Image.fromarray(x) for x in pixels(count)], "label": [7] * count}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no look at the network: the stand-in answers
    images = load_images("cifar10")
    assert (len(images.x_train), len(images.x_validation), len(images.x_test)) == (18, 2, 5)


@pytest.mark.parametrize(("dataset", "module"), [("digits", "sklearn.datasets"), ("jpeg", "PIL")])
def test_an_optional_package_that_is_missing(tmp_path, monkeypatch, dataset, module):
    write_jpeg(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    name = "digits" if dataset == "digits" else "cifar10-jpeg"
    assert "pip install 'dynamic-layer-tying[data]'" in fails(name, tmp_path)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 9), before=st.integers(0, 20))
def test_batches_keep_labels_and_resume(count, batch_size, before):
    y = np.arange(count)
    x = np.zeros((count, 2, 2, 1), np.uint8) + y[:, None, None, None].astype(np.uint8)
    whole = ImageBatches(x, y, batch_size, seed=5)
    for _ in range(before):
        images, labels = next(whole)
        assert images.shape == (batch_size, 2, 2, 1)
        assert np.array_equal(images[:, 0, 0, 0], labels)
    resumed = ImageBatches(x, y, batch_size, seed=5)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for _ in range(5):
        assert np.array_equal(next(whole)[1], next(resumed)[1])


def test_no_images_no_batches():
    with pytest.raises(InputError, match="no example"):
        ImageBatches(pixels(0), np.zeros(0, np.int64), 4, 0)


@pytest.mark.skipif(not REAL, reason=f"{sources.ENVIRONMENT} is not set")
def test_published_images():
    subset = load_images("cifar10", REAL)
    assert (len(subset.x_train), len(subset.x_validation), len(subset.x_test)) == (3600, 400, 1000)
    order = np.random.default_rng(0).permutation(4000)  # undo the shuffling
    labels = np.empty(4000, np.int64)
    labels[order] = np.concatenate([subset.y_validation, subset.y_train])
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason=f"{sources.ENVIRONMENT} is not set")
def test_published_jpeg_images():
    images = load_images("cifar10-jpeg", REAL)
    assert (len(images.x_train), len(images.x_validation), len(images.x_test)) == (
        45_000,
        5_000,
        10_000,
    )
    assert np.bincount(images.y_test).tolist() == [1000] * 10
