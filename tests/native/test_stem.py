"""The first convolution of an image, with and without a pooling, against dense onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operator_cases import compare

from sparsepipe.native import operators

CASE: dict[str, Any] = {
    "channels": (3, 64), "sizes": (224, 224), "pads": (3, 3, 3, 3), "pool": ([3, 3], [1, 1, 1, 1]), "batch": 1,
    "activation": "relu", "bias": True, "threads": 2, "seed": 0,
}  # fmt: skip


@st.composite
def stems(draw: st.DrawFn) -> dict[str, Any]:
    pads = draw(st.sampled_from([(3, 3, 3, 3), (0, 0, 0, 0), (2, 2, 3, 3), (8, 1, 0, 9)]))
    least = [max(1, 7 - pads[i] - pads[i + 2]) for i in (0, 1)]
    window = [draw(st.integers(2, 3)), draw(st.integers(2, 3))]
    pool_pads = [draw(st.integers(0, window[i % 2] - 1)) for i in range(4)]
    pool = draw(st.booleans())
    if pool:  # room for one window
        least = [least[i] + 2 * max(0, window[i] - 1 - pool_pads[i] - pool_pads[i + 2]) for i in (0, 1)]
    return {
        "channels": (draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4, 6, 16, 20, 50]))),
        "sizes": tuple(size + draw(st.integers(0, 90)) for size in least),
        "pads": pads,
        "pool": (window, pool_pads) if pool else None,
        "batch": draw(st.integers(1, 2)),
        "activation": draw(st.sampled_from(["none", "relu", "clip", "hardswish", "silu"])),
        "bias": draw(st.booleans()),
        "threads": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
    }


def made(case: dict[str, Any]) -> Any:
    random = np.random.default_rng(case["seed"])
    inputs, outputs = case["channels"]
    weight = random.standard_normal((outputs, inputs, 7, 7)) / (inputs * 49) ** 0.5
    constants = {"W": weight.astype(np.float32)}
    if case["bias"]:
        constants["B"] = random.standard_normal(outputs).astype(np.float32)
    node = operators.stem_conv(
        ["X", *constants], "Y", weight_shape=weight.shape, strides=[2, 2], pads=case["pads"],
        activation=case["activation"],
        limits=(-0.5, 0.75) if case["activation"] == "clip" else None, pool=case["pool"], name="the_node",
    )  # fmt: skip
    image = random.standard_normal((case["batch"], inputs, *case["sizes"])).astype(np.float32)
    return node, constants, {"X": image}


@example(case=CASE)
@example(case=CASE | {"pool": None, "activation": "silu"})
@example(case=CASE | {"sizes": (225, 223), "channels": (4, 24), "pool": ([2, 2], [0, 0, 0, 0]), "threads": 1})
@example(case=CASE | {"sizes": (64, 64), "channels": (1, 10), "pool": ([3, 3], [0, 0, 1, 1]), "batch": 3})
@example(case=CASE | {"sizes": (1, 1), "pool": None})
@example(case=CASE | {"sizes": (1, 900), "pool": ([3, 3], [2, 2, 2, 2])})
@example(case=CASE | {"sizes": (700, 3)})
@settings(max_examples=40)
@given(case=stems())
def test_stem(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    compare(session, model, *made(case), isa, case["threads"])


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=stems())
def test_stem_at_length(session: Any, model: Any, isa: str, case: dict[str, Any]) -> None:
    compare(session, model, *made(case), isa, case["threads"])


@pytest.mark.parametrize("pool", [None, CASE["pool"]])
def test_shapes_in_turn_and_threads_give_the_same_bits(session: Any, model: Any, pool: Any) -> None:
    node, constants, _ = made(CASE | {"pool": pool})
    file = model(node, constants, [operators.function_for(node)])
    sessions = [session(file, threads=threads) for threads in (1, 2, 3)]
    random = np.random.default_rng(1)
    for size in ((224, 224), (97, 130), (224, 224), (33, 40)):
        image = random.standard_normal((2, 3, *size)).astype(np.float32)
        for _ in range(3):  # threads are seen in the first call
            outputs = [each.run(None, {"X": image})[0] for each in sessions]
            assert all(np.array_equal(outputs[0], other) for other in outputs[1:])
        assert np.array_equal(outputs[0][1:], sessions[0].run(None, {"X": image[1:]})[0])


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(16, 3, 3, 3), (6, 1, 3, 3), (5, 4, 3), (32, 3, 4, 4), (8, 3, 7, 7)]),
    stride=st.integers(1, 2),
    sizes=st.tuples(st.integers(7, 40), st.integers(7, 40)),
    pad=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_other_windows(
    session: Any, model: Any, isa: str, shape: Any, stride: int, sizes: Any, pad: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rank = len(shape) - 2
    constants = {"W": random.standard_normal(shape).astype(np.float32), "B": np.ones(shape[0], np.float32)}
    node = operators.stem_conv(
        ["X", "W", "B"], "Y", weight_shape=shape, strides=[stride] * rank, pads=[pad] * 2 * rank, activation="relu"
    )
    feeds = {"X": random.standard_normal((2, shape[1], *sizes[:rank])).astype(np.float32)}
    compare(session, model, node, constants, feeds, isa, 1)
