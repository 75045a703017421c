"""`npz:FILE` and datasets made by a user's function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepipe.data import fingerprint, load
from sparsepipe.data.arrays import as_inputs
from sparsepipe.errors import DataError, RecipeError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 6, 5, 3), np.uint8)
FEATURES = RNG.normal(size=(20, 7)).astype(np.float32)
LABELS = np.arange(20) % 4


def save(folder: Path, **arrays: Any) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


def everything(split: Any) -> Any:
    return split.load(np.arange(len(split)))


@pytest.mark.parametrize(
    ("stored", "raw"),
    [
        (IMAGES, IMAGES),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES),
        (IMAGES[..., 0], IMAGES[..., :1]),
        (IMAGES[..., :1], IMAGES[..., :1]),
        (IMAGES[..., :2].transpose(0, 3, 1, 2), IMAGES[..., :2]),
        (FEATURES, FEATURES),
        (FEATURES.astype(np.float64), FEATURES),
        (IMAGES.reshape(20, -1), IMAGES.reshape(20, -1).astype(np.float32)),
    ],
    ids=["NHWC", "NCHW", "NHW", "NHW1", "N2HW", "NF", "NF64", "NF8"],
)
def test_layouts(tmp_path: Path, stored: Any, raw: Any) -> None:
    dataset = load(save(tmp_path, x=stored, y=LABELS, x_test=stored[:8], y_test=LABELS[:8].astype(np.uint8)))
    np.testing.assert_array_equal(everything(dataset.train), raw)
    np.testing.assert_array_equal(everything(dataset.test), raw[:8])
    assert everything(dataset.train).dtype == raw.dtype
    assert dataset.train.labels.tolist() == LABELS.tolist()
    assert dataset.test.labels.dtype == np.int64
    assert dataset.classes == ("0", "1", "2", "3")
    expected = raw.shape[1:] if raw.ndim == 2 else (raw.shape[3], *raw.shape[1:3])
    assert dataset.input_shape == expected
    assert dataset.preprocessing.scale == (1 / 255 if raw.ndim == 4 else 1.0)


def test_other_arrays_of_a_file_are_not_read(tmp_path: Path) -> None:
    name = save(tmp_path, x=FEATURES, y=LABELS, names=np.array(["ant", "bee"], object))
    np.testing.assert_array_equal(np.sort(load(name).train.labels), np.repeat([0, 1, 2, 3], 4))
    with pytest.raises(DataError, match="no array 'y'; there are: names, x"):
        load(save(tmp_path, x=FEATURES, names=np.array(["ant", "bee"], object)))


def test_keras_names_are_known(tmp_path: Path) -> None:
    name = save(tmp_path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS)
    assert len(load(name).train) == 20


def test_without_a_test_split_a_fixed_fifth_is_held_out(tmp_path: Path) -> None:
    name = save(tmp_path, x=FEATURES, y=LABELS)
    dataset = load(name)
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert sorted(dataset.test.labels.tolist()) == [0, 1, 2, 3]
    joined = np.concatenate([everything(dataset.train), everything(dataset.test)])
    assert {row.tobytes() for row in joined} == {row.tobytes() for row in FEATURES}
    np.testing.assert_array_equal(everything(dataset.test), everything(load(name).test))
    assert len(load(name, {"test_fraction": 0.4}).test) == 8
    np.testing.assert_allclose(dataset.preprocessing.mean, everything(dataset.train).mean(0, dtype=np.float64))


def bad(**changes: Any) -> dict[str, Any]:
    return {"x": FEATURES, "y": LABELS, **changes}


NAN = FEATURES.copy()
NAN[3, 2] = np.nan
HUGE = FEATURES.astype(np.float64)
HUGE[5, 0] = 1e300


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": FEATURES}, "no array 'y'; there are: x"),
        ({"a": FEATURES}, "no array 'x'; there are: a"),
        (bad(x_test=FEATURES), "no array 'y_test'"),
        (bad(y=LABELS[:19]), "x holds 20 samples, but y holds 19 labels"),
        (bad(x=NAN), "row 3, column 2 is nan"),
        (bad(x=HUGE), r"row 5, column 0 is 1e\+300"),
        (bad(x=IMAGES.astype(np.float32)), "Images are of type float32; they must be uint8"),
        (bad(x=FEATURES.astype(complex)), "complex64|complex128"),
        (bad(x=FEATURES[:, 0]), r"shape \[20\]"),
        (bad(x=np.zeros((20, 7, 8, 9), np.uint8)), "neither the second nor the last axis"),
        (bad(y=LABELS.astype(float)), "y: The labels are of type float64"),
        (bad(y=LABELS + 1), "No training sample has the label 0"),
        (bad(y=LABELS * 0), "only one class"),
        (bad(y=LABELS - 1), r"y, row 0: The label -1 is outside 0\.\.2"),
        (bad(x_test=FEATURES[:4], y_test=np.array([0, 1, 2, 4])), "y_test, row 3: The label 4 .* has 4 classes"),
        (bad(x_test=FEATURES[:4, :5], y_test=LABELS[:4]), r"shape \[7\], test samples \[5\]"),
        (bad(x_test=FEATURES[:0], y_test=LABELS[:0]), "test split holds no samples"),
        (bad(x=FEATURES[:0], y=LABELS[:0]), "training split holds no samples"),
        (bad(y=np.array([{}] * 20, dtype=object)), "cannot be read: .*without Python objects"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(save(tmp_path, **arrays))
    assert "data.npz" in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(f"npz:{tmp_path}/absent.npz")
    with pytest.raises(DataError, match="a folder, not a file"):
        load(f"npz:{tmp_path}")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: The file cannot be read"):
        load(f"npz:{tmp_path}/text.npz")
    np.save(tmp_path / "single.npy", FEATURES)
    with pytest.raises(DataError, match="single array"):
        load(f"npz:{tmp_path}/single.npy")
    path = Path(save(tmp_path, x=FEATURES, y=LABELS).removeprefix("npz:"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        load(f"npz:{path}")


def test_options_are_checked(tmp_path: Path) -> None:
    name = save(tmp_path, x=FEATURES, y=LABELS)
    with pytest.raises(RecipeError, match=r"unknown key 'test_fracton'.*did you mean 'test_fraction'"):
        load(name, {"test_fracton": 0.1})
    with pytest.raises(RecipeError, match=r"'test_fraction' = 1\.5"):
        load(name, {"test_fraction": 1.5})
    own = save(tmp_path, x=FEATURES, y=LABELS, x_test=FEATURES, y_test=LABELS)
    with pytest.raises(DataError, match="test split of its own"):
        load(own, {"test_fraction": 0.2})


def test_layout_prefers_usual_channel_counts() -> None:
    assert as_inputs(np.zeros((2, 3, 4, 4), np.uint8), "").shape == (2, 4, 4, 3)
    assert as_inputs(np.zeros((2, 4, 4, 3), np.uint8), "").shape == (2, 4, 4, 3)


PLUGIN = """
import numpy as np
from sparsepipe.data import ArraySplit, Dataset
from sparsepipe.spec import Preprocessing

