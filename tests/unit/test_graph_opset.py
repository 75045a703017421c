"""Changing the opset: the same outputs in onnxruntime, or a refusal that names the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import opset
from sparsepipe.graph.opset import convert, smallest_ir_version

X = np.random.default_rng(5).standard_normal((2, 3, 4, 6)).astype(np.float32)
node = helper.make_node


def model(nodes: list[NodeProto], version: int = 18, **constants: Any) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)
    made = onnx.shape_inference.infer_shapes(made)
    if not made.graph.output[0].type.tensor_type.HasField("shape"):
        made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4))
    onnx.checker.check_model(made, full_check=True)
    return made


def evaluate(made: ModelProto) -> NDArray[Any]:
    return np.asarray(onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": X})[0])


def branch(name: str, *nodes: NodeProto) -> GraphProto:
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


FLOATS = np.linspace(-1, 1, 6, dtype=np.float32)
CASES: dict[str, ModelProto] = {
    "elementwise": model([node("Relu", ["x"], ["a"]), node("Add", ["a", "x"], ["b"]), node("Sigmoid", ["b"], ["y"])]),
    "reduction": model([node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)], axes=[2, -1]),
    "reduction of all": model([node("ReduceMax", ["x"], ["y"], keepdims=1)]),
    "reduction with a Constant": model(
        [
            node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([1]))),
            node("ReduceL2", ["x", "axes"], ["y"], noop_with_empty_axes=0),
        ]
    ),
    "layer norm": model(
        [node("LayerNormalization", ["x", "scale", "bias"], ["y"], epsilon=0.1, stash_type=1)],
        scale=FLOATS, bias=FLOATS,
    ),
    "layer norm over two axes, no bias": model(
        [node("LayerNormalization", ["x", "scale"], ["y"], axis=-2)], scale=np.ones((4, 6), np.float32)
    ),
    "shape range": model([node("Shape", ["x"], ["s"], start=1, end=-1), node("Cast", ["s"], ["y"], to=1)]),
    "shape from an axis": model([node("Shape", ["x"], ["s"], start=-2), node("Cast", ["s"], ["y"], to=1)]),
    "equal split": model(
        [node("Split", ["x"], ["a", "b", "c"], axis=-1, num_outputs=3), node("Sub", ["b", "c"], ["y"])]
    ),
    "reshape": model([node("Reshape", ["x", "s"], ["y"], allowzero=1)], s=np.array([-1, 72])),
    "computed reshape": model(
        [
            node("Shape", ["x"], ["n"], end=1),
            node("Concat", ["n", "s"], ["all"], axis=0),
            node("Reshape", ["x", "all"], ["y"], allowzero=1),
        ],
        s=np.array([72]),
    ),
    "pooling": model([node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[1, 1])], version=19),
    "batch norm": model(
        [node("BatchNormalization", ["x", *"sbmv"], ["y"])], **dict.fromkeys("sbmv", FLOATS[3:])
    ),
    "padding": model([node("Pad", ["x", "p"], ["y"], mode="reflect")], p=np.array([0, 0, 1, 0, 0, 0, 0, 2])),
    "subgraph": model(
        [
            node(
                "If",
                ["yes"],
                ["y"],
                then_branch=branch("t", node("Relu", ["x"], ["r"]), node("Mul", ["r", "r"], ["t"])),
                else_branch=branch("e", node("LayerNormalization", ["x", "scale"], ["e"])),
            )
        ],
        yes=np.array(False),
        scale=FLOATS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", [13, 14, 15, 16, 17])
@pytest.mark.parametrize("case", CASES)
def test_lowering_keeps_the_outputs(case: str, target: int) -> None:
    before = CASES[case]
    untouched = before.SerializeToString()
    after = convert(before, target, where="case")
    assert before.SerializeToString() == untouched
    assert opset(after) == target
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(evaluate(after), evaluate(before), rtol=1e-5, atol=1e-6)
    kept = {name for node in before.graph.node for name in node.output}
    assert kept <= {name for node in after.graph.node for name in node.output} or case == "reduction with a Constant"
    used = {name for node in after.graph.node for name in node.input}
    assert case == "subgraph" or {tensor.name for tensor in after.graph.initializer} <= used


@pytest.mark.parametrize("target", [19, 20, 21, 22])
def test_raising_keeps_the_outputs(target: int) -> None:
    for case in ("elementwise", "reduction", "layer norm", "equal split", "batch norm"):
        after = convert(CASES[case], target, where=case)
        assert opset(after) == target
        np.testing.assert_allclose(evaluate(after), evaluate(CASES[case]), rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[ModelProto, int, str]] = {
    "operator": (model([node("HardSwish", ["x"], ["y"], name="act")]), 13, "no HardSwish \\('act'\\)"),
    "mode": (model([node("Pad", ["x", "p"], ["y"], mode="wrap")], 19, p=np.array([0, 0, 0, 1, 0, 0, 0, 0])), 16, "Pad"),
    "unequal split": (
        model([node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Relu", ["a"], ["y"])]), 16, "num_outputs"
    ),
    "zero dimension": (
        model([node("Slice", ["x", "z", "z"], ["e"]), node("Reshape", ["e", "s"], ["y"], allowzero=1)],
              z=np.array([0]), s=np.array([0, 72])), 13, "allowzero"
    ),
    "axis from the front": (
        model([node("LayerNormalization", ["x", "s"], ["y"], axis=3)], s=FLOATS), 13, "LayerNormalization"
    ),
    "computed axes": (
        model([node("Cast", ["f"], ["a"], to=7), node("ReduceMean", ["x", "a"], ["y"])], f=np.float32([1])),
        13, "axes of ReduceMean"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_older_equal_is_refused_by_name(case: str) -> None:
    made, target, said = REFUSED[case]
    with pytest.raises(GraphError, match=said) as caught:
        convert(made, target, where="file.onnx")
    assert str(caught.value).startswith("file.onnx: The model cannot be converted from opset")


@pytest.mark.parametrize("target", [17, 19])
def test_functions_of_its_own_are_a_reason_to_refuse(target: int) -> None:
    body = [node("Neg", ["a"], ["b"])]
    function = helper.make_function("own", "Minus", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    made = model([node("Relu", ["x"], ["y"])])
    made.graph.node[0].CopyFrom(node("Minus", ["x"], ["y"], domain="own"))
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    with pytest.raises(GraphError, match=f"from opset 18 to {target}: it has functions of its own, such as 'Minus'"):
        convert(made, target, where="file.onnx")


def test_the_same_opset_gives_an_equal_copy_and_metadata_stay() -> None:
    made = CASES["elementwise"]
    assert convert(made, 18, where="") == made
    for place, holder in enumerate((made, made.graph, *made.graph.node)):
        holder.metadata_props.add(key="key", value=str(place))
    for target in (17, 21):
        after = convert(made, target, where="")
        for place, holder in enumerate((after, after.graph, *after.graph.node)):
            assert [(entry.key, entry.value) for entry in holder.metadata_props] == [("key", str(place))]


@pytest.mark.parametrize(("version", "ir"), [(13, 7), (15, 8), (18, 8), (19, 9), (21, 10), (22, 10)])
def test_the_oldest_file_format_is_that_of_the_release_of_the_opset(version: int, ir: int) -> None:
    """Versions from the table of the ONNX standard (docs/Versioning.md)."""
    assert smallest_ir_version(model([node("Relu", ["x"], ["y"])], version)) == ir
