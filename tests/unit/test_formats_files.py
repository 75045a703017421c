"""Files of tensors, masks and whole networks: what is written comes back, and a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sparsepipe.errors import ArtefactError, FormatError, SparsepipeError
from sparsepipe.formats import Compressed, encode
from sparsepipe.formats.io import load, load_dense, save
from sparsepipe.formats.masks import load_masks, save_masks
from sparsepipe.formats.tensors import digest_tensors, read_tensors, write_tensors


def sparse(shape: tuple[int, ...], density: float = 0.2) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(1)
    return np.where(generator.random(shape) < density, generator.standard_normal(shape), 0).astype(np.float32)


def network() -> dict[str, np.ndarray[Any, Any] | Compressed]:
    return {
        "conv.weight": encode(sparse((8, 4, 3, 3)), "csr"),
        "fc.weight": encode(sparse((6, 8)), "bsr", r=4, c=1),
        "fc.bias": np.array([1.5, -0.0, np.nan], np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float16),
    }


def test_a_network_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, network())
    assert set(load_file(path)) == {
        *("conv.weight.values", "conv.weight.deltas", "conv.weight.indptr"),
        *("fc.weight.values", "fc.weight.deltas", "fc.weight.indptr"),
        *("fc.bias", "bn.num_batches_tracked", "flag", "empty"),
    }
    dense = load_dense(path)
    assert dense["conv.weight"].tobytes() == sparse((8, 4, 3, 3)).tobytes()
    assert dense["fc.weight"].tobytes() == sparse((6, 8)).tobytes()
    for name in ("fc.bias", "bn.num_batches_tracked", "flag", "empty"):
        original = network()[name]
        assert isinstance(original, np.ndarray)
        assert (dense[name].dtype, dense[name].shape) == (original.dtype, original.shape)
        assert dense[name].tobytes() == original.tobytes()
    fc = load(path)["fc.weight"]
    assert isinstance(fc, Compressed)
    assert fc.metadata == {"format": "bsr", "shape": [6, 8], "r": 4, "c": 1}


def test_equal_networks_are_equal_files(tmp_path: Path) -> None:
    save(tmp_path / "a", network())
    save(tmp_path / "b", dict(reversed(network().items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_component_names_that_collide_are_refused(tmp_path: Path) -> None:
    for name in ("conv.weight.values", "conv.weight.deltas"):
        with pytest.raises(FormatError, match=f"conv.weight: A component would overwrite the tensor '{name}'"):
            save(tmp_path / "a", {**network(), name: np.zeros(1)})
    assert not list(tmp_path.iterdir())


def damaged(path: Path, change: Any) -> Path:
    """Write the network, let `change` edit its arrays and its described tensors, and write that."""
    save(path, network())
    arrays, metadata = read_tensors(path)
    described = json.loads(metadata["sparsepipe"])
    change(arrays, described["tensors"])
    save_file(arrays, path, {"sparsepipe": json.dumps(described)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, t: a.pop("conv.weight.deltas"), r"conv\.weight\.deltas: The component is missing from the file"),
        (lambda a, t: a.update(more=np.zeros(1)), r"The array 'more' is not named"),
        (lambda a, t: t.update(fc={"format": "csr", "shape": [1, 1]}), r"fc\.values: The component is missing"),
        (lambda a, t: t["conv.weight"].update(format="zip"), r"conv\.weight: There is no format 'zip'"),
        (lambda a, t: t["conv.weight"].update(format=["csr"]), r"conv\.weight: There is no format"),
        (lambda a, t: t["conv.weight"].update(shape=[8, -4]), r"conv\.weight: The shape \[8, -4\] is not"),
        (lambda a, t: t["conv.weight"].update(shape="big"), r"conv\.weight: The shape 'big' is not"),
        (lambda a, t: t["conv.weight"].update(shape=[8, 2**62]), r"conv\.weight: The shape .* is not"),
        (lambda a, t: t["conv.weight"].update(shape=[8, 2**30]), r"conv\.weight: The shape .* is too large"),
        (lambda a, t: t["conv.weight"].update(shape=[8, 4]), r"conv\.weight\.deltas: Entry \d+ is out of range"),
        (lambda a, t: t["conv.weight"].update(r=3), r"conv\.weight: The format csr takes the parameters none"),
        (lambda a, t: t["fc.bias"].update(shape=[4]), r"fc\.bias: The file has no dense array of shape \[4\]"),
        (lambda a, t: t["fc.bias"].update(r=4), r"fc\.bias: The file has no dense array"),
        (lambda a, t: t.update({"x": {"format": "dense", "shape": []}}), r"x: The file has no dense array"),
        (
            lambda a, t: t.update({"conv.weight.values": {"format": "dense", "shape": [len(a["conv.weight.values"])]}}),
            r"belongs to two tensors",
        ),
        (lambda a, t: t.update(x=3), r"no object 'tensors'"),
    ],
)
def test_a_damaged_network_is_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        load_dense(damaged(tmp_path / "model.safetensors", change))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no key 'sparsepipe'"),
        ({"other": "1"}, "no key 'sparsepipe'"),
        ({"sparsepipe": "{"}, "not valid JSON"),
        ({"sparsepipe": "[" * 100_000}, "not valid JSON"),
        ({"sparsepipe": "[]"}, "not of version 1"),
        ({"sparsepipe": '{"version": 2, "tensors": {}}'}, "not of version 1"),
        ({"sparsepipe": '{"version": 1, "tensors": []}'}, "no object 'tensors'"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "model.safetensors")


def test_many_small_weights_cannot_stand_for_a_huge_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it is written nor, in a file of someone else's making, when it is read."""
    empty = encode(np.zeros((2, 2), np.float32), "csr")
    large = Compressed("csr", (2, 2**24), empty.components, {})
    state = {f"layer{index}": large for index in range(5)}
    message = "All tensors together have 167772160 elements.*bitmask"
    with pytest.raises(FormatError, match=message):
        save(tmp_path / "model.safetensors", state)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("sparsepipe.formats.io.element_limit", lambda stored: 2**40)
        save(tmp_path / "model.safetensors", state)
    with pytest.raises(FormatError, match=message):
        load_dense(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, load, load_masks):
        with pytest.raises(ArtefactError, match="not a valid safetensors file"):
            read(path)


