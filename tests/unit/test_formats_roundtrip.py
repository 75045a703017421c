"""Every format against the dense array, and its contents against scipy.sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.errors import FormatError
from sparsepipe.formats import FORMATS, Compressed, decode, encode

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@st.composite
def weights(draw: st.DrawFn, dtypes: list[str] = DTYPES, min_side: int = 0) -> np.ndarray[Any, Any]:
    """A weight of 2 to 5 dimensions, empty to full, with -0.0, NaN and infinities among its floats."""
    shape = (
        draw(st.integers(min_side, 9)),
        draw(st.integers(min_side, 9)),
        *draw(st.lists(st.integers(min_side, 3), max_size=3)),
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    dtype: np.dtype[Any] = np.dtype(draw(st.sampled_from(dtypes)))
    if dtype.kind == "f":
        special = [-0.0, 0.0, np.nan, np.inf, -np.inf, np.finfo(dtype).tiny / 4, np.finfo(dtype).max]
        dense = generator.standard_normal(shape).astype(dtype)
        dense[generator.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = generator.choice(special)
    else:
        limits = np.iinfo(dtype)
        dense = generator.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
    dense[generator.random(shape) >= density] = 0
    if draw(st.booleans()) and dense.size:  # a single nonzero
        only = dense.dtype.type(3)
        dense[...] = 0
        dense.reshape(-1)[generator.integers(dense.size)] = only
    return dense


def fit_nm(dense: np.ndarray[Any, Any], n: int, m: int) -> np.ndarray[Any, Any]:
    """Zero what n:m along axis 1 does not allow, one group at a time."""
    fitted = dense.copy()
    for output in range(dense.shape[0]):
        for tap in np.ndindex(*dense.shape[2:]):
            for start in range(0, dense.shape[1], m):
                kept = 0
                for channel in range(start, min(start + m, dense.shape[1])):
                    if fitted[(output, channel, *tap)] != 0:
                        kept += 1
                        if kept > n:
                            fitted[(output, channel, *tap)] = 0
    return fitted


def assert_same(dense: np.ndarray[Any, Any], weight: Compressed) -> None:
    decoded = decode(weight)
    expected = dense.copy()
    expected[expected == 0] = 0  # -0.0 counts as zero
    assert decoded.dtype == dense.dtype
    assert decoded.shape == dense.shape
    assert decoded.tobytes() == expected.tobytes()


@given(weights())
@pytest.mark.parametrize("name", ["csr", "bitmask"])
def test_unstructured_formats_round_trip(name: str, dense: np.ndarray[Any, Any]) -> None:
    weight = encode(dense, name)
    assert_same(dense, weight)
    assert len(weight.components["values"]) == np.count_nonzero(dense)


@given(weights(), st.integers(1, 5), st.integers(1, 5))
def test_blocks_round_trip(dense: np.ndarray[Any, Any], r: int, c: int) -> None:
    assert_same(dense, encode(dense, "bsr", r=r, c=c))


@given(weights(), st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_nm_round_trips(dense: np.ndarray[Any, Any], pattern: tuple[int, int]) -> None:
    n, m = pattern
    fitted = fit_nm(dense, n, m)
    weight = encode(fitted, "nm", n=n, m=m)
    assert_same(fitted, weight)
    groups = dense.shape[0] * -(-dense.shape[1] // m) * int(np.prod(dense.shape[2:]))
    assert weight.components["values"].shape == (groups, n)


@given(weights(["float32"], min_side=1))
def test_csr_holds_what_scipy_holds(dense: np.ndarray[Any, Any]) -> None:
    components = encode(dense, "csr").components
    expected = scipy.sparse.csr_matrix(dense.reshape(dense.shape[0], -1))
    np.testing.assert_array_equal(components["values"], expected.data)
    np.testing.assert_array_equal(components["indptr"], expected.indptr)
    for row in range(dense.shape[0]):
        entries = slice(components["indptr"][row], components["indptr"][row + 1])
        columns = np.cumsum(components["deltas"][entries], dtype=np.int64)
        np.testing.assert_array_equal(columns, expected.indices[entries])


@given(weights(["float32"], min_side=1), st.integers(1, 4), st.integers(1, 4))
def test_a_single_tap_of_bsr_holds_what_scipy_holds(dense: np.ndarray[Any, Any], r: int, c: int) -> None:
    matrix = dense.reshape(dense.shape[0], -1)
    matrix = np.pad(matrix, ((0, -matrix.shape[0] % r), (0, -matrix.shape[1] % c)))
    expected = scipy.sparse.bsr_matrix(matrix, blocksize=(r, c))
    expected.sort_indices()
    components = encode(matrix, "bsr", r=r, c=c).components
    np.testing.assert_array_equal(components["values"], expected.data)
    np.testing.assert_array_equal(components["indptr"], expected.indptr)
    for row in range(len(expected.indptr) - 1):
        entries = slice(expected.indptr[row], expected.indptr[row + 1])
        np.testing.assert_array_equal(
            np.cumsum(components["deltas"][entries], dtype=np.int64), expected.indices[entries]
        )


def test_a_block_of_channels_stays_at_one_kernel_tap() -> None:
    dense = np.zeros((4, 4, 3, 3), np.float32)
    dense[2:4, 2:4, 1, 2] = [[1, 2], [3, 4]]  # outputs 2-3, channels 2-3, tap 5
    components = encode(dense, "bsr", r=2, c=2).components
    np.testing.assert_array_equal(components["values"], [[[1, 2], [3, 4]]])
    np.testing.assert_array_equal(components["indptr"], [0, 0, 1])
    np.testing.assert_array_equal(components["deltas"], [1 * 9 + 5])


def test_nm_packs_the_positions_of_2_4_into_two_bits_each() -> None:
    components = encode(np.array([[0, 7, 0, 8, 0, 0, 9, 0]], np.int8), "nm", n=2, m=4).components
    np.testing.assert_array_equal(components["values"], [[7, 8], [0, 9]])
    # positions 1, 3, 0 (fills up), 2, lowest bits first
    np.testing.assert_array_equal(components["positions"], [1 | 3 << 2 | 0 << 4 | 2 << 6])


def test_bitmask_has_a_bit_per_weight() -> None:
    components = encode(np.array([[0, 5, 0, 0, 0], [0, 0, 0, 6, 7]], np.int8), "bitmask").components
    np.testing.assert_array_equal(components["bits"], [0b00000010, 0b00000011])
    np.testing.assert_array_equal(components["values"], [5, 6, 7])


@pytest.mark.parametrize(
    ("columns", "expected"), [([0, 255], "uint8"), ([0, 256], "uint16"), ([3, 65538], "uint16"), ([65536], "uint32")]
)
def test_deltas_are_as_narrow_as_they_fit(columns: list[int], expected: str) -> None:
    dense = np.zeros((1, 70000), np.int8)
    dense[0, columns] = 1
    weight = encode(dense, "csr")
    assert weight.components["deltas"].dtype == expected
    assert_same(dense, weight)


@pytest.mark.parametrize(("nnz", "expected"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_row_pointers_are_as_narrow_as_they_fit(nnz: int, expected: str) -> None:
    dense = np.zeros((2, 40000), np.uint8)
    dense.reshape(-1)[:nnz] = 1
    weight = encode(dense, "csr")
    assert weight.components["indptr"].dtype == expected
    assert weight.components["deltas"].dtype == np.uint8
    assert_same(dense, weight)


def test_size_is_that_of_the_components() -> None:
    weight = encode(np.eye(8, dtype=np.float32), "csr")
    assert weight.nbytes == 8 * 4 + 8 * 1 + 9 * 1
    assert encode(np.eye(8, dtype=np.float32), "bitmask").nbytes == 8 * 4 + 8
    assert encode(np.eye(8, dtype=np.float16), "nm", n=1, m=4).nbytes == 16 * 2 + 16 * 2 // 8


@given(weights())
def test_the_input_is_not_changed(dense: np.ndarray[Any, Any]) -> None:
    before = dense.tobytes()
    encode(dense, "csr"), encode(dense, "bsr", r=2, c=2), encode(dense, "bitmask")
    assert dense.tobytes() == before


def test_arrays_that_are_not_contiguous_are_taken() -> None:
    dense = np.arange(24, dtype=np.float32).reshape(6, 4)[::2].T
    assert_same(dense, encode(dense, "csr"))
    assert_same(dense, encode(dense, "bsr", r=2, c=1))
    assert_same(dense, encode(dense, "bitmask"))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_are_refused(name: str, shape: tuple[int, ...]) -> None:
    parameters = {"bsr": {"r": 1, "c": 1}, "nm": {"n": 1, "m": 2}}.get(name, {})
    with pytest.raises(FormatError, match=r"layer\.bias: .*two or more dimensions"):
        encode(np.ones(shape, np.float32), name, where="layer.bias", **parameters)


@pytest.mark.parametrize("dtype", ["bool", "complex64", ">f4", "object", "datetime64[s]", "U3"])
def test_other_types_are_refused(dtype: str) -> None:
    with pytest.raises(FormatError, match="cannot be compressed"):
        encode(np.zeros((2, 2), dtype), "csr")


def test_patterns_that_do_not_hold_or_make_no_sense_are_refused() -> None:
    dense = np.ones((2, 8), np.float32)
    with pytest.raises(FormatError, match="4 of 4 groups of 4 inputs hold more than 2 nonzeros"):
        encode(dense, "nm", n=2, m=4)
    for n, m in ((0, 4), (4, 4), (5, 4), (1, 257)):
        with pytest.raises(FormatError, match="is not possible"):
            encode(dense, "nm", n=n, m=m)
    for r, c in ((0, 1), (1, -1), (257, 1)):
        with pytest.raises(FormatError, match="is not possible"):
            encode(dense, "bsr", r=r, c=c)
    with pytest.raises(FormatError, match=r"no format 'coo'.*csr"):
        encode(dense, "coo")
