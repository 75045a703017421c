"""Image folders, and decoding."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepipe.data import ArraySplit, fingerprint, hold_out, load
from sparsepipe.data import encoded as encoded_module
from sparsepipe.data.encoded import EncodedSplit
from sparsepipe.data.images import Decoder, decode
from sparsepipe.errors import DataError, RecipeError

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)


def colours(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def greys(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width), np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels))
    return pixels


def fill(root: Path, classes: tuple[str, ...] = ("ant", "bee"), count: int = 3) -> np.ndarray:
    """Class folders with `count` images each; returns their pixels in the order of the classes."""
    return np.stack([write(root / name / f"{i}.png", colours()) for name in classes for i in range(count)])


def everything(split: Any) -> Any:
    return split.load(np.arange(len(split)))


def test_train_and_test_folders(tmp_path: Path) -> None:
    train, test = fill(tmp_path / "train"), fill(tmp_path / "val", count=2)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    dataset = load(f"imagefolder:{tmp_path}")
    assert dataset.classes == ("ant", "bee")
    assert dataset.input_shape == (3, 8, 8)
    np.testing.assert_array_equal(everything(dataset.train), train)
    np.testing.assert_array_equal(everything(dataset.test), test)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(dataset.preprocessing.mean, train.mean((0, 1, 2)) / 255)


def test_one_folder_is_divided(tmp_path: Path) -> None:
    pixels = fill(tmp_path, count=10)
    dataset = load(f"imagefolder:{tmp_path}", {"test_fraction": 0.3})
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    found = {image.tobytes() for split in (dataset.train, dataset.test) for image in everything(split)}
    assert found == {image.tobytes() for image in pixels}
    np.testing.assert_array_equal(
        everything(dataset.test), everything(load(f"imagefolder:{tmp_path}", {"test_fraction": 0.3}).test)
    )


def test_a_test_folder_without_classes_is_passed_over(tmp_path: Path) -> None:
    fill(tmp_path / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(b"unlabelled")
    validation = fill(tmp_path / "val")
    np.testing.assert_array_equal(everything(load(f"imagefolder:{tmp_path}").test), validation)


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing")])
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    pixels, others = fill(tmp_path / train), fill(tmp_path / test, count=2)
    dataset = load(f"imagefolder:{tmp_path}")
    assert dataset.classes == ("ant", "bee")  # and not the names of the splits
    np.testing.assert_array_equal(everything(dataset.train), pixels)
    np.testing.assert_array_equal(everything(dataset.test), others)


def test_a_folder_of_images_called_train_is_a_class(tmp_path: Path) -> None:
    fill(tmp_path, ("car", "train"))
    assert load(f"imagefolder:{tmp_path}").classes == ("car", "train")
    write(tmp_path / "test" / "unlabelled.png", colours())
    with pytest.raises(DataError, match="train: The folder holds no class folders"):
        load(f"imagefolder:{tmp_path}")


def test_hidden_folders_hold_no_samples(tmp_path: Path) -> None:
    pixels = fill(tmp_path / "train")
    fill(tmp_path / "test")
    write(tmp_path / "train" / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png", pixels[0])
    np.testing.assert_array_equal(everything(load(f"imagefolder:{tmp_path}").train), pixels)


def test_size_crops_the_centre(tmp_path: Path) -> None:
    wide = write(tmp_path / "train" / "ant" / "wide.png", colours(8, 16))
    high = write(tmp_path / "train" / "bee" / "high.png", colours(20, 8))
    double = write(tmp_path / "test" / "ant" / "big.png", np.repeat(np.repeat(colours(2, 2), 8, 0), 8, 1))
    write(tmp_path / "test" / "bee" / "same.png", colours())
    dataset = load(f"imagefolder:{tmp_path}", {"size": 8})
    train = everything(dataset.train)
    np.testing.assert_array_equal(train[0], wide[:, 4:12])
    np.testing.assert_array_equal(train[1], high[6:14])
    shrunk = dataset.test.load(np.array([0]))[0]
    np.testing.assert_array_equal(shrunk[[0, 0, -1, -1], [0, -1, 0, -1]], double[[0, 0, -1, -1], [0, -1, 0, -1]])


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    pixels = [write(tmp_path / name / f"{i}.png", greys()) for name in ("a", "b") for i in range(5)]
    dataset = load(f"imagefolder:{tmp_path}")
    assert dataset.input_shape == (1, 8, 8)
    assert everything(dataset.train).shape == (8, 8, 8, 1)
    assert load(f"imagefolder:{tmp_path}", {"channels": 3}).input_shape == (3, 8, 8)
    expected = {image.tobytes() for image in pixels}
    assert {image.tobytes() for image in everything(dataset.train)} <= expected


def test_some_grey_images_among_colour_ones_are_converted(tmp_path: Path) -> None:
    grey = write(tmp_path / "train" / "a" / "0.png", greys())
    write(tmp_path / "train" / "b" / "0.png", colours())
    fill(tmp_path / "test", ("a", "b"))
    train = everything(load(f"imagefolder:{tmp_path}").train)
    np.testing.assert_array_equal(train[0], np.repeat(grey[..., None], 3, 2))


def test_images_are_decoded_on_demand_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = fill(tmp_path / "train", count=5)
    fill(tmp_path / "test")
    eager = load(f"imagefolder:{tmp_path}")
    monkeypatch.setattr(encoded_module, "LAZY_ABOVE_BYTES", 8 * 8 * 3 * 10 - 1)
    lazy = load(f"imagefolder:{tmp_path}")
    assert isinstance(eager.train, ArraySplit)
    assert isinstance(lazy.train, EncodedSplit)
    assert isinstance(lazy.test, ArraySplit)
    assert lazy.preprocessing == eager.preprocessing
    np.testing.assert_array_equal(lazy.train.load(np.array([7, 2])), train[[7, 2]])
    rest, held = hold_out(lazy.train, 0.4, 3)
    expected_rest, expected_held = hold_out(eager.train, 0.4, 3)
    np.testing.assert_array_equal(everything(rest), everything(expected_rest))
    np.testing.assert_array_equal(everything(held), everything(expected_held))
    (tmp_path / "train" / "bee" / "4.png").unlink()
    with pytest.raises(DataError, match=r"bee/4\.png: The image cannot be read: No such file"):
        lazy.train.load(np.array([9]))


class Stored:
    """Encoded images in a list."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"image {index}"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_photos_stand_upright(tmp_path: Path, kind: str) -> None:
    """EXIF orientation 6: the first row of what is stored is the right side of the picture."""
    stored, upright = colours(6, 8), colours(8, 6)
    note = Image.Exif()
    note[0x0112] = 6
    for name in ("ant", "bee"):
        for split in ("train", "test"):
            write(tmp_path / split / name / "0.png", upright)
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(stored).save(tmp_path / "train" / "ant" / f"1.{kind.lower()}", kind, exif=note, **options)
    turned = everything(load(f"imagefolder:{tmp_path}").train)[1]
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))
    # Also where the first image, whose size is that of all, is such a photo.
    (tmp_path / "train" / "ant" / "0.png").unlink()
    assert load(f"imagefolder:{tmp_path}").input_shape == (3, 8, 6)