@given(st.data())
def test_a_file_with_flipped_bytes_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save(path, network())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        dense = load_dense(path)
    except SparsepipeError:
        return
    assert all(isinstance(array, np.ndarray) for array in dense.values())


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere: The file cannot be read: No such file"):
        read_tensors(tmp_path / "nowhere")


def test_bfloat16_is_read_as_float32_without_loss(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.tensor([1.0, -2.5, 3.0e38, float("inf"), -0.0, 1e-40]).to(torch.bfloat16)
    save_torch({"w": values, "i": torch.tensor(3)}, tmp_path / "w")
    tensors = read_tensors(tmp_path / "w").tensors
    assert tensors["w"].dtype == np.float32
    assert tensors["w"].tobytes() == values.to(torch.float32).numpy().tobytes()
    assert tensors["i"] == 3

    save_torch({"w": values.to(torch.float8_e4m3fn)}, tmp_path / "w")
    with pytest.raises(ArtefactError, match=r"w: A tensor of type F8_E4M3 cannot be read here\."):
        read_tensors(tmp_path / "w")


def test_arrays_that_are_not_contiguous_are_written_right(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_tensors(tmp_path / "a", {"a": array})
    np.testing.assert_array_equal(read_tensors(tmp_path / "a").tensors["a"], array)


def test_the_digest_depends_on_names_types_shapes_and_values_alone() -> None:
    base: dict[str, np.ndarray[Any, Any]] = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.int64)}
    assert digest_tensors(base) == digest_tensors(dict(reversed(base.items())))
    others = [
        {"a": base["a"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].astype(np.int32)},
        {**base, "a": -base["a"]},
        {"c": base["a"], "b": base["b"]},
    ]
    assert len({digest_tensors(tensors) for tensors in [base, *others]}) == 6


def test_masks_come_back_and_take_a_bit_each(tmp_path: Path) -> None:
    masks = {"b": sparse((3, 5)) != 0, "a": np.ones((4, 2, 1, 3), bool), "none": np.zeros((0, 2), bool)}
    save_masks(tmp_path / "masks", masks)
    stored, metadata = read_tensors(tmp_path / "masks")
    assert {name: array.size for name, array in stored.items()} == {"a": 3, "b": 2, "none": 0}
    assert json.loads(metadata["shapes"]) == {"a": [4, 2, 1, 3], "b": [3, 5], "none": [0, 2]}
    loaded = load_masks(tmp_path / "masks")
    assert set(loaded) == set(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(loaded[name], mask)
        assert loaded[name].dtype == bool


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": [9]}, "mask of a: A mask of shape \\[9\\] takes 2 bytes"),
        ({"a": [7]}, "mask of a: Bits are set beyond the last of 7"),
        ({"a": [2**62, 2**62]}, "is not a shape"),
        ({"a": "8"}, "is not a shape"),
        ({"b": [8]}, "do not name the same masks"),
        ([8], "do not name the same masks"),
    ],
)
def test_damaged_masks_are_named(tmp_path: Path, shapes: Any, message: str) -> None:
    write_tensors(tmp_path / "masks", {"a": np.array([255], np.uint8)}, {"shapes": json.dumps(shapes)})
    with pytest.raises(FormatError, match=message):
        load_masks(tmp_path / "masks")


def test_a_file_without_shapes_holds_no_masks(tmp_path: Path) -> None:
    write_tensors(tmp_path / "masks", {"a": np.array([255], np.uint8)})
    with pytest.raises(ArtefactError, match="holds no masks"):
        load_masks(tmp_path / "masks")
