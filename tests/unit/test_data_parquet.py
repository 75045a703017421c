"""Parquet files in the layout of dataset hubs, and the `datasets` library."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepipe.data import fingerprint, hub, load
from sparsepipe.data.images import decode, decoder_for
from sparsepipe.data.options import TableOptions
from sparsepipe.data.parquet import _read
from sparsepipe.data.table import Columns, labelled_images
from sparsepipe.errors import DataError, MissingExtraError

Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 6, 7, 3), np.uint8)
LABELS = np.arange(24) % 3
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CLASSES = {"class_names": "ant, bee,cow"}
FEATURES = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def table(
    part: slice,
    *,
    image: str = "image",
    label: str = "label",
    images: Any = None,
    labels: Any = None,
    metadata: dict[str, str] | None = None,
    **more: Any,
) -> Any:
    columns = {
        image: pa.array(images or [{"bytes": png(pixels), "path": None} for pixels in PIXELS[part]], IMAGE_TYPE),
        label: labels or pa.array(LABELS[part], pa.int64()),
        **more,
    }
    return pa.table(columns).replace_schema_metadata(CLASSES if metadata is None else metadata)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=5)


def folder(root: Path, train: Any, test: Any = None) -> str:
    write(root / "train.parquet", train)
    if test is not None:
        write(root / "test.parquet", test)
    return f"parquet:{root}"


def check(name: str, options: dict[str, Any] | None = None, classes: tuple[str, ...] = ("ant", "bee", "cow")) -> None:
    dataset = load(name, options)
    assert dataset.classes == classes
    assert dataset.input_shape == (3, 6, 7)
    np.testing.assert_array_equal(dataset.train.load(np.arange(18)), PIXELS[:18])
    np.testing.assert_array_equal(dataset.test.load(np.arange(6)), PIXELS[18:])
    assert dataset.train.labels.tolist() == LABELS[:18].tolist()
    assert dataset.test.labels.tolist() == LABELS[18:].tolist()
    np.testing.assert_allclose(dataset.preprocessing.std, PIXELS[:18].std((0, 1, 2)) / 255)


@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label"])
def test_usual_column_names(tmp_path: Path, image: str, label: str) -> None:
    check(folder(tmp_path, *(table(part, image=image, label=label) for part in (slice(18), slice(18, 24)))))


def test_other_column_names(tmp_path: Path) -> None:
    parts = [
        table(part, image="photo", label="kind", label_2=LABELS[part], thumbnail=[b""] * len(LABELS[part]))
        for part in (slice(18), slice(18, 24))
    ]
    check(folder(tmp_path, *parts), {"image_column": "photo", "label_column": "kind"})


def test_shards_in_the_data_folder(tmp_path: Path) -> None:
    for number, part in enumerate([slice(0, 7), slice(7, 7), slice(7, 18)]):
        write(tmp_path / "data" / f"train-0000{number}-of-00003.parquet", table(part))
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", table(slice(18, 24)))
    (tmp_path / "README.md").write_text("a dataset")
    check(f"parquet:{tmp_path}")


def test_names_of_the_splits(tmp_path: Path) -> None:
    for name, part in (("train", slice(3, 9)), ("part_a", slice(18)), ("part_b", slice(18, 24)), ("test", slice(6))):
        write(tmp_path / f"{name}.parquet", table(part))
    check(f"parquet:{tmp_path}", {"train_split": "part_a", "test_split": "part_b"})


def test_class_names(tmp_path: Path) -> None:
    parts = (slice(18), slice(18, 24))
    check(folder(tmp_path / "a", *(table(part, metadata={"huggingface": json.dumps(FEATURES)}) for part in parts)))
    numbers = ("0", "1", "2")
    check(folder(tmp_path / "b", *(table(part, metadata={}) for part in parts)), classes=numbers)
    check(folder(tmp_path / "c", *(table(part, metadata={"huggingface": "{"}) for part in parts)), classes=numbers)


def test_images_as_plain_bytes(tmp_path: Path) -> None:
    def plain(part: slice) -> Any:
        return table(part, image="other", image_2=[png(pixels) for pixels in PIXELS[part]]).drop_columns("other")

    check(folder(tmp_path, plain(slice(18)), plain(slice(18, 24))))


def test_without_a_test_split_a_fifth_is_held_out(tmp_path: Path) -> None:
    dataset = load(folder(tmp_path, table(slice(15))))
    assert (len(dataset.train), len(dataset.test)) == (12, 3)
    assert dataset.test.labels.tolist() in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])


BROKEN = [{"bytes": png(pixels), "path": "x.png"} for pixels in PIXELS[:18]]
BROKEN[11] = {"bytes": b"\x89PNG damaged", "path": "x.png"}
NULL: list[dict[str, Any]] = [{"bytes": png(pixels), "path": None} for pixels in PIXELS[:18]]
NULL[4] = {"bytes": None, "path": "/etc/hostname"}


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (
            table(slice(18), image="photo", more=[b""] * 18, kind=LABELS[:18]),
            {},
            "no column called image or img.*kind: int64.*option image_column",
        ),
        (table(slice(18), label="kind"), {}, "no column called label, labels or fine_label.*option label_column"),
        (table(slice(18)), {"image_column": "photo"}, "no column 'photo'.*image: struct.*option image_column"),
        (table(slice(18)), {"image_column": "label"}, "'label' is of type int64; images are"),
        (table(slice(18)), {"label_column": "image"}, "'image' is of type struct.*; labels are integers"),
        (table(slice(18), labels=[str(label) for label in LABELS[:18]]), {}, "'label' is of type string"),
        (table(slice(18), labels=[None, *LABELS[1:18]]), {}, "column 'label': The label in row 0 is missing"),
        (table(slice(18), images=BROKEN), {}, r"train\.parquet, row 11: The image cannot be decoded"),
        (table(slice(18), images=NULL), {}, r"train\.parquet, row 4: The image is missing"),
        (table(slice(18), metadata={"class_names": "ant,bee"}), {}, r"train\.parquet, row 2: The label 2 is outside"),
        (table(slice(0)), {}, "training split holds no samples"),
        (table(slice(18)), {"train_split": "training"}, r"no file training\*\.parquet.*Found are: train\.parquet"),
        (table(slice(18)), {"test_split": "val"}, r"no file val\*\.parquet"),
    ],
)
def test_bad_tables(tmp_path: Path, train: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path, train), options)


def test_splits_that_do_not_match(tmp_path: Path) -> None:
    other = table(slice(18, 24), metadata={"class_names": "ant,bee,cow,dog"})
    with pytest.raises(DataError, match=r"test\.parquet: The class names \(4: ant, bee, cow, dog\) differ .*\(3: ant"):
        load(folder(tmp_path / "names", table(slice(18)), other))
    with pytest.raises(DataError, match=r"test\.parquet: There is no column 'image'"):
        load(folder(tmp_path / "columns", table(slice(18)), table(slice(18, 24), image="img")))
    train, test = table(slice(18), metadata={}), table(slice(18, 24), metadata={}, labels=[0, 1, 2, 3, 0, 1])
    with pytest.raises(DataError, match=r"test\.parquet, row 3: The label 3 .* has 3 classes"):
        load(folder(tmp_path / "count", train, test))
    sized = table(slice(18, 24), images=[{"bytes": png(PIXELS[0, :5])}] * 6)
    with pytest.raises(DataError, match=r"test\.parquet, row 0: .* 7 x 5 pixels, but the first one is 7 x 6"):
        load(folder(tmp_path / "size", table(slice(18)), sized))
    dataset = load(folder(tmp_path / "size", table(slice(18)), sized), {"size": 5})
    assert dataset.input_shape == (3, 5, 5)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(f"parquet:{tmp_path}/absent")
    with pytest.raises(DataError, match=r"no file train\*\.parquet\. The layout is"):
        load(f"parquet:{tmp_path}")
    name = folder(tmp_path, table(slice(18)))
    path = tmp_path / "train.parquet"
    before = fingerprint(name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train\.parquet: The Parquet file cannot be read"):
        load(name)
    assert fingerprint(name) != before


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = folder(tmp_path, table(slice(18)))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match="pyarrow"):
        load(name)


def test_rows_of_the_real_dataset(shared_data: Path) -> None:
    """A few rows of the real file, decoded with Pillow alone."""
    path = shared_data / "cifar10-jpeg" / "test.parquet"
    columns = Columns("img", "label")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    source = labelled_images(_read([path], columns, names), columns)
    assert len(source.images) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    rows = np.array([0, 5_000, 9_999])
    decoded = decode(source.images, rows, decoder_for(source.images, TableOptions()))
    content = pq.read_table(path)
    for row, image in zip(rows.tolist(), decoded, strict=True):
        expected = Image.open(io.BytesIO(content["img"][row].as_py()["bytes"]))
        np.testing.assert_array_equal(image, np.asarray(expected.convert("RGB")))
        assert source.images.name(row).endswith(f"test.parquet, row {row}")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `datasets` library, keeping its cache in the test's folder and never using the network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.usefixtures("library")
def test_the_datasets_library(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {
        "image": {"_type": "Image"}, "label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"},
    }}})}  # fmt: skip
    root = tmp_path / "mine"
    folder(root, table(slice(18), metadata=metadata), table(slice(18, 24), metadata=metadata))
    check(f"hf:{root}")
    with pytest.raises(DataError, match=r"no split 'exam'.*The splits are: train, test"):
        load(f"hf:{root}", {"test_split": "exam"})
    with pytest.raises(DataError, match=r"cannot be loaded: .*nowhere"):
        load(f"hf:{root}", {"config": "nowhere"})
    before = fingerprint(f"hf:{root}")
    write(root / "test.parquet", table(slice(18, 23), metadata=metadata))
    assert fingerprint(f"hf:{root}") != before


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'x/y' on the Hub"), "hf:x/y: .*Couldn't reach.*The hub cannot be reached"),
        (FileNotFoundError("Dataset 'x/y' doesn't exist"), "doesn't exist.*Check the name"),
        (ValueError("Config name is missing.\nPick one"), "Config name is missing.*option"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, library: Any, error: Exception, message: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(library, "load_dataset", fail)
    with pytest.raises(DataError, match=message):
        load("hf:x/y")
    assert hub.HUB.identity("x/y", None) == ["x/y"]  # type: ignore[arg-type]
