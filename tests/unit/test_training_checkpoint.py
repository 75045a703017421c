"""Checkpoints: what goes in comes out, and a damaged file costs one checkpoint at most."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors import safe_open  # noqa: E402

from sparsepipe.errors import ArtefactError  # noqa: E402
from sparsepipe.training import checkpoint  # noqa: E402

PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


def state(step: int) -> dict[str, Any]:
    """A state with every kind of tensor that a training has."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.full((2, 3, 5, 5), float(step))).sum().backward()
    optimizer.step()
    weight = torch.arange(6.0)
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tied": {"a": weight, "b": weight, "view": weight[::2]},
        "kinds": [torch.tensor([True, False]), torch.tensor([-3], dtype=torch.int16), torch.ones(2).bfloat16()],
        "empty": torch.zeros(0, 3),
        "random": torch.get_rng_state(),
        "best": None,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_a_training_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = state(3)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(tmp_path)
    assert same(dict(saved["model"]), loaded["model"])  # type: ignore[index]
    assert same({**saved, "model": None}, {**loaded, "model": None})  # type: ignore[dict-item]
    with safe_open(tmp_path / checkpoint.FILE, "pt") as file:
        assert "model/0.weight" in file.keys()  # noqa: SIM118
        assert "optimizer/state/0/exp_avg_sq" in file.keys()  # noqa: SIM118


@settings(max_examples=40)
@given(tree=TREES)
def test_plain_values_of_any_shape_come_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("plain")
    checkpoint.save(folder, {"tree": tree})
    assert same(checkpoint.load(folder), {"tree": tree})


def test_saving_does_not_change_what_is_saved_and_loading_needs_no_more_of_it(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    checkpoint.save(tmp_path, {"weight": weight})
    weight += 1
    assert torch.equal(checkpoint.load(tmp_path)["weight"], torch.zeros(3))  # type: ignore[index]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "missing") is None


def test_two_checkpoints_are_kept_and_the_newest_is_used(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    assert checkpoint.load(tmp_path)["step"] == 3  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.FILE]


def truncate_header(data: bytes) -> bytes:
    return data[:5]


def truncate_data(data: bytes) -> bytes:
    return data[:-7]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def nothing(data: bytes) -> bytes:
    return b""


def other_version(data: bytes) -> bytes:
    return data.replace(b'"version":"1"', b'"version":"9"')


DAMAGE = [truncate_header, truncate_data, flip_a_bit, nothing, other_version]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    newest = tmp_path / checkpoint.FILE
    changed = damage(newest.read_bytes())
    assert changed != newest.read_bytes()
    newest.write_bytes(changed)
    with caplog.at_level(logging.WARNING, "sparsepipe"):
        assert checkpoint.load(tmp_path)["step"] == 1  # type: ignore[index]
    assert "going on from the one before" in caplog.text


def test_a_missing_newest_checkpoint_falls_back_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / checkpoint.FILE).unlink()
    assert checkpoint.load(tmp_path)["step"] == 1  # type: ignore[index]
    assert "is missing" in caplog.text


def test_two_damaged_checkpoints_are_an_error_that_names_both(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    for name in (checkpoint.FILE, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ArtefactError, match=f"{checkpoint.FILE}.*{checkpoint.PREVIOUS}"):
        checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, state(3))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.FILE]
    assert checkpoint.load(tmp_path)["step"] == 2  # type: ignore[index]


def test_a_value_that_cannot_be_kept_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"set at a/1"):
        checkpoint.save(tmp_path, {"a": [0, {1, 2}]})
    assert checkpoint.load(tmp_path) is None


def test_tensors_whose_paths_are_equal_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors at a/b"):
        checkpoint.save(tmp_path, {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1)})


def test_a_damaged_file_never_takes_the_place_of_the_good_one(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / checkpoint.FILE).write_bytes(b"damaged")
    checkpoint.load(tmp_path)
    # A process that dies right after the old file stepped aside leaves the previous one alone.
    checkpoint.save(tmp_path, state(3))
    (tmp_path / checkpoint.FILE).unlink()
    assert checkpoint.load(tmp_path)["step"] == 1  # type: ignore[index]
    assert (tmp_path / checkpoint.DAMAGED).read_bytes() == b"damaged"
    checkpoint.remove_older(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]
