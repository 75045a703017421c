"""Components that nobody's `encode` wrote: decoding names what is wrong, and nothing else is ever raised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepipe.errors import FormatError
from sparsepipe.formats import FORMATS, Compressed, decode, encode
from sparsepipe.formats.layout import FREE_ELEMENTS

SMALL = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0]], np.float32)
PARAMETERS: dict[str, dict[str, Any]] = {"csr": {}, "bitmask": {}, "bsr": {"r": 2, "c": 2}, "nm": {"n": 2, "m": 4}}


def good(name: str) -> Compressed:
    return encode(SMALL, name, **PARAMETERS[name])


def changed(weight: Compressed, **components: Any) -> Compressed:
    return replace(weight, components={**weight.components, **components})


def u8(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.uint8)


def f32(*numbers: float) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.float32)


CASES = [
    # CSR: values 1 2 3 4, deltas 1 2 0 2, indptr 0 2 2 4
    ("csr", {"deltas": u8(1, 3, 0, 2)}, r"w\.deltas: Entry 1 is out of range: column 4 of row 0, .* 4 columns"),
    ("csr", {"deltas": u8(1, 0, 0, 2)}, r"w\.deltas: Entry 1 is not ascending: column 1 of row 0 comes twice"),
    ("csr", {"deltas": u8(1, 2, 0)}, r"w\.deltas: The array has shape \[3\]; 4 entries"),
    ("csr", {"deltas": np.array([1, 2, 0, 2], np.int64)}, r"w\.deltas: The type is int64; uint8 or uint16 or uint32"),
    ("csr", {"deltas": np.array([1, 2, 0, 2**32 - 1], np.uint32)}, r"w\.deltas: Entry 3 is out of range"),
    ("csr", {"indptr": u8(0, 2, 1, 4)}, r"w\.indptr: The pointers fall from 2 to 1 at row 1"),
    ("csr", {"indptr": u8(1, 2, 2, 4)}, r"w\.indptr: The first row pointer is 1"),
    ("csr", {"indptr": u8(0, 2, 2, 5)}, r"w\.indptr: The last row pointer is 5, but 4 values"),
    ("csr", {"indptr": u8(0, 2, 4)}, r"w\.indptr: The array has shape \[3\]; 4 entries"),
    ("csr", {"indptr": u8(0, 2, 2, 4).reshape(2, 2)}, r"w\.indptr: The array has shape \[2, 2\]"),
    ("csr", {"values": f32(1, 2, 0, 4)}, r"w\.values: Entry 2 is zero"),
    ("csr", {"values": f32(1, 2, -0.0, 4)}, r"w\.values: Entry 2 is -0\.0"),
    ("csr", {"values": np.ones(4, bool)}, r"w\.values: The values are of type bool"),
    ("csr", {"values": np.ones((4, 1), np.float32)}, r"w\.values: .*shape \[4, 1\]; one dimension"),
    ("csr", {"values": np.array(["a"] * 4, object)}, r"w\.values: The values are of type object"),
    ("csr", {"values": f32()}, r"w\.indptr|w\.deltas"),
    ("csr", {"extra": u8(0)}, r"w\.extra: The format csr has no such component"),
    ("csr", {"indptr": None}, r"w\.indptr: The component is missing"),
    # bitmask: bits 0b00001010 0b00000101
    ("bitmask", {"bits": u8(0b1010, 0b0001)}, r"w\.bits: 3 bits are set, but 4 values"),
    ("bitmask", {"bits": u8(0b1010, 0b10101)}, r"w\.bits: Bits are set beyond the last of 12"),
    ("bitmask", {"bits": u8(0b1010)}, r"w\.bits: The array has shape \[1\]; 2 entries"),
    ("bitmask", {"values": f32(1, 2, 3, 0)}, r"w\.values: Entry 3 is zero"),
    # BSR 2x2: the third output is alone in its block row
    ("bsr", {"values": np.ones((4, 2, 2), np.float32)}, r"w\.values: Block 2 holds a value beyond the edge"),
    ("bsr", {"values": np.zeros((4, 2, 2), np.float32)}, r"w\.values: Block 0 is all zero"),
    ("bsr", {"values": np.ones((4, 2, 3), np.float32)}, r"w\.values: .*shape \[4, 2, 2\] is needed"),
    ("bsr", {"values": np.ones((), np.float32)}, r"w\.values: .*shape \[0, 2, 2\] is needed"),
    ("bsr", {"deltas": u8(0, 0, 0, 1)}, r"w\.deltas: Entry 1 is not ascending"),
    ("bsr", {"deltas": u8(0, 1, 0, 2)}, r"w\.deltas: Entry 3 is out of range: column 2 of row 1"),
    # nm 2:4: positions 1 3, 0 1, 0 2
    ("nm", {"positions": u8(3 | 1 << 2 | 0 << 4 | 1 << 6, 8)}, r"w\.positions: The positions of group 0 are not asc"),
    ("nm", {"positions": u8(1 | 1 << 2 | 0 << 4 | 1 << 6, 8)}, r"w\.positions: The positions of group 0 are not asc"),
    ("nm", {"positions": u8(77)}, r"w\.positions: The array has shape \[1\]; 2 entries"),
    ("nm", {"positions": u8(13 | 4 << 4, 8 | 16)}, r"w\.positions: Bits are set beyond the last of 12"),
    ("nm", {"values": np.ones((3, 3), np.float32)}, r"w\.values: .*shape \[3, 2\] is needed"),
]


@pytest.mark.parametrize(("name", "components", "message"), CASES)
def test_each_fault_is_named(name: str, components: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode(changed(good(name), **components), where="w")


def test_positions_beyond_m_are_named() -> None:
    weight = encode(np.ones((1, 3), np.float32)[:, :1].repeat(3, 1) * [1, 0, 0], "nm", n=1, m=3)
    with pytest.raises(FormatError, match=r"w\.positions: Group 0 is out of range: position 3 of 3"):
        decode(changed(weight, positions=u8(3)), where="w")


def test_values_beyond_the_last_channel_of_nm_are_named() -> None:
    weight = encode(np.array([[1, 2, 3]], np.int8) * np.array([[1, 0, 1]], np.int8), "nm", n=1, m=2)
    with pytest.raises(FormatError, match=r"w\.values: Group 1 holds a value beyond the last of 3 input channels"):
        decode(changed(weight, positions=u8(0b10)), where="w")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("bsr", {"r": 2}, "takes the parameters r, c; got r"),
        ("bsr", {"r": 2, "c": 0}, "The parameter c is 0; it must be an integer from 1 to 256"),
        ("bsr", {"r": 2, "c": True}, "The parameter c is True"),
        ("bsr", {"r": 2, "c": "2"}, "The parameter c is '2'"),
        ("bsr", {"r": 2**40, "c": 2}, "The parameter r is"),
        ("nm", {"n": 4, "m": 4}, "pattern 4:4 is not possible"),
        ("csr", {"r": 1}, "takes the parameters none; got r"),
        ("zip", {}, "no format 'zip'"),
    ],
)
def test_wrong_parameters_are_named(name: str, parameters: dict[str, Any], message: str) -> None:
    weight = good(name) if name in PARAMETERS else good("csr")
    with pytest.raises(FormatError, match=f"w: .*{message}"):
        decode(replace(weight, format=name, parameters=parameters), where="w")


@pytest.mark.parametrize("name", list(PARAMETERS))
@pytest.mark.parametrize(
    "shape",
    [
        (2**40, 2**40),
        (3, 2**31 - 1),
        (0, 2**31 - 1, 2**31 - 1),
        (3, FREE_ELEMENTS),
        (-1, 4),
        (3,),
        (),
        (3, 4.0),
        (3, True),
        (3, "4"),
        (3, 4, 1, 1, 1, 1, 1, 1, 1),
    ],
)
def test_impossible_shapes_are_refused_before_anything_is_allocated(name: str, shape: tuple[Any, ...]) -> None:
    with pytest.raises(FormatError, match=r"w: The shape|w: .*too large"):
        decode(replace(good(name), shape=shape), where="w")


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 12, 1000, 2**20, 2**31, -1]), max_size=4).map(tuple)
ARRAY_DTYPES = st.sampled_from(["uint8", "uint16", "uint32", "int8", "int64", "uint64", "float32", "float16", "bool"])


@st.composite
def malformed(draw: st.DrawFn) -> Compressed:
    """A good weight with some of its components, parameters or its shape replaced or damaged."""
    name = draw(st.sampled_from(list(PARAMETERS)))
    weight = good(name)
    components = {key: array.copy() for key, array in weight.components.items()}
    for key in draw(st.sets(st.sampled_from(sorted(components)), min_size=1)):
        array = components[key]
        match draw(st.sampled_from(["bit", "bytes", "shape", "dtype", "length", "gone"])):
            case "bit":
                raw = array.view(np.uint8).reshape(-1)
                raw[draw(st.integers(0, raw.size - 1))] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                array.view(np.uint8).reshape(-1)[:] = np.frombuffer(
                    draw(st.binary(min_size=array.nbytes, max_size=array.nbytes)), np.uint8
                )
            case "shape":
                components[key] = array.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, -1, 1)])))
            case "dtype":
                with np.errstate(all="ignore"):
                    components[key] = array.astype(draw(ARRAY_DTYPES))
            case "length":
                components[key] = np.resize(array, draw(st.integers(0, 20)))
            case "gone":
                del components[key]
    shape = draw(st.one_of(st.just(weight.shape), SHAPES))
    parameters = {
        key: draw(st.one_of(st.just(value), st.integers(-1, 300))) for key, value in weight.parameters.items()
    }
    return Compressed(draw(st.sampled_from([name, name, name, *PARAMETERS])), shape, components, parameters)


@settings(max_examples=500)
@given(malformed())
def test_decoding_returns_a_weight_or_raises_a_format_error(weight: Compressed) -> None:
    before = {key: array.tobytes() for key, array in weight.components.items()}
    try:
        dense = decode(weight, where="w")
    except FormatError:
        pass
    else:
        # What decodes is what some weight encodes to, so nothing was lost or written twice.
        assert dense.shape == weight.shape
        again = FORMATS[weight.format].encode(dense, **weight.parameters)
        assert decode(again).tobytes() == dense.tobytes()
        assert np.count_nonzero(dense) == np.count_nonzero(weight.components["values"])
    assert {key: array.tobytes() for key, array in weight.components.items()} == before
