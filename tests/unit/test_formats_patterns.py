"""Which patterns zeros follow, judged block by block with plain loops; and the choice of the smallest format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.errors import FormatError
from sparsepipe.formats import Compressed, encode
from sparsepipe.formats.choice import choose, verify
from sparsepipe.formats.patterns import followed

Array = np.ndarray[Any, Any]


def in_blocks(dense: Array, r: int, c: int) -> bool:
    for tap in np.ndindex(*dense.shape[2:]):
        for row in range(0, dense.shape[0], r):
            for column in range(0, dense.shape[1], c):
                block = dense[(slice(row, row + r), slice(column, column + c), *tap)]
                if np.count_nonzero(block) not in (0, block.size):
                    return False
    return True


def most_in_group(dense: Array, m: int) -> int:
    return max(
        int(np.count_nonzero(dense[(output, slice(start, start + m), *tap)]))
        for output in range(dense.shape[0])
        for start in range(0, dense.shape[1], m)
        for tap in np.ndindex(*dense.shape[2:])
    )


@st.composite
def sparse_weights(draw: st.DrawFn) -> Array:
    """Weights with some zeros, often in blocks, n:m or whole channels."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)), *draw(st.lists(st.integers(1, 2), max_size=2)))
    r, c = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4), (9, 9), (1, 9), (2, 2)]))
    coarse = generator.random((-(-shape[0] // r), -(-shape[1] // c), *shape[2:])) < draw(st.sampled_from([0.1, 0.5]))
    mask = coarse.repeat(r, 0).repeat(c, 1)[: shape[0], : shape[1]]
    if draw(st.booleans()):
        kept = draw(st.integers(1, 4))
        mask &= (np.arange(shape[1]) % draw(st.sampled_from([4, 8])) < kept).reshape(1, -1, *[1] * (len(shape) - 2))
    return np.where(mask, generator.uniform(1, 2, shape), 0)


@given(sparse_weights())
def test_patterns_are_those_that_loops_find(dense: Array) -> None:
    found = followed(dense)
    if np.count_nonzero(dense) in (0, dense.size):
        assert found == []
        return
    outputs, inputs = dense.shape[:2]
    for r, c in ((2, 1), (4, 1), (1, 4), (2, 4), (4, 4)):
        expected = outputs >= r and inputs >= c and in_blocks(dense, r, c)
        assert (f"{r}x{c}" in found) == expected
    rows = dense.reshape(outputs, -1)
    assert ("channel" in found) == all(np.count_nonzero(row) in (0, row.size) for row in rows)
    named = [tuple(map(int, name.split(":"))) for name in found if ":" in name]
    for n, m in named:
        assert n == max(1, most_in_group(dense, m))
        assert 2 * n <= m <= inputs
        assert np.count_nonzero(dense) / dense.size >= n / m / 2
    # What is named implies, by itself, every n:m that holds and is no chance.
    for m in (2, 4, 8):
        n = max(1, most_in_group(dense, m))
        if m <= inputs and 2 * n <= m and np.count_nonzero(dense) / dense.size >= n / m / 2:
            assert any(n >= known_n * max(1, m // known_m) for known_n, known_m in named)
    assert not any(a != b and b[0] >= a[0] * max(1, b[1] // a[1]) for a in named for b in named)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.arange(8) % 4 < 2, ["2:4"]),
        (np.arange(8) % 4 == 1, ["1:4"]),
        (np.arange(8) < 4, ["1x4", "4:8"]),
        (np.arange(8) % 2 == 0, ["1:2"]),
    ],
)
def test_an_nm_that_another_one_implies_is_not_named(mask: Array, expected: list[str]) -> None:
    assert followed(mask[None, :] * np.float32(1)) == expected


@given(sparse_weights())
def test_the_choice_is_the_smallest_of_all(dense: Array) -> None:
    choice = choose(dense, ("csr", "bsr", "nm", "bitmask"), "3x2")
    sizes = [encode(dense, "csr").nbytes, encode(dense, "bitmask").nbytes, dense.nbytes]
    sizes += [encode(dense, "bsr", r=r, c=c).nbytes for r, c in ((2, 1), (4, 1), (1, 4), (2, 4), (4, 4), (3, 2))]
    for m in (2, 4, 8):
        if m <= dense.shape[1] and (n := max(1, most_in_group(dense, m))) < m:
            sizes.append(encode(dense, "nm", n=n, m=m).nbytes)
    assert (dense.nbytes if choice.weight is None else choice.weight.nbytes) == min(sizes)
    if choice.weight is not None:
        verify(choice.weight, dense)


def test_the_reason_names_figures_and_the_runner_up() -> None:
    dense = np.zeros((64, 64), np.float32)
    dense[:, :4] = 1
    reason = choose(dense, ("csr", "bsr", "bitmask"), "unstructured").reason
    expected = encode(dense, "bsr", r=4, c=4).nbytes / dense.nbytes
    runner_up = encode(dense, "csr").nbytes / dense.nbytes
    assert reason == (
        f"93.8% of its weights are zero; bsr 4x4 takes {expected:.1%} of the dense size, "
        f"csr would take {runner_up:.1%}."
    )
    dense[:, :8] = 1
    assert choose(dense, ("nm",), "7:16").reason == "87.5% of its weights are zero, but no format allowed can hold it."
    assert choose(dense, ("dense",), "unstructured").weight is None


def test_verify_sees_a_single_bit() -> None:
    dense = np.eye(4, dtype=np.float32)
    weight = encode(dense, "csr")
    weight.components["values"][2] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(FormatError, match="w: The weight does not come back from the format csr"):
        verify(weight, dense, where="w")
    verify(encode(np.full((1, 2), -0.0), "csr"), np.full((1, 2), -0.0))
    assert isinstance(choose(dense, ("csr",), "").weight, Compressed)
