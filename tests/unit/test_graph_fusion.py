"""What becomes part of a sparse layer, and what does not: against dense onnxruntime, and by the operators left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from universal_cases import Array, check, model, ops, weight

from sparsepipe.graph.universal import choose, rewrite

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node
Written = Callable[[str, str], list[NodeProto]]
"""Nodes that compute an activation: names of input and output -> nodes; they use the constants below."""

CONSTANTS: dict[str, Array] = {
    "zero": np.array(0, np.float32),
    "half": np.array(0.5, np.float32),
    "one": np.array(1, np.float32),
    "one_row": np.array([1], np.float32),
    "three": np.array(3, np.float32),
    "six": np.array(6, np.float32),
    "sixth": np.array(1 / 6, np.float32),
    "rough_sixth": np.array(0.1667, np.float32),
    "root": np.array(2**0.5, np.float32),
    "rough_root": np.array(1.41, np.float32),
    "root_half": np.array(0.5**0.5, np.float32),
    "deep": np.ones((1, 1, 1, 1, 1), np.float32),
}


def chain(*steps: tuple[str, ...], **attributes: float) -> Written:
    """Steps `operator input ... output`; "x" and "y" are the ends of the activation."""

    def write(source: str, target: str) -> list[NodeProto]:
        names = {"x": source, "y": target}
        local = lambda name: name if name in CONSTANTS or not name else names.get(name, f"{target}.{name}")  # noqa: E731
        return [
            node(op, [local(name) for name in inputs], [local(output)], **(attributes if op == "HardSigmoid" else {}))
            for op, *inputs, output in steps
        ]

    return write


SILU = {
    "x first": chain(("Sigmoid", "x", "g"), ("Mul", "x", "g", "y")),
    "gate first": chain(("Sigmoid", "x", "g"), ("Mul", "g", "x", "y")),
}
HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}
HARDSWISH = {
    "torch, opset 13": chain(("HardSigmoid", "x", "g"), ("Mul", "x", "g", "y"), **HARD_SIGMOID),
    "clip, divided last": chain(
        ("Add", "x", "three", "s"), ("Clip", "s", "zero", "six", "c"), ("Mul", "x", "c", "m"), ("Div", "m", "six", "y")
    ),
    "clip, divided first": chain(
        ("Add", "three", "x", "s"),
        ("Clip", "s", "zero", "six", "c"),
        ("Mul", "c", "sixth", "m"),
        ("Mul", "m", "x", "y"),
    ),
}
GELU = {
    "torch, dynamo": chain(
        *[("Div", "x", "root", "a"), ("Erf", "a", "b"), ("Add", "b", "one", "c")],
        *[("Mul", "half", "c", "d"), ("Mul", "x", "d", "y")],
    ),
    "torch, older": chain(
        *[("Div", "x", "root", "a"), ("Erf", "a", "b"), ("Add", "b", "one_row", "c")],
        *[("Mul", "x", "c", "d"), ("Mul", "d", "half", "y")],
    ),
    "multiplied": chain(
        *[("Mul", "x", "half", "h"), ("Mul", "root_half", "x", "a"), ("Erf", "a", "b"), ("Add", "one", "b", "c")],
        ("Mul", "h", "c", "y"),
    ),
}
NOT_FUSED: dict[str, Written] = {
    "hard sigmoid": chain(("HardSigmoid", "x", "y"), **HARD_SIGMOID),
    "another slope": chain(("HardSigmoid", "x", "g"), ("Mul", "x", "g", "y"), alpha=0.2, beta=0.5),
    "sigmoid": chain(("Sigmoid", "x", "y")),
    "squared": chain(("Sigmoid", "x", "g"), ("Mul", "g", "g", "s"), ("Mul", "s", "x", "y")),
    "rough hardswish": chain(
        ("Add", "x", "three", "s"), ("Clip", "s", "zero", "six", "c"), ("Mul", "x", "c", "m"),
        ("Mul", "m", "rough_sixth", "y"),
    ),
    "gelu by tanh": chain(
        *[("Mul", "x", "half", "h"), ("Tanh", "x", "t"), ("Add", "t", "one", "c"), ("Mul", "h", "c", "y")]
    ),
    "rough gelu": chain(
        *[("Div", "x", "rough_root", "a"), ("Erf", "a", "b"), ("Add", "b", "one", "c")],
        *[("Mul", "half", "c", "d"), ("Mul", "x", "d", "y")],
    ),
    "computed bounds": chain(("Sigmoid", "zero", "l"), ("Clip", "x", "l", "six", "y")),
    "more dimensions": chain(("Sigmoid", "x", "g"), ("Mul", "x", "g", "s"), ("Mul", "s", "deep", "y")),
}  # fmt: skip


def conv(written: Written, opset: int = 18, **window: object) -> list[str]:
    nodes = [node("Conv", ["x", "w"], ["a"], **window), *written("a", "y")]
    return ops(check(model(nodes, (16, 6, 6), {"w": weight(16, 16, 1, 1), **CONSTANTS}, opset=opset))[0])


def linear(written: Written, opset: int = 18) -> list[str]:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["c"]), *written("c", "y")]
    constants = {"w": weight(32, 16).T.copy(), "b": weight(32, density=1), **CONSTANTS}
    return ops(check(model(nodes, (5, 16), constants, opset=opset))[0])


@pytest.mark.parametrize("opset", [13, 18, 22])
@pytest.mark.parametrize("form", SILU)
def test_silu(form: str, opset: int) -> None:
    assert conv(SILU[form], opset) == ["SparseConvSilu"]


@pytest.mark.parametrize("opset", [13, 14, 22])
@pytest.mark.parametrize("form", HARDSWISH)
def test_hardswish(form: str, opset: int) -> None:
    assert conv(HARDSWISH[form], opset) == ["SparseConvHardSwish"]


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("form", GELU)
def test_gelu(form: str, opset: int) -> None:
    assert linear(GELU[form], opset) == ["SparseLinearGelu"]


@given(data=st.data())
@settings(max_examples=12)
def test_gelu_in_any_order(data: st.DataObject) -> None:
    """0.5 * x * (1 + erf(x / sqrt 2)) as a tree of products over its three factors, in any order."""
    factors = ["half", "x", "c"]
    steps = [("Mul", *data.draw(st.permutations(["x", "root_half"])), "a"), ("Erf", "a", "b")]
    steps.append(("Add", *data.draw(st.permutations(["b", "one"])), "c"))
    for target in ("d", "y"):
        pair = data.draw(st.permutations(factors))[:2]
        factors = [name for name in factors if name not in pair] + [target]
        steps.append(("Mul", *pair, target))
    assert linear(chain(*steps)) == ["SparseLinearGelu"]


def test_the_operator_gelu_only_without_approximation() -> None:
    exact = lambda x, y: [node("Gelu", [x], [y], approximate="none")]  # noqa: E731
    approximate = lambda x, y: [node("Gelu", [x], [y], approximate="tanh")]  # noqa: E731
    assert linear(exact, 20) == ["SparseLinearGelu"]
    assert linear(lambda x, y: [node("Gelu", [x], [y])], 21) == ["SparseLinearGelu"]
    assert linear(approximate, 20) == ["SparseLinear", "Gelu"]


@pytest.mark.parametrize("form", NOT_FUSED)
def test_what_only_looks_alike_stays(form: str) -> None:
    written = NOT_FUSED[form]
    stays = [entry.op_type for entry in written("a", "y")]
    # The five dimensions of a factor make five of the product: SiLU before it is fused, the factor is not.
    expected = ["SparseConvSilu", "Mul"] if form == "more dimensions" else ["SparseConv", *stays]
    assert Counter(conv(written)) == Counter(expected)


def test_an_activation_that_the_kernel_lacks_stays() -> None:
    assert linear(SILU["x first"]) == ["SparseLinear", "Sigmoid", "Mul"]
    assert conv(lambda x, y: [node("Gelu", [x], [y])], 20) == ["SparseConv", "Gelu"]


def test_an_activation_of_which_a_part_is_used_stays() -> None:
    gate_is_used = [*SILU["x first"]("a", "y"), node("Neg", ["y.g"], ["z"])]
    nodes = [node("Conv", ["x", "w"], ["a"]), *gate_is_used]
    before = model(nodes, (16, 6, 6), {"w": weight(16, 16, 1, 1)}, outputs=("y", "z"))
    assert ops(check(before)[0]) == ["SparseConv", "Sigmoid", "Mul", "Neg"]
    before = model(nodes[:-1], (16, 6, 6), {"w": weight(16, 16, 1, 1)}, outputs=("y", "a"))
    assert ops(check(before)[0]) == ["SparseConv", "Sigmoid", "Mul"]


def test_the_operator_swish_is_silu() -> None:
    """onnxruntime may not know opset 24 yet, so the body is run by onnx's own evaluator."""
    if onnx.defs.onnx_opset_version() < 24:
        pytest.skip("this onnx has no Swish")
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Swish", ["a"], ["y"])]
    before = model(nodes, (16, 6, 6), {"w": weight(16, 16, 1, 1)}, opset=24, ir_version=11)
    after = rewrite(before, choose(before))
    assert ops(after) == ["SparseConvSilu"]
    x = {"x": np.random.default_rng(0).standard_normal((2, 16, 6, 6)).astype(np.float32)}
    found, expected = (ReferenceEvaluator(one).run(None, x)[0] for one in (after, before))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [(32,), (1, 32), (1, 1, 32)])
