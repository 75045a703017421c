"""The encoding of sparse weights in ONNX files, against scipy's CSR and BSR."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsepipe.native.encoding import decode, encode

Weight = NDArray[np.float32]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Weight, int]:
    """A weight and the rows of its blocks; many weights are nearly empty, so that gaps are wide."""
    block = draw(st.sampled_from([1, 2, 4]))
    rows = block * draw(st.integers(1, 6))
    shape = draw(
        st.one_of(
            st.tuples(st.just(rows), st.integers(1, 600)),
            st.tuples(st.just(rows), st.integers(1, 40), st.integers(1, 3), st.integers(1, 5)),
            st.tuples(st.just(rows), st.integers(1, 30), st.integers(1, 4)),
        )
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.002, 0.02, 0.3, 1.0]))
    weight = random.standard_normal(shape).astype(np.float32)
    weight[random.random(shape) >= density] = 0
    empty = draw(st.lists(st.integers(0, rows - 1), max_size=rows))
    weight[empty] = 0
    return weight, block


def blocks_of(weight: Weight, block: int) -> tuple[NDArray[Any], Weight]:
    """Number and values of the nonzero blocks, as scipy finds them."""
    matrix = weight.reshape(len(weight), -1)
    columns = matrix.shape[1]
    if block == 1:
        found: Any = scipy.sparse.csr_matrix(matrix)
        data = found.data[:, None]
    else:
        found = scipy.sparse.bsr_matrix(matrix, blocksize=(block, 1))
        data = found.data[:, :, 0]
    rows = np.repeat(np.arange(len(found.indptr) - 1), np.diff(found.indptr))
    numbers = rows * columns + found.indices
    order = np.argsort(numbers)
    return numbers[order], data[order]


@given(weights(), st.sampled_from([None, np.uint8, np.uint16]))
def test_the_encoding_holds_the_blocks_that_scipy_finds(case: tuple[Weight, int], dtype: Any) -> None:
    weight, block = case
    values, deltas = encode(weight, block, dtype)
    assert deltas.dtype in (np.uint8, np.uint16) if dtype is None else deltas.dtype == dtype
    numbers = np.cumsum(deltas, dtype=np.int64)
    assert (np.diff(numbers) > 0).all()
    held = values.any(axis=1)
    expected_numbers, expected_values = blocks_of(weight, block)
    np.testing.assert_array_equal(numbers[held], expected_numbers)
    np.testing.assert_array_equal(values[held], expected_values)
    # Blocks of zeros bridge gaps, and gaps only: each stands the widest step from what is before it.
    assert (deltas[~held] == np.iinfo(deltas.dtype).max).all()
    restored = decode(values, deltas, weight.shape, block)
    assert (restored.dtype, restored.shape) == (weight.dtype, weight.shape)
    assert restored.tobytes() == (weight + np.float32(0)).tobytes()


@given(weights(), st.sampled_from([np.uint8, np.uint16]))
def test_blocks_written_by_others_are_decoded(case: tuple[Weight, int], dtype: Any) -> None:
    """Deltas made of scipy's blocks, with bridges one step shorter than ours."""
    weight, block = case
    numbers, held = blocks_of(weight, block)
    step = int(np.iinfo(dtype).max) - 1
    values, deltas, last = [], [], 0
    for number, one in zip(numbers, held, strict=True):
        while number - last > step:
            values.append(np.zeros(block, np.float32))
            deltas.append(step)
            last += step
        values.append(one)
        deltas.append(number - last)
        last = number
    arrays = np.array(values, np.float32).reshape(-1, block), np.array(deltas, dtype)
    np.testing.assert_array_equal(decode(*arrays, weight.shape, block), weight)


@given(gap=st.integers(1, 200_000), dtype=st.sampled_from([np.uint8, np.uint16]))
@example(gap=255, dtype=np.uint8)
@example(gap=256, dtype=np.uint8)
@example(gap=510, dtype=np.uint8)
@example(gap=511, dtype=np.uint8)
@example(gap=65_535, dtype=np.uint16)
@example(gap=65_536, dtype=np.uint16)
def test_gaps_wider_than_the_type_of_the_deltas_are_bridged(gap: int, dtype: Any) -> None:
    weight = np.zeros((1, gap + 1), np.float32)
    weight[0, [0, gap]] = [2, 3]
    values, deltas = encode(weight, 1, dtype)
    assert len(deltas) == 2 + (gap - 1) // int(np.iinfo(dtype).max)
    assert int(deltas.sum(dtype=np.int64)) == gap
    np.testing.assert_array_equal(decode(values, deltas, weight.shape, 1), weight)


def test_the_narrower_deltas_are_taken_where_they_make_the_smaller_file() -> None:
    dense, thin = np.ones((2, 500), np.float32), np.zeros((2, 40_000), np.float32)
    thin[:, ::20_000] = 1
    sizes = {}
    for weight in (dense, thin):
        sizes[weight.size] = [sum(part.nbytes for part in encode(weight, 1, kind)) for kind in (np.uint8, np.uint16)]
        assert sum(part.nbytes for part in encode(weight)) == min(sizes[weight.size])
    assert sizes[dense.size] == [1000 * 5, 1000 * 6]
    assert sizes[thin.size][1] < sizes[thin.size][0]


def test_a_negative_zero_is_a_zero() -> None:
    weight = np.array([[-0.0, 1.0], [2.0, -0.0]], np.float32)
    values, deltas = encode(weight)
    assert (values.ravel().tolist(), deltas.tolist()) == ([1.0, 2.0], [1, 1])


def test_a_block_that_does_not_divide_the_outputs_is_refused() -> None:
    for function in (lambda: encode(np.ones((6, 2), np.float32), 4), lambda: encode(np.ones((6, 2), np.float32), 3)):
        with pytest.raises(ValueError, match="does not divide 6 outputs"):
            function()


VALUES, DELTAS = np.array([[1], [2], [3]], np.float32), np.array([0, 3, 2], np.uint8)


@pytest.mark.parametrize(
    ("values", "deltas", "shape", "block", "reason"),
    [
        (VALUES, DELTAS, (1, 5), 1, "block 5 is outside of the weight's 5"),
        (VALUES, np.array([0, 0, 2], np.uint8), (2, 3), 1, "do not ascend"),
        (VALUES[:2], DELTAS, (2, 3), 1, "do not fit each other"),
        (VALUES[:, 0], DELTAS, (2, 3), 1, "do not fit each other"),
        (VALUES, DELTAS[:, None], (2, 3), 1, "do not fit each other"),
        (VALUES, DELTAS, (2, 3), 2, "do not fit each other"),
        (VALUES, DELTAS, (3, 3), 2, "does not divide 3 outputs"),
        (VALUES, DELTAS, (3, 3), 3, "does not divide 3 outputs"),
        (VALUES.astype(np.float64), DELTAS, (2, 3), 1, "float64"),
        (VALUES, DELTAS.astype(np.int64), (2, 3), 1, "int64"),
        (VALUES, np.array([255, 255, 255], np.uint8), (2, 300), 1, "block 765 is outside"),
    ],
)
def test_what_cannot_be_a_weight_is_refused(
    values: Any, deltas: Any, shape: tuple[int, ...], block: int, reason: str
) -> None:
    decode(VALUES, DELTAS, (2, 3), 1)
    with pytest.raises(ValueError, match=reason):
        decode(values, deltas, shape, block)