def test_photos_stand_upright_where_the_decoder_skips_detail(tmp_path: Path) -> None:
    black_to_white = np.repeat(np.array([0, 255], np.uint8), 64)[None, :].repeat(64, 0)
    note = Image.Exif()
    note[0x0112] = 6
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    Image.fromarray(black_to_white).save(tmp_path / "train" / "ant" / "0.jpg", exif=note)
    (tmp_path / "train" / "ant" / "0.png").unlink()
    first = everything(load(f"imagefolder:{tmp_path}", {"size": 16, "channels": 1}).train)[0]
    assert first[:7].max() < 10
    assert first[9:].min() > 245


def test_notes_of_a_camera_that_are_damaged_do_not_matter(tmp_path: Path) -> None:
    pixels = fill(tmp_path / "train", count=1)
    fill(tmp_path / "test", count=1)
    Image.fromarray(pixels[0]).save(tmp_path / "train" / "ant" / "0.png", exif=b"Exif\0\0no TIFF header")
    np.testing.assert_array_equal(everything(load(f"imagefolder:{tmp_path}").train), pixels)


def test_threads_keep_the_order_and_name_the_first_bad_image() -> None:
    pixels = np.stack([np.full((96, 96, 3), value, np.uint8) for value in range(200)])
    stored = Stored([encode(image) for image in pixels])
    order = np.random.default_rng(1).permutation(200)
    done: list[int] = []
    decoder = Decoder((96, 96, 3), crop=False, grey_only=False)
    np.testing.assert_array_equal(decode(stored, order, decoder, done.append), pixels[order])
    assert sum(done) == 200
    stored.images[150] = stored.images[20] = b"damaged"
    with pytest.raises(DataError, match="image 20: The image cannot be decoded"):
        decode(stored, np.arange(200), decoder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is not one of JPEG, PNG"),
        (b"not an image", "it is not one of JPEG, PNG"),
        (encode(colours())[:-30], "cannot be decoded"),
        (encode(colours(64, 64), "JPEG")[:700], "truncated"),
        (encode(colours(8, 9)), "9 x 8 pixels, but the first one is 8 x 8.*size=PIXELS"),
        (encode(greys().astype(np.uint16) << 8), "more than 8 bits"),
        # Encapsulated PostScript: Pillow would start Ghostscript for it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "it is not one of JPEG, PNG"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "other size", "16 bits", "EPS"],
)
def test_bad_images_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    fill(tmp_path)
    if "truncated" in message:
        for path in tmp_path.rglob("*.png"):
            path.write_bytes(encode(colours(64, 64)))
    (tmp_path / "bee" / "7.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"bee/7\.png: .*{message}"):
        load(f"imagefolder:{tmp_path}")


def test_colour_among_many_grey_images_must_be_chosen(tmp_path: Path) -> None:
    for number in range(130):
        write(tmp_path / "ab"[number % 2] / f"{number:03}.png", greys(2, 2))
    write(tmp_path / "a" / "002.png", colours(2, 2))
    with pytest.raises(DataError, match=r"a/002\.png: This image is in colour.*channels=3"):
        load(f"imagefolder:{tmp_path}")
    assert load(f"imagefolder:{tmp_path}", {"channels": 1}).input_shape == (1, 2, 2)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(f"imagefolder:{tmp_path}/absent")
    with pytest.raises(DataError, match="holds no class folders"):
        load(f"imagefolder:{tmp_path}")
    fill(tmp_path / "train", ("ant",))
    with pytest.raises(DataError, match="only one class"):
        load(f"imagefolder:{tmp_path}")
    fill(tmp_path / "train", ("ant", "bee"))
    fill(tmp_path / "test", ("ant", "cow"))
    with pytest.raises(DataError, match="2 classes and the test split 2; not in both: bee, cow"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"train/dog: The class folder holds no images"):
        load(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="a file, not a folder"):
        load(f"imagefolder:{tmp_path}/train/ant/0.png")


def test_options_are_checked(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(RecipeError, match="'channels' = 2"):
        load(f"imagefolder:{tmp_path}", {"channels": 2})
    with pytest.raises(RecipeError, match="'size' = 0"):
        load(f"imagefolder:{tmp_path}", {"size": 0})


def test_fingerprint_follows_the_images(tmp_path: Path) -> None:
    fill(tmp_path)
    before = fingerprint(f"imagefolder:{tmp_path}")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    assert fingerprint(f"imagefolder:{tmp_path}") == before
    assert fingerprint(f"imagefolder:{tmp_path}", {"size": 8}) != before
    os.utime(tmp_path / "ant" / "0.png", ns=(5, 5))
    assert fingerprint(f"imagefolder:{tmp_path}") != before