X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10) % 2

def as_dict(scale=1.0):
    return {"x_train": X * scale, "y_train": Y, "x_test": X, "y_test": Y}

def as_tuple():
    return X, Y, X[:2], Y[:2]

def as_pair():
    return X, Y

def as_dataset(classes=("even", "odd"), shape=(4,)):
    split = ArraySplit(X, Y)
    return Dataset("mine", classes, split, split, shape, Preprocessing(mean=(0.0,) * 4, std=(1.0,) * 4))

def nonsense():
    return 42

def failing():
    raise ValueError("no luck")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "my_plugin_data.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("my_plugin_data", None)


@pytest.mark.usefixtures("plugin")
def test_plugins() -> None:
    assert everything(load("my_plugin_data:as_dict", {"scale": 2.0}).train)[0].tolist() == [0, 2, 4, 6]
    assert len(load("my_plugin_data:as_tuple").test) == 2
    assert len(load("my_plugin_data:as_pair").test) == 2
    assert load("my_plugin_data:as_dataset").classes == ("even", "odd")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("as_dict", {"scal": 1}, r"scal.*signature is \(scale=1\.0\)"),
        ("nonsense", {}, "returned a int"),
        ("failing", {}, r"ValueError: no luck .*my_plugin_data\.py, line 2\d"),
        ("absent", {}, "no function 'absent'"),
        ("as_dataset", {"shape": (5,)}, r"input_shape says \[5\]"),
        ("as_dataset", {"classes": ("even",)}, r"training split, sample 1: The label 1 is outside 0\.\.0"),
    ],
)
def test_bad_plugins(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(f"my_plugin_data:{name}", options)


def test_fingerprint_of_a_plugin_follows_its_source(plugin: Path) -> None:
    before = fingerprint("my_plugin_data:as_tuple")
    assert fingerprint("my_plugin_data:as_tuple") == before
    assert fingerprint("my_plugin_data:as_pair") != before
    plugin.write_text(PLUGIN + "\n")
    assert fingerprint("my_plugin_data:as_tuple") != before


@pytest.mark.parametrize("shape", [(40, 0), (40, 0, 8), (40, 8, 0, 3)])
def test_samples_without_values_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "empty.npz", x=np.zeros(shape, np.uint8), y=np.arange(40) % 2)
    with pytest.raises(DataError, match="they hold no values"):
        load(f"npz:{tmp_path / 'empty.npz'}")