def test_a_bias_after_a_product_in_any_rank_that_adds_no_dimension(dims: tuple[int, ...]) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["b", "a"], ["y"])]
    constants = {"w": weight(32, 16).T.copy(), "b": weight(32, density=1).reshape(dims)}
    fits = len(dims) <= 2
    assert ops(check(model(nodes, (16,), constants))[0]) == ["SparseLinear", *([] if fits else ["Add"])]


def test_the_sums_of_an_encoder_become_part_of_its_products() -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Add", ["a", "b1"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("MatMul", ["c", "w2"], ["d"]),
        node("Add", ["b2", "d"], ["e"]),
        node("Add", ["x", "e"], ["f"]),
        node("LayerNormalization", ["f", "scale"], ["y"], axis=-1),
    ]
    constants = {
        "w1": weight(32, 16).T.copy(),
        "b1": weight(32, density=1),
        "w2": weight(16, 32).T.copy(),
        "b2": weight(16, density=1),
        "scale": weight(16, density=1),
    }
    assert ops(check(model(nodes, (5, 16), constants))[0]) == [
        "SparseLinearRelu",
        "SparseLinearAdd",
        "LayerNormalization",
    ]


def test_a_sum_with_one_column_is_no_bias() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])]
    constants = {"w": weight(32, 16).T.copy(), "b": weight(32, 1, density=1)}
    assert ops(check(model(nodes, (32, 16), constants))[0]) == ["SparseLinear", "Add"]


