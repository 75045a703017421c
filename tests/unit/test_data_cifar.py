"""The CIFAR archives, faked in their real layout; and pickles that must not run."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsepipe.data import fingerprint, load
from sparsepipe.data.pickles import read_pickle
from sparsepipe.errors import DataError, RecipeError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (36, 32, 32, 3), np.uint8)  # five training files of 6 and a test file of 6
LABELS = np.arange(36) % 3


def planes(images: np.ndarray) -> np.ndarray:
    """As the archives hold them: all red, then all green, then all blue pixels of each image."""
    return np.concatenate([images[..., channel].reshape(len(images), -1) for channel in range(3)], axis=1)


def cifar10(protocol: int = 2) -> dict[str, bytes]:
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files: dict[str, Any] = {"batches.meta": {"num_cases_per_batch": 6, "label_names": ["cat", "dog", "frog"]}}
    for position, name in enumerate(names):
        part = slice(6 * position, 6 * position + 6)
        files[name] = {
            "batch_label": name,
            "labels": LABELS[part].tolist(),
            "data": planes(IMAGES[part]),
            "filenames": [f"{number}.png" for number in range(6)],
        }
    return {name: pickle.dumps(value, protocol) for name, value in files.items()}


def cifar100() -> dict[str, bytes]:
    def table(part: slice) -> dict[str, Any]:
        fine = LABELS[part].tolist()
        return {"fine_labels": fine, "coarse_labels": [0] * len(fine), "data": planes(IMAGES[part])}

    meta = {"fine_label_names": ["apple", "bear", "crab"], "coarse_label_names": ["thing"]}
    files = {"meta": meta, "train": table(slice(0, 30)), "test": table(slice(30, 36))}
    return {name: pickle.dumps(value, 2) for name, value in files.items()}


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def packed(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def check(name: str, classes: tuple[str, ...]) -> None:
    dataset = load(name)
    assert dataset.classes == classes
    assert dataset.input_shape == (3, 32, 32)
    np.testing.assert_array_equal(dataset.train.load(np.arange(30)), IMAGES[:30])
    np.testing.assert_array_equal(dataset.test.load(np.arange(6)), IMAGES[30:])
    np.testing.assert_array_equal(dataset.train.labels, LABELS[:30])
    np.testing.assert_array_equal(dataset.test.labels, LABELS[30:])
    np.testing.assert_allclose(dataset.preprocessing.mean, IMAGES[:30].mean((0, 1, 2)) / 255)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar10_in_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    folder = unpacked(tmp_path / "cifar-10-batches-py", cifar10(protocol))
    check(f"cifar10:{folder}", ("cat", "dog", "frog"))


def test_cifar10_in_every_place(tmp_path: Path) -> None:
    archive = packed(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10())
    check(f"cifar10:{archive}", ("cat", "dog", "frog"))
    check(f"cifar10:{tmp_path}", ("cat", "dog", "frog"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name]  # nothing was unpacked to disk
    unpacked(tmp_path / "other" / "cifar-10-batches-py", cifar10())
    check(f"cifar10:{tmp_path}/other", ("cat", "dog", "frog"))


def test_cifar100(tmp_path: Path) -> None:
    check(f"cifar100:{unpacked(tmp_path / 'cifar-100-python', cifar100())}", ("apple", "bear", "crab"))
    archive = packed(tmp_path / "renamed.tar.gz", "cifar-100-python", cifar100())
    check(f"cifar100:{archive}", ("apple", "bear", "crab"))


def test_a_pickle_of_python_2_is_read() -> None:
    """Written by hand, opcode by opcode, as Python 2 and its numpy wrote the archives (protocol 2, byte strings)."""
    raw = bytes(range(6))
    data = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06" + raw + b"tbs."
    )
    table = read_pickle(data, "here")
    np.testing.assert_array_equal(table["data"], np.arange(6, dtype=np.uint8).reshape(2, 3))


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "cifar-10-batches-py", cifar10())
    before = fingerprint(f"cifar10:{folder}")
    assert fingerprint(f"cifar10:{tmp_path}") == before
    (folder / "notes.txt").write_text("not of the dataset")
    assert fingerprint(f"cifar10:{folder}") == before
    (folder / "test_batch").write_bytes(b"changed")
    assert fingerprint(f"cifar10:{folder}") != before


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, open, np.load, np.fromfile])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, function: Any) -> None:
    mark = tmp_path / "ran"
    attack = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    files = cifar10()
    files["data_batch_3"] = pickle.dumps({"data": Malicious(function, attack), "labels": []}, 2)
    folder = unpacked(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match=r"data_batch_3: The file asks for '.*nothing was run"):
        load(f"cifar10:{folder}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}U\x04datacos\nsystem\nU\x04true\x85Rs.",  # REDUCE
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x05numpy\x8c\x0dcore.os.system\x93.",  # a dotted name
        b"\x80\x02cnumpy\ndtype\ncnumpy.core.multiarray\n_reconstruct\n\x81}U\x0b__setstate__K\x01sb0cos\nsystem\n.",
    ],
)
def test_opcodes_that_find_names_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        read_pickle(data, "here")


def test_stand_ins_cannot_be_changed_by_a_pickle() -> None:
    """BUILD on a stand-in's class itself, which would set its attributes for later pickles."""
    from sparsepipe.data import pickles

    before = dict(vars(pickles._Array))
    for state in (b"}U\x07resolveK\x01s", b"N}U\x07resolveK\x01s\x86"):
        with pytest.raises(DataError, match="not a valid pickle"):
            read_pickle(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + state + b"b.", "here")
    assert dict(vars(pickles._Array)) == before


