"""Every operator against dense onnxruntime, which runs the fallback body of the same file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operator_cases import agree, agree_at_once, compare, masked, output_size

from sparsepipe.native import operators


def linear_case(
    rows: int,
    features: int,
    outputs: int,
    block: int,
    density: float,
    activation: str,
    bias: bool,
    seed: int,
    residual: bool = False,
    mode: str = "auto",
) -> Any:
    random = np.random.default_rng(seed)
    weight = masked(random, (outputs, features), block, density)
    values, deltas = operators.encode(weight, block)
    constants = {"values": values, "deltas": deltas}
    if bias:
        constants["B"] = random.standard_normal(outputs).astype(np.float32)
    node = operators.sparse_linear(
        ["X", "values", "deltas", *(["B"] if bias else [""] if residual else []), *(["R"] if residual else [])],
        "Y", weight_shape=weight.shape, block=block,
        activation=activation, limits=(-0.5, 0.75) if activation == "clip" else None, mode=mode, name="the_node",
    )  # fmt: skip
    feeds = {"X": random.standard_normal((rows, features)).astype(np.float32)}
    if residual:
        feeds["R"] = random.standard_normal((rows, outputs)).astype(np.float32)
    return node, constants, feeds


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.sampled_from([1, 2, 4]))
    rank = draw(st.sampled_from([2, 2, 2, 1]))
    point = draw(st.booleans())
    kernel = [1] * rank if point else draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    plain = point and draw(st.booleans())
    strides = [1] * rank if plain else draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = [1] * rank if plain else draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    pads = [0] * 2 * rank if plain else draw(st.lists(st.integers(0, 4), min_size=2 * rank, max_size=2 * rank))
    if draw(st.booleans()):  # as networks have it: a map of the same size
        dilations, pads = [1] * rank, [size // 2 for size in kernel] * 2
    extents = [dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[rank + i] for i in range(rank)]
    sizes = [max(1, extents[i]) + draw(st.integers(0, 40)) for i in range(rank)]
    return {
        "shape": (block * draw(st.integers(1, 6)), draw(st.integers(1, 24)), *kernel),
        "sizes": sizes,
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
        "block": block,
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "activation": draw(st.sampled_from(["none", "relu", "clip", "hardswish", "silu"])),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "batch": draw(st.integers(1, 3)),
        "mode": draw(st.sampled_from(operators.MODES["SparseConv"])),
        "threads": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def check_convolution(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    random = np.random.default_rng(case["seed"])
    shape, sizes = case["shape"], case["sizes"]
    weight = masked(random, shape, case["block"], case["density"])
    values, deltas = operators.encode(weight, case["block"])
    constants = {"values": values, "deltas": deltas}
    feeds = {"X": random.standard_normal((case["batch"], shape[1], *sizes)).astype(np.float32)}
    inputs = ["X", "values", "deltas"]
    if case["bias"]:
        constants["B"] = random.standard_normal(shape[0]).astype(np.float32)
    if case["bias"] or case["residual"]:
        inputs.append("B" if case["bias"] else "")
    if case["residual"]:
        rank = len(sizes)
        outputs = [
            output_size(
                sizes[i], case["pads"][i] + case["pads"][rank + i], shape[2 + i], case["strides"][i],
                case["dilations"][i],
            )
            for i in range(rank)
        ]  # fmt: skip
        feeds["R"] = random.standard_normal((case["batch"], shape[0], *outputs)).astype(np.float32)
        inputs.append("R")
    node = operators.sparse_conv(
        inputs, "Y", weight_shape=shape, strides=case["strides"], pads=case["pads"], dilations=case["dilations"],
        block=case["block"], activation=case["activation"], mode=case["mode"], name="the_node",
        limits=(-0.5, 0.75) if case["activation"] == "clip" else None,
    )  # fmt: skip
    compare(session, model, node, constants, feeds, isa, case["threads"])


BIG = {
    "strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "block": 1, "density": 0.1, "activation": "relu",
    "bias": True, "residual": True, "batch": 1, "mode": "auto", "threads": 2, "seed": 0,
}  # fmt: skip


# Beyond the random small shapes: enough channels for several blocks of them, and for rows split over threads.
@example(BIG | {"shape": (64, 256, 3, 3), "sizes": [7, 7]})
@example(BIG | {"shape": (64, 512, 1, 1), "sizes": [14, 14], "pads": [0, 0, 0, 0]})
@example(BIG | {"shape": (64, 256, 1, 1), "sizes": [16, 16], "pads": [0, 0, 0, 0], "density": 0.3})
@example(BIG | {"shape": (64, 128, 3, 3), "sizes": [29, 31], "strides": [2, 2], "block": 4})
@example(BIG | {"shape": (8, 4, 3, 3), "sizes": [40, 300], "block": 2})
@example(BIG | {"shape": (8, 24, 3, 3), "sizes": [7, 7], "mode": "shift", "activation": "silu", "threads": 1})
# Tiles for several turns of the kernel, and outputs of which no tile may hold all.
@example(BIG | {"shape": (4, 2, 3, 3), "sizes": [70000, 2]})
@example(BIG | {"shape": (4, 2, 3, 3), "sizes": [2, 70000], "block": 4})
@example(BIG | {"shape": (32, 12, 3, 3), "sizes": [30, 57], "block": 4})
@example(BIG | {"shape": (32, 12, 3, 3), "sizes": [29, 13], "block": 4, "mode": "shift"})
@example(BIG | {"shape": (6, 12, 3, 3), "sizes": [59, 56], "mode": "shift", "batch": 2})
@example(BIG | {"shape": (8, 600, 3, 3), "sizes": [30, 61], "strides": [2, 2], "block": 2, "mode": "rows"})
@example(BIG | {"shape": (8, 9, 5, 5), "sizes": [31, 7], "dilations": [2, 1], "mode": "shift", "activation": "silu"})
@example(
    BIG | {"shape": (8, 24, 3, 3), "sizes": [14, 14], "strides": [2, 2], "mode": "shift", "block": 4, "threads": 1}
)
@example(BIG | {"shape": (16, 24, 3, 3), "sizes": [28, 30], "mode": "shift", "block": 2, "batch": 2, "threads": 1})
@example(BIG | {"shape": (8, 24, 5, 5), "sizes": [20, 12], "mode": "shift", "pads": [2, 2, 2, 2], "threads": 1})
@settings(max_examples=40)
@given(case=convolutions())
def test_convolution(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check_convolution(session, model, isa, case)


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=convolutions())
def test_convolution_at_length(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check_convolution(session, model, isa, case)


def check_depthwise(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    random = np.random.default_rng(case["seed"])
    channels, kernel = case["shape"][0], case["shape"][2:]
    shape = (channels, 1, *kernel)
    constants = {"W": (random.standard_normal(shape) / np.prod(kernel) ** 0.5).astype(np.float32)}
    if case["bias"]:
        constants["B"] = random.standard_normal(channels).astype(np.float32)
    node = operators.depthwise_conv(
        ["X", *constants], "Y", weight_shape=shape, strides=case["strides"], pads=case["pads"],
        dilations=case["dilations"], activation=case["activation"], name="the_node",
        limits=(-0.5, 0.75) if case["activation"] == "clip" else None,
    )  # fmt: skip
    x = random.standard_normal((case["batch"], channels, *case["sizes"])).astype(np.float32)
    compare(session, model, node, constants, {"X": x}, isa, case["threads"])


@example(BIG | {"shape": (24, 1, 3, 3), "sizes": [56, 57]})
@example(BIG | {"shape": (24, 1, 3, 3), "sizes": [57, 112], "strides": [2, 2]})
@example(BIG | {"shape": (3, 1, 5, 5), "sizes": [9, 600], "pads": [2, 2, 2, 2]})
@example(BIG | {"shape": (3, 1, 3, 3), "sizes": [9, 300]})
@example(BIG | {"shape": (3, 1, 3, 3), "sizes": [90, 301], "strides": [2, 2]})
# Planes narrower than a vector.
@example(BIG | {"shape": (40, 1, 3, 3), "sizes": [7, 7], "activation": "hardswish"})
@example(BIG | {"shape": (33, 1, 3, 3), "sizes": [5, 1], "threads": 2})
@example(BIG | {"shape": (40, 1, 3, 3), "sizes": [13, 13], "strides": [2, 2], "threads": 2})
@settings(max_examples=25)
@given(case=convolutions())
def test_depthwise(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check_depthwise(session, model, isa, case)


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=convolutions())
def test_depthwise_at_length(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check_depthwise(session, model, isa, case)


LINEAR = {
    "rows": st.sampled_from([1, 2, 3, 4, 15, 16, 17, 33, 128, 250]),
    "features": st.integers(1, 300),
    "blocks": st.integers(1, 40),
    "block": st.sampled_from([1, 2, 4]),
    "density": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    "activation": st.sampled_from(["none", "relu", "gelu", "clip"]),
    "mode": st.sampled_from(operators.MODES["SparseLinear"]),
    "bias": st.booleans(),
    "residual": st.booleans(),
    "threads": st.integers(1, 2),
    "seed": st.integers(0, 2**16),
}


MANY: dict[str, Any] = {"blocks": 300, "block": 1, "density": 0.3, "bias": True, "mode": "auto", "seed": 0}
WIDE: dict[str, Any] = {**MANY, "blocks": 9, "block": 2, "density": 0.1}


def check_linear(session: Any, model: Any, isa: str, blocks: int, block: int, threads: int, **case: Any) -> None:
    node, constants, feeds = linear_case(outputs=blocks * block, block=block, **case)
    compare(session, model, node, constants, feeds, isa, threads)


# Many outputs and features: rows split over threads, wide indices.
@example(**MANY, rows=16, features=2048, activation="gelu", residual=True, threads=2)
@example(**MANY, rows=1, features=2048, activation="none", residual=False, threads=2)
@example(**WIDE, rows=1, features=70000, activation="relu", residual=True, threads=1)
@settings(max_examples=30)
@given(**LINEAR)
def test_linear(session: Any, model: Any, isa: str, **case: Any) -> None:
    check_linear(session, model, isa, **case)


@pytest.mark.slow
@settings(max_examples=1000)
@given(**LINEAR)
def test_linear_at_length(session: Any, model: Any, isa: str, **case: Any) -> None:
    check_linear(session, model, isa, **case)


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 2, 2, 2), (0,), (0, 4)])
def test_leading_dimensions(session: Any, model: Any, leading: tuple[int, ...]) -> None:
    node, constants, _ = linear_case(1, 5, 8, 4, 0.5, "none", True, 0)
    x = np.random.default_rng(0).standard_normal((*leading, 5)).astype(np.float32)
    file = model(node, constants, [operators.function_for(node)])
    agree(session(file, native=False).run(None, {"X": x})[0], session(file).run(None, {"X": x})[0])


def test_shapes_may_change_between_calls(session: Any, model: Any) -> None:
    random = np.random.default_rng(0)
    weight = masked(random, (8, 6, 3, 3), 2, 0.3)
    values, deltas = operators.encode(weight, 2)
    node = operators.sparse_conv(["X", "values", "deltas"], "Y", weight_shape=weight.shape, pads=[1] * 4, block=2)
    file = model(node, {"values": values, "deltas": deltas}, [operators.function_for(node)])
    native, dense = session(file), session(file, native=False)
    for size in [5, 9, 30, 5, 17, 64, 3, 9, 5]:
        x = random.standard_normal((1 + size % 2, 6, size, size + 1)).astype(np.float32)
        agree(dense.run(None, {"X": x})[0], native.run(None, {"X": x})[0])


def test_not_a_number_passes_through(session: Any, model: Any) -> None:
    node, constants, _ = linear_case(1, 3, 4, 1, 1.0, "relu", False, 0)
    x = np.full((5, 3), np.nan, np.float32)
    assert np.isnan(session(model(node, constants)).run(None, {"X": x})[0]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_may_hold_the_whole_weight(session: Any, model: Any, threads: int) -> None:
    """Its rows cannot be split evenly: some threads get none."""
    random = np.random.default_rng(0)
    weight = np.zeros((32, 16384, 1, 1), np.float32)
    weight[0] = random.standard_normal((16384, 1, 1)) / 128
    values, deltas = operators.encode(weight)
    node = operators.sparse_conv(
        ["X", "values", "deltas"], "Y", weight_shape=weight.shape, mode="direct", name="the_node"
    )
    x = random.standard_normal((1, 16384, 16, 17)).astype(np.float32)
    expected = np.tensordot(weight[:, :, 0, 0].astype(np.float64), x.astype(np.float64), (1, 1)).transpose(1, 0, 2, 3)
    native = session(model(node, {"values": values, "deltas": deltas}), threads=threads)
    for _ in range(2):
        agree(expected, native.run(None, {"X": x})[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls_of_one_session(session: Any, model: Any, threads: int) -> None:
    random = np.random.default_rng(0)
    weight = masked(random, (32, 64, 3, 3), 1, 0.2)
    values, deltas = operators.encode(weight)
    node = operators.sparse_conv(["X", "values", "deltas"], "Y", weight_shape=weight.shape, pads=[1] * 4)
    native = session(model(node, {"values": values, "deltas": deltas}), threads=threads)
    inputs = [random.standard_normal((1, 64, size, size)).astype(np.float32) for size in range(5, 29)]
    expected = [session(model(node, {"values": values, "deltas": deltas})).run(None, {"X": x})[0] for x in inputs]
    agree_at_once(native, [{"X": x} for x in inputs], expected)


@pytest.mark.parametrize(
    ("shape", "side"), [((64, 512, 1, 1), 14), ((64, 256, 3, 3), 14), ((64, 128, 3, 3), 7), ((64, 64, 3, 3), 28)]
)
def test_two_threads_give_the_bits_of_one(session: Any, model: Any, shape: tuple[int, ...], side: int) -> None:
    """Once a second thread was seen, another plan takes the place of the first."""
    random = np.random.default_rng(0)
    values, deltas = operators.encode(masked(random, shape, 1, 0.1))
    node = operators.sparse_conv(["X", "values", "deltas"], "Y", weight_shape=shape, pads=[shape[2] // 2] * 4)
    file = model(node, {"values": values, "deltas": deltas})
    x = random.standard_normal((1, shape[1], side, side)).astype(np.float32)
    expected = session(file).run(None, {"X": x})[0]
    several = session(file, threads=2)
    for _ in range(20):
        np.testing.assert_array_equal(several.run(None, {"X": x})[0], expected)


@given(
    index=st.sets(st.integers(0, 200_000), max_size=30),
    dtype=st.sampled_from([np.uint8, np.uint16, None]),
)
def test_encoding_bridges_gaps(index: set[int], dtype: Any) -> None:
    weight = np.zeros((2, 100_001), np.float32)
    weight.reshape(-1)[sorted(index)] = 1
    values, deltas = operators.encode(weight, 1, dtype)
    rebuilt = np.zeros(weight.size, np.float32)
    rebuilt[np.cumsum(deltas.astype(np.int64))] = values[:, 0]
    assert np.array_equal(rebuilt, weight.reshape(-1))
