"""Images of one's own: folders of classes, IDX files, .npz files, and all that can be wrong."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layer_tying.data.images import Images, load_images
from layer_tying.errors import InputError

RNG = np.random.default_rng(0)
SPLITS = ("train", "validation", "test")


def fails(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_images(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(size=(8, 8), mode: str = "RGB", value: int | None = None) -> Image.Image:
    channels = {"RGBA": (4,), "RGB": (3,), "L": ()}[mode]
    shape = (size[1], size[0], *channels)
    drawn = RNG.integers(0, 256, shape) if value is None else np.full(shape, value)
    return Image.fromarray(drawn.astype(np.uint8), mode)


def write_classes(folder: Path, count: int = 20, classes=("cat", "dog"), **options) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(value=100 * label, **options).save(folder / name / f"{i}.png")
    return folder


def write_npz(file: Path, **changes) -> Path:
    arrays = {
        "x_train": RNG.integers(0, 256, (30, 8, 8), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": RNG.integers(0, 256, (9, 8, 8), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    }
    np.savez(file, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return file


def write_idx(file: Path, array: np.ndarray, packed: bool = False) -> None:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data += array.astype(np.uint8).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        Path(f"{file}.gz").write_bytes(gzip.compress(data))
    else:
        file.write_bytes(data)


def write_mnist(folder: Path, packed: bool = False) -> Path:
    for part, count in (("train", 30), ("t10k", 6)):
        images = RNG.integers(0, 256, (count, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte", images, packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 3, packed)
    return folder


def sizes(images: Images) -> list[int]:
    return [len(getattr(images, f"x_{split}")) for split in SPLITS]


def test_a_folder_of_classes_is_split_by_a_fixed_share_of_each(tmp_path):
    images = load_images(str(write_classes(tmp_path / "pets")))
    assert (images.name, images.classes) == ("pets", ("cat", "dog"))
    assert sizes(images) == [34, 2, 4]
    for split in SPLITS:
        x, y = getattr(images, f"x_{split}"), getattr(images, f"y_{split}")
        assert x.shape[1:] == (8, 8, 3) and x.dtype == np.uint8
        assert np.array_equal(x[:, 0, 0, 0], 100 * y), "labels stay with their images"
        assert set(y) == {0, 1}, "each class is in each split"
    again = load_images(str(tmp_path / "pets"))
    assert np.array_equal(images.y_train, again.y_train)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_with_train_and_test_keeps_them(tmp_path, test):
    write_classes(tmp_path / "train", mode="L")
    write_classes(tmp_path / test, count=3, mode="L")
    images = load_images(str(tmp_path))
    assert sizes(images) == [36, 4, 6]
    assert images.x_train.shape[1:] == (8, 8, 1), "grey images stay grey"


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "test"), ("test", "val")])
def test_parts_under_other_names_are_not_classes(tmp_path, names):
    for name in names:
        write_classes(tmp_path / name)
    assert "look like parts of the data, not like classes" in fails(tmp_path)


def test_a_class_may_be_called_train_and_begin_with_a_line(tmp_path):
    classes = ("_other", "bus", "train")
    assert load_images(str(write_classes(tmp_path, classes=classes))).classes == classes


def test_pixels_that_nobody_sees_are_white(tmp_path):
    write_classes(tmp_path, mode="RGBA", count=20)
    for label, name in enumerate(("cat", "dog")):
        hidden = np.full((8, 8, 4), 100 * label, np.uint8)
        hidden[..., 3] = 0
        for file in (tmp_path / name).iterdir():
            Image.fromarray(hidden, "RGBA").save(file)
    assert (load_images(str(tmp_path)).x_train == 255).all()


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    write_classes(tmp_path)
    picture(mode="L", value=7).save(tmp_path / "cat" / "grey.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert load_images(str(tmp_path)).x_train.shape[1:] == (8, 8, 3)


def test_mixed_sizes(tmp_path):
    write_classes(tmp_path)
    picture(size=(9, 9)).save(tmp_path / "dog" / "x.png")
    message = fails(tmp_path)
    assert "dog/x.png has 9 x 9 pixels" in message
    assert "cat/0.png has 8 x 8: resize them to one size" in message


def test_images_that_are_not_square(tmp_path):
    write_classes(tmp_path, size=(8, 6))
    assert "cat/0.png: 8 x 6 pixels, expected a square" in fails(tmp_path)


def test_an_empty_class(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "ox").mkdir()
    assert "ox: the class is empty, expected images in it" in fails(tmp_path)


def test_a_class_with_one_image(tmp_path):
    write_classes(tmp_path)
    write_classes(tmp_path, count=1, classes=("ox",))
    message = fails(tmp_path)
    assert "class 'ox' has 1 image(s) to train on, expected at least 3" in message
    write_classes(tmp_path / "b" / "train")
    write_classes(tmp_path / "b" / "train", count=1, classes=("ox",))
    write_classes(tmp_path / "b" / "test", classes=("cat", "dog", "ox"))
    assert "expected at least 2: one each to train and validate" in fails(tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\n and then nothing"])
def test_an_image_that_cannot_be_read(tmp_path, content):
    write_classes(tmp_path)
    (tmp_path / "dog" / "bad.png").write_bytes(content)
    assert "dog/bad.png: cannot be decoded" in fails(tmp_path)


def test_images_of_more_than_eight_bits(tmp_path):
    write_classes(tmp_path)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "cat" / "wide.png")
    assert "wide.png: more than 8 bits a pixel, convert it to 8" in fails(tmp_path)


def test_a_folder_without_classes(tmp_path):
    picture().save(tmp_path / "one.png")
    assert "expected a folder of images for each of two classes or more" in fails(tmp_path)


def test_a_class_that_is_only_tested(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", classes=("cat", "ox"))
    assert "test/ox: there is no such class in" in fails(tmp_path)


def test_coloured_tests_of_grey_training(tmp_path):
    write_classes(tmp_path / "train", mode="L")
    write_classes(tmp_path / "test")
    assert "to train on have the shape (8, 8, 1)" in fails(tmp_path)


def test_pillow_is_missing(tmp_path, monkeypatch):
    write_classes(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "pillow is not installed (pip install" in fails(tmp_path)


def test_arrays_in_an_npz_file(tmp_path):
    images = load_images(str(write_npz(tmp_path / "mine.npz")))
    assert (images.name, images.classes) == ("mine.npz", ("0", "1", "2"))
    assert sizes(images) == [27, 3, 9]
    assert images.x_train.shape[1:] == (8, 8, 1)
    coloured = np.zeros((9, 8, 8, 3), np.uint8)
    changes = {"x_test": coloured, "x_train": np.zeros((30, 8, 8, 3), np.uint8)}
    images = load_images(str(write_npz(tmp_path / "mine.npz", **changes)))
    assert images.x_train.shape[1:] == (8, 8, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_train": np.zeros((30, 8, 8))}, "(train): images of shape (30, 8, 8, 1), float64"),
        ({"x_train": np.zeros((30, 8, 8, 2), np.uint8)}, "images of shape (30, 8, 8, 2)"),
        ({"x_test": np.zeros((9, 8, 6), np.uint8)}, "6 x 8 pixels, expected a square"),
        ({"y_train": np.zeros(30)}, "labels of shape (30,), float64, for 30 images"),
        ({"y_train": np.zeros(7, int)}, "labels of shape (7,), int64, for 30 images"),
        ({"y_test": np.arange(9) - 2}, "image 0 has label -2, expected 0 or more"),
        ({"y_test": np.arange(9)}, "class '3' has 0 image(s)"),
        ({"y_train": np.zeros(30, int), "y_test": np.zeros(9, int)}, "one class only"),
        ({"x_test": np.zeros((9, 4, 4), np.uint8)}, "those to test on (4, 4, 1)"),
    ],
)
def test_wrong_arrays(tmp_path, changes, message):
    assert message in fails(write_npz(tmp_path / "mine.npz", **changes))


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"junk")
    assert "not an .npz file" in fails(tmp_path / "x.bin")
    assert "unknown image data set" in fails(tmp_path / "nowhere")


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_as_those_of_mnist(tmp_path, packed):
    images = load_images(str(write_mnist(tmp_path / "mnist", packed)))
    assert sizes(images) == [27, 3, 6]
    assert images.x_train.shape[1:] == (28, 28, 1)
    assert images.y_test.tolist() == [0, 1, 2, 0, 1, 2]


def test_idx_files_that_are_wrong(tmp_path):
    write_mnist(tmp_path)
    images, labels = (
        tmp_path / f"train-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    assert f"{images}: truncated" in fails(tmp_path)
    images.write_bytes(b"junk and more junk")
    assert f"{images}: not an IDX file of unsigned bytes" in fails(tmp_path)
    images.write_bytes(whole)
    write_idx(labels, np.arange(29) % 3)
    assert "labels of shape (29,), uint8, for 30 images" in fails(tmp_path)
    labels.unlink()
    assert "train-images and train-labels belong together, one is missing" in fails(tmp_path)
    (tmp_path / "train-labels.gz").write_bytes(b"junk")
    assert "train-labels.gz: cannot be read" in fails(tmp_path)