@pytest.mark.parametrize("kind", ["object", "float", "str"])
def test_arrays_of_other_types_are_refused(kind: str) -> None:
    data = pickle.dumps({"data": np.array(["1", "2"]).astype(kind)}, 2)
    with pytest.raises(DataError, match=r"numpy\.dtype"):
        read_pickle(data, "here")


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    files = cifar10()
    for cut in range(0, len(files["test_batch"]), 997):
        with pytest.raises(DataError, match="here: The file is not a valid pickle"):
            read_pickle(files["test_batch"][:cut], "here")
    with pytest.raises(DataError, match="holds a list"):
        read_pickle(pickle.dumps([1]), "here")
    archive = packed(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    archive.write_bytes(archive.read_bytes()[:40_000])
    with pytest.raises(DataError, match=r"tar\.gz: The archive cannot be read: .*truncated"):
        load(f"cifar10:{archive}")
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="The archive cannot be read"):
        load(f"cifar10:{archive}")


def changed(**changes: Any) -> dict[str, bytes]:
    files = cifar10()
    table = pickle.loads(files["data_batch_2"])
    files["data_batch_2"] = pickle.dumps({**table, **changes}, 2)
    return files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (changed(labels=[0, 1, 2]), "data_batch_2: There are 6 images but 3 labels"),
        (changed(labels=[0, 1, 2, 0, 9, 1]), r"data_batch_2, row 4: The label 9 is outside 0\.\.2"),
        (changed(labels=["cat"] * 6), "data_batch_2: The labels are of type"),
        (changed(labels=[0, 1, 2, [0], 1, 2]), "data_batch_2: The labels are lists of different lengths"),
        (changed(labels="cat"), "data_batch_2: The key 'labels' is missing or not a list"),
        (changed(data=planes(IMAGES[:6])[:, :100]), r"data_batch_2: 'data' is not a uint8 array \[N, 3072\]"),
        (changed(data=planes(IMAGES[:6]).astype(np.int64)), "data_batch_2: 'data' is not a uint8 array"),
        ({**cifar10(), "batches.meta": pickle.dumps({"names": []}, 2)}, "'label_names' is missing.*there are: names"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(f"cifar10:{unpacked(tmp_path / 'cifar-10-batches-py', files)}")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a folder cifar-10-batches-py nor an archive"):
        load(f"cifar10:{tmp_path}")
    files = cifar10()
    del files["data_batch_4"]
    folder = unpacked(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match="data_batch_4: The file cannot be read: No such file"):
        load(f"cifar10:{folder}")
    wrong = packed(tmp_path / "cifar-100-python.tar.gz", "cifar-100-python", cifar100())
    with pytest.raises(DataError, match=r"lacks batches\.meta, data_batch_1"):
        load(f"cifar10:{wrong}")
    with pytest.raises(RecipeError, match="unknown key 'test_fraction'"):
        load(f"cifar10:{folder}", {"test_fraction": 0.1})
