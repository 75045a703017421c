"""SparseSeparableConv against dense onnxruntime, which runs the fallback body of the same file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operator_cases import agree, agree_at_once, compare, masked, output_size

from sparsepipe.native import operators

ACTIVATIONS = ["none", "relu", "clip", "hardswish", "silu"]
PAIRS = [(first, last) for first in ACTIVATIONS for last in ACTIVATIONS if last == "none" or first in ("none", last)]


def separable_node(
    channels: int,
    outputs: int,
    *,
    block: int = 1,
    density: float = 0.1,
    activations: tuple[str, str] = ("relu", "none"),
    bias: bool = True,
    residual: bool = False,
    seed: int = 0,
    **window: Any,
) -> tuple[Any, dict[str, Any]]:
    """A node called "the_node" and its constants; its residual is "R"."""
    random = np.random.default_rng(seed)
    values, deltas = operators.encode(masked(random, (outputs, channels, 1, 1), block, density), block)
    constants = {
        "depthwise_W": (random.standard_normal((channels, 1, 3, 3)) / 3).astype(np.float32),
        "depthwise_B": random.standard_normal(channels).astype(np.float32),
        "values": values,
        "deltas": deltas,
    }
    inputs = ["X", *constants]
    if bias:
        constants["B"] = random.standard_normal(outputs).astype(np.float32)
    inputs += ["B"] if bias else [""] if residual else []
    first, last = activations
    node = operators.sparse_separable_conv(
        [*inputs, *(["R"] if residual else [])], "Y", weight_shape=(outputs, channels), block=block,
        depthwise_activation=first, depthwise_limits=(-0.25, 1.0) if first == "clip" else None,
        activation=last, limits=(-0.5, 0.75) if last == "clip" else None, name="the_node", **window,
    )  # fmt: skip
    return node, constants


@st.composite
def separables(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.sampled_from([1, 2, 4]))
    residual = draw(st.booleans())
    pads = [1] * 4 if draw(st.booleans()) else draw(st.lists(st.integers(0, 4), min_size=4, max_size=4))
    return {
        "channels": draw(st.integers(1, 24)),
        "outputs": block * draw(st.integers(1, 6)),
        "sizes": [max(1, 3 - pads[i] - pads[i + 2]) + draw(st.integers(0, 60)) for i in range(2)],
        "strides": [draw(st.integers(1, 2))] * 2,
        "pads": pads,
        "block": block,
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "activations": (draw(st.sampled_from(ACTIVATIONS)), "none") if residual else draw(st.sampled_from(PAIRS)),
        "bias": draw(st.booleans()),
        "residual": residual,
        "batch": draw(st.integers(1, 3)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


def check(session: Any, model: Any, isa: str, sizes: list[int], batch: int, threads: int, **case: Any) -> None:
    node, constants = separable_node(**case)
    random = np.random.default_rng(case["seed"])
    feeds = {"X": random.standard_normal((batch, case["channels"], *sizes)).astype(np.float32)}
    if case["residual"]:
        pads, stride = case["pads"], case["strides"][0]
        planes = [output_size(sizes[i], pads[i] + pads[i + 2], 3, stride, 1) for i in range(2)]
        feeds["R"] = random.standard_normal((batch, case["outputs"], *planes)).astype(np.float32)
    compare(session, model, node, constants, feeds, isa, threads)


BIG: dict[str, Any] = {
    "strides": [1, 1], "pads": [1, 1, 1, 1], "block": 1, "density": 0.1, "activations": ("relu", "none"),
    "bias": True, "residual": True, "batch": 1, "threads": 2, "seed": 0,
}  # fmt: skip


# Beyond the random small shapes: several blocks of channels, tiles of several turns of the kernel, rows split over
# threads, rows of which no tile may hold all channels.
@example(case=BIG | {"channels": 256, "outputs": 64, "sizes": [14, 14], "density": 0.5})
@example(case=BIG | {"channels": 512, "outputs": 64, "sizes": [7, 7], "block": 4})
@example(case=BIG | {"channels": 32, "outputs": 64, "sizes": [112, 112], "residual": False})
@example(case=BIG | {"channels": 64, "outputs": 32, "sizes": [57, 112], "strides": [2, 2], "block": 2, "batch": 2})
@example(case=BIG | {"channels": 24, "outputs": 8, "sizes": [56, 56], "activations": ("silu", "none"), "block": 4})
@example(case=BIG | {"channels": 20, "outputs": 4, "sizes": [3, 70000]})
@example(case=BIG | {"channels": 20, "outputs": 4, "sizes": [2, 140001], "strides": [2, 2], "block": 4})
@example(
    case=BIG | {"channels": 2, "outputs": 4, "sizes": [70000, 1], "activations": ("clip", "clip"), "residual": False}
)
@settings(max_examples=40)
@given(case=separables())
def test_separable_convolution(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check(session, model, isa, **case)


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=separables())
def test_separable_convolution_at_length(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    check(session, model, isa, **case)


@pytest.mark.parametrize("opset", [13, 17, 22])
@pytest.mark.parametrize(("first", "last"), PAIRS)
def test_every_name_has_a_body_of_its_own(session: Any, model: Any, first: str, last: str, opset: int) -> None:
    node, constants = separable_node(16, 8, activations=(first, last), pads=[1] * 4)
    file = model(node, constants, [operators.function_for(node, opset)])
    file.opset_import[0].version = opset
    x = {"X": np.random.default_rng(1).standard_normal((1, 16, 9, 9)).astype(np.float32)}
    agree(session(file, native=False).run(None, x)[0], session(file).run(None, x)[0])


def test_shapes_may_change_between_calls(session: Any, model: Any) -> None:
    random = np.random.default_rng(0)
    node, constants = separable_node(12, 8, block=2, density=0.3, strides=[2, 2], pads=[1] * 4)
    file = model(node, constants, [operators.function_for(node)])
    native, dense = session(file), session(file, native=False)
    for size in [5, 9, 30, 5, 17, 64, 1, 9, 5]:
        x = random.standard_normal((1 + size % 2, 12, size, size + 1)).astype(np.float32)
        agree(dense.run(None, {"X": x})[0], native.run(None, {"X": x})[0])


@pytest.mark.parametrize(("channels", "side", "stride"), [(512, 14, 1), (128, 56, 2), (64, 7, 1), (64, 112, 1)])
def test_two_threads_give_the_bits_of_one(session: Any, model: Any, channels: int, side: int, stride: int) -> None:
    """Once a second thread was seen, another plan takes the place of the first."""
    node, constants = separable_node(channels, 64, strides=[stride] * 2, pads=[1] * 4)
    x = np.random.default_rng(1).standard_normal((1, channels, side, side)).astype(np.float32)
    expected = session(model(node, constants)).run(None, {"X": x})[0]
    several = session(model(node, constants), threads=2)
    for _ in range(20):
        np.testing.assert_array_equal(several.run(None, {"X": x})[0], expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls_of_one_session(session: Any, model: Any, threads: int) -> None:
    random = np.random.default_rng(0)
    node, constants = separable_node(48, 32, pads=[1] * 4)
    native = session(model(node, constants), threads=threads)
    inputs = [random.standard_normal((1, 48, size, size)).astype(np.float32) for size in range(5, 29)]
    expected = [session(model(node, constants)).run(None, {"X": x})[0] for x in inputs]
    agree_at_once(native, [{"X": x} for x in inputs], expected)