BLOCKS: dict[str, tuple[list[NodeProto], int]] = {
    "identity": (
        [
            node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "w2"], ["c"], pads=[2, 2, 2, 2], dilations=[2, 2]),
            node("Add", ["c", "x"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        2,
    ),
    "strided": (
        [
            node("Conv", ["x", "p"], ["s"], strides=[2, 2]),
            node("Conv", ["x", "w1"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Conv", ["a", "w2"], ["c"], pads=[1, 1, 1, 1]),
            node("Add", ["s", "c"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        3,
    ),
    "pooled": (
        [
            node("MaxPool", ["x"], ["s"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
            node("Conv", ["x", "w1"], ["a"], strides=[2, 2], auto_pad="NOTSET", pads=[1, 1, 1, 1]),
            node("Add", ["s", "a"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        1,
    ),
}


@pytest.mark.parametrize("side", [7, 8, 9])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("sizes", [("h", "w"), (None, None), ("s", "s")])
def test_residuals_of_sizes_that_are_not_known(name: str, sizes: tuple[str | None, ...], side: int) -> None:
    nodes, layers = BLOCKS[name]
    constants = {"w1": weight(16, 16, 3, 3), "w2": weight(16, 16, 3, 3), "p": weight(16, 16, 1, 1)}
    used = {entry for made in nodes for entry in made.input}
    after, _ = check(
        model(nodes, (16, *sizes), {key: value for key, value in constants.items() if key in used}),
        side=side,
    )
    left = Counter(ops(after))
    assert left["SparseConvAddRelu"] == 1
    assert "Add" not in left
    assert sum(count for op, count in left.items() if op.startswith("Sparse")) == layers


@pytest.mark.parametrize(
    "other",
    [
        node("Conv", ["x", "w2"], ["b"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("AveragePool", ["x"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxPool", ["x"], ["b"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        node("GlobalAveragePool", ["x"], ["b"]),
    ],
    ids=lambda made: made.op_type,
)
def test_a_branch_that_may_have_another_size_is_not_fused(other: NodeProto) -> None:
    """With sides of 2 all of these are 1 x 1; with others they need not be, or a sum must broadcast."""
    first = node("Conv", ["x", "w1"], ["a"], strides=[2, 2], kernel_shape=[2, 2])
    nodes = [first, other, node("Add", ["a", "b"], ["y"])]
    constants = {"w1": weight(16, 16, 2, 2), "w2": weight(16, 16, 3, 3)}
    used = {name: value for name, value in constants.items() if any(name in made.input for made in nodes)}
    after, _ = check(model(nodes, (16, "h", "w"), used), side=2)
    same = other.op_type == "AveragePool"  # the same window
    assert ("Add" in ops(after)) == (not same)


@pytest.mark.parametrize(("batch", "expected"), [("n", ["SparseConvAdd"]), ("other", ["SparseConv", "Add"])])
def test_sizes_of_another_input_are_the_same_only_by_name(batch: str, expected: list[str]) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Add", ["a", "z"], ["y"])]
    shapes = {"x": ["n", 16, "h", "w"], "z": [batch, 16, "h", "w"]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight(16, 16, 1, 1), "w")],
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert ops(rewrite(before, choose(before))) == expected
