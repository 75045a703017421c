"""Which weights are stored sparse, and how: against dense onnxruntime, onnx.checker and counted bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.finish import serialise, stamp
from sparsepipe.graph.portable import sparse_tensor, sparsify
from sparsepipe.graph.select import Layer, sparsity, survey

RANDOM = np.random.default_rng(11)
node = helper.make_node


def with_density(shape: tuple[int, ...], nonzeros: int, dtype: Any = np.float32) -> NDArray[Any]:
    flat = np.zeros(int(np.prod(shape)), dtype)
    flat[RANDOM.choice(flat.size, nonzeros, replace=False)] = RANDOM.integers(1, 9, nonzeros).astype(dtype)
    return flat.reshape(shape)


def sparse_weight(*shape: int) -> NDArray[Any]:
    return with_density(shape, max(1, int(np.prod(shape)) // 10))


def model(
    nodes: list[NodeProto],
    shape: tuple[int, ...],
    constants: dict[str, NDArray[Any]],
    outputs: tuple[str, ...] = ("y",),
    inputs: tuple[str, ...] = (),
    ir_version: int = 8,
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
) -> ModelProto:
    tensors = {name: numpy_helper.from_array(value, name) for name, value in constants.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", dtype, ["n", *shape]),
            *[helper.make_tensor_value_info(name, tensors[name].data_type, tensors[name].dims) for name in inputs],
        ],
        [
            helper.make_tensor_value_info(name, dtype, tensors[name].dims if name in tensors else None)
            for name in outputs
        ],
        list(tensors.values()),
    )
    imports = [helper.make_opsetid("", opset)]
    made = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=ir_version))
    onnx.checker.check_model(made, full_check=True)
    return made


def evaluate(made: ModelProto, dtype: Any = np.float32) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(made.SerializeToString())
    (entry,) = session.get_inputs()
    x = np.random.default_rng(2).standard_normal([3, *entry.shape[1:]]).astype(dtype)
    return [np.asarray(value) for value in session.run(None, {"x": x})]


def check_portable(before: ModelProto, dtype: Any = np.float32) -> tuple[ModelProto, list[Layer]]:
    """Rewrite, and compare with the dense model bit for bit; the dense model must not change."""
    untouched = before.SerializeToString()
    layers = survey(before)
    after = sparsify(before, layers)
    assert before.SerializeToString() == untouched
    onnx.checker.check_model(after)
    for dense, portable in zip(evaluate(before, dtype), evaluate(after, dtype), strict=True):
        np.testing.assert_array_equal(dense, portable)
    sparse_names = [tensor.values.name for tensor in after.graph.sparse_initializer]
    assert sorted(sparse_names) == sorted({layer.name for layer in layers if layer.sparse})
    assert not set(sparse_names) & {tensor.name for tensor in after.graph.initializer}
    for tensor in after.graph.sparse_initializer:
        positions = numpy_helper.to_array(tensor.indices)
        assert tensor.indices.data_type == TensorProto.INT64
        assert positions.ndim == 1
        assert (np.diff(positions) > 0).all()
        assert ((positions >= 0) & (positions < np.prod(tensor.dims))).all()
        assert numpy_helper.to_array(tensor.values).all()
    return after, layers


FOREIGN: dict[str, tuple[ModelProto, list[tuple[str, str, bool]]]] = {
    "convolution": (
        model([node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], (4, 5, 5), {"w": sparse_weight(6, 4, 3, 3)}),
        [("w", "Conv", True)],
    ),
    "grouped": (
        model([node("Conv", ["x", "w"], ["y"], group=2)], (4, 5, 5), {"w": sparse_weight(6, 2, 3, 3)}),
        [("w", "Conv", True)],
    ),
    "depthwise": (
        model([node("Conv", ["x", "w"], ["y"], group=4)], (4, 5, 5), {"w": sparse_weight(4, 1, 3, 3)}),
        [("w", "Conv", True)],
    ),
    "transposed": (
        model([node("ConvTranspose", ["x", "w"], ["y"], group=2, strides=[2, 2])], (4, 5, 5),
              {"w": sparse_weight(4, 3, 3, 3)}),
        [("w", "ConvTranspose", True)],
    ),
    "weight on the left": (
        model([node("MatMul", ["w", "x"], ["y"])], (4, 5), {"w": sparse_weight(6, 4)}),
        [("w", "MatMul", True)],
    ),
    "behind Transpose": (
        model([node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], (3, 4), {"w": sparse_weight(6, 4)}),
        [("w", "MatMul", True)],
    ),
    "used twice": (
        model([node("Gemm", ["x", "w"], ["a"], name="one"), node("Gemm", ["a", "w"], ["y"], transB=1, name="two")],
              (5,), {"w": sparse_weight(5, 5)}),
        [("w", "Gemm", True), ("w", "Gemm", True)],
    ),
    "shared by two kinds": (
        model([node("Gemm", ["x", "w"], ["a"]), node("Gather", ["w", "i"], ["b"]), node("Add", ["a", "b"], ["y"])],
              (5,), {"w": sparse_weight(5, 5), "i": np.array(2)}),
        [("w", "Gemm", True), ("w", "Gather", True)],
    ),
    "in a Constant node": (
        model([node("Constant", [], ["w"], value=numpy_helper.from_array(sparse_weight(5, 6), "other name")),
               node("MatMul", ["x", "w"], ["y"])], (5,), {}),
        [("w", "MatMul", True)],
    ),
    "integer weight and scale": (
        model([node("DequantizeLinear", ["q", "s"], ["w"]), node("Conv", ["x", "w"], ["y"])], (4, 5, 5),
              {"q": with_density((6, 4, 3, 3), 20, np.int8), "s": np.array(0.1, np.float32)}),
        [("q", "Conv", True)],
    ),
    **{
        kind: (
            model([node(kind, ["x", "w", "r"], ["y"], hidden_size=5)], (3, 4),
                  {"w": sparse_weight(1, 5 * gates, 4), "r": sparse_weight(1, 5 * gates, 5)}),
            [("w", kind, True), ("r", kind, True)],
        )
        for kind, gates in {"LSTM": 4, "GRU": 3, "RNN": 1}.items()
    },
    "Einsum of several weights": (
        model([node("Einsum", ["w", "x", "v"], ["y"], equation="oi,nij,jk->nok")], (4, 5),
              {"w": sparse_weight(6, 4), "v": sparse_weight(5, 7)}),
        [("w", "Einsum", True), ("v", "Einsum", True)],
    ),
    "a table": (
        model([node("Cast", ["x"], ["i"], to=TensorProto.BOOL), node("Cast", ["i"], ["j"], to=TensorProto.INT64),
               node("Gather", ["w", "j"], ["y"])], (4,), {"w": sparse_weight(9, 7)}),
        [("w", "Gather", True)],
    ),
    "a table of positions": (
        model([node("Gather", ["p", "zero"], ["a"]), node("Gather", ["x", "a"], ["y"], axis=1)], (5,),
              {"p": np.zeros((2, 9), np.int64), "zero": np.array(0)}),
        [],
    ),
    "too dense": (
        model([node("Gemm", ["x", "w"], ["y"])], (5,), {"w": with_density((5, 6), 15)}), [("w", "Gemm", False)]
    ),
    "a graph output": (
        model([node("Gemm", ["x", "w"], ["y"])], (5,), {"w": sparse_weight(5, 6)}, ("y", "w")), [("w", "Gemm", False)]
    ),
    "no constant weight": (model([node("MatMul", ["x", "x"], ["y"])], (5, 5), {}), []),
    "a vector": (model([node("MatMul", ["x", "v"], ["y"])], (4, 5), {"v": np.zeros(5, np.float32)}), []),
    "all zero": (
        model([node("Gemm", ["x", "w"], ["y"])], (5,), {"w": np.zeros((5, 6), np.float32)}), [("w", "Gemm", True)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_every_pattern_computes_the_same_bits(case: str) -> None:
    before, expected = FOREIGN[case]
    _, layers = check_portable(before)
    assert [(layer.name, layer.op, layer.sparse) for layer in layers] == expected
    assert all(layer.reason for layer in layers)


def test_a_weight_used_twice_is_counted_once() -> None:
    first, second = survey(FOREIGN["used twice"][0])
    assert (first.nnz, first.size, first.dense_bytes, first.bytes) == (2, 25, 100, 24)
    assert (second.nnz, second.size, second.dense_bytes, second.bytes) == (2, 25, 0, 0)
    assert second.reason == "same weight as in 'one'"
    assert sparsity([first, second]) == pytest.approx(1 - 2 / 25)


@pytest.mark.parametrize("ir_version", [3, 4, 8])
def test_weights_that_are_inputs_of_the_graph_stop_being_inputs(ir_version: int) -> None:
    """Before IR version 4 every initializer had to be listed as an input; newer files may still do it."""
    constants = {"w": sparse_weight(5, 6), "b": np.ones(6, np.float32)}
    gemm = node("Gemm", ["x", "w", "b"], ["y"])
    before = model([gemm], (5,), constants, inputs=("w", "b"), ir_version=ir_version, opset=9)
    after, (layer,) = check_portable(before)
    assert [value.name for value in after.graph.input] == ["x", "b"]
    assert "no input of the network any more" in layer.reason
    assert after.ir_version == ir_version


def branch(name: str, *nodes: NodeProto, **constants: NDArray[Any]) -> GraphProto:
    tensors = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    return helper.make_graph(
        list(nodes), name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6])], tensors
    )


def test_weights_of_subgraphs_are_listed_and_left_alone() -> None:
    choice = node(
        "If", ["yes"], ["z"], name="choice",
        then_branch=branch("t", node("MatMul", ["x", "inner"], ["t"]), inner=sparse_weight(5, 6)),
        else_branch=branch("e", node("MatMul", ["x", "outer"], ["e"])),
    )  # fmt: skip
    nodes = [node("MatMul", ["x", "free"], ["a"]), choice, node("Add", ["a", "z"], ["y"])]
    constants = {"free": sparse_weight(5, 6), "outer": sparse_weight(5, 6), "yes": np.array(True)}
    after, layers = check_portable(model(nodes, (5,), constants))
    assert {layer.name: layer.sparse for layer in layers} == {"free": True, "inner": False, "outer": False}
    assert {layer.name: layer.reason for layer in layers[1:]} == {
        name: f"inside of the {place}_branch of If 'choice', which is left alone"
        for name, place in (("inner", "then"), ("outer", "else"))
    }
    assert next(entry for entry in after.graph.node if entry.op_type == "If") == choice


def test_a_weight_that_a_subgraph_uses_too_stays_dense() -> None:
    choice = node(
        "If", ["yes"], ["z"],
        then_branch=branch("t", node("MatMul", ["x", "w"], ["t"])),
        else_branch=branch("e", node("MatMul", ["x", "w"], ["e"])),
    )  # fmt: skip
    nodes = [node("MatMul", ["x", "w"], ["a"], name="outside"), choice, node("Add", ["a", "z"], ["y"])]
    _, layers = check_portable(model(nodes, (5,), {"w": sparse_weight(5, 6), "yes": np.array(True)}))
    assert [layer.sparse for layer in layers] == [False] * 3
    assert layers[0].reason == "a subgraph uses it, too"
    assert {layer.reason for layer in layers[1:]} == {"same weight as in 'outside'"}
    assert [layer.dense_bytes for layer in layers] == [120, 0, 0]


def test_weights_of_functions_are_listed_and_left_alone() -> None:
    constant = node("Constant", [], ["w"], value=numpy_helper.from_array(sparse_weight(5, 6), "w"))
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function(
        "own", "Dense", ["a"], ["b"], [constant, node("MatMul", ["a", "w"], ["b"])], opset_imports=imports
    )
    made = model([node("Identity", ["x"], ["y"])], (5,), {})
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.graph.node[0].CopyFrom(node("Dense", ["x"], ["y"], domain="own"))
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6
    after, (layer,) = check_portable(made)
    assert after == made
    assert (layer.sparse, layer.reason) == (False, "inside of the function 'Dense', which is left alone")


# Break-even by hand: an index has 8 bytes, so k nonzeros cost k * (8 + v) against n * v; 120 values in all.
BREAK_EVEN = {np.float32: 40, np.float64: 60, np.float16: 24, np.int8: 120 / 9}


@pytest.mark.parametrize("dtype", BREAK_EVEN)
def test_sparse_below_the_break_even_and_dense_from_it_on(dtype: Any) -> None:
    limit = BREAK_EVEN[dtype]
    below, at = int(np.ceil(limit)) - 1, int(np.ceil(limit))
    for nonzeros, expected in ((below, True), (at, False)):
        tensor = numpy_helper.from_array(with_density((10, 12), nonzeros, dtype), "w")
        graph = GraphProto(node=[node("MatMul", ["x", "w"], ["y"])], initializer=[tensor])
        (layer,) = survey(ModelProto(graph=graph))
        width = np.dtype(dtype).itemsize
        assert layer.sparse is expected
        assert layer.dense_bytes == 120 * width
        assert layer.bytes == (nonzeros * (8 + width) if expected else 120 * width)
        assert layer.sparsity == pytest.approx(1 - nonzeros / 120)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_types_that_onnxruntime_reads_sparse(dtype: Any) -> None:
    tensor_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = model([node("MatMul", ["x", "w"], ["y"])], (5,), {"w": with_density((5, 6), 2, dtype)}, dtype=tensor_type)
    after, _ = check_portable(made, dtype)
    assert after.graph.sparse_initializer[0].values.data_type == tensor_type


def test_a_type_that_onnxruntime_does_not_read_sparse_stays_dense() -> None:
    tensor = helper.make_tensor("w", TensorProto.INT16, (8, 8), np.zeros(64, np.int16))
    graph = GraphProto(node=[node("MatMulInteger", ["x", "w"], ["y"])], initializer=[tensor])
    (layer,) = survey(ModelProto(graph=graph))
    assert (layer.sparse, layer.reason) == (False, "onnxruntime reads no sparse INT16")


def test_negative_zeros_count_as_zeros_and_nan_does_not() -> None:
    values = np.full((8, 8), -0.0, np.float32)
    values[3, 4], values[0, 1] = np.nan, 5
    made = ModelProto(graph=GraphProto(node=[node("MatMul", ["x", "w"], ["y"])],
                                       initializer=[numpy_helper.from_array(values, "w")]))  # fmt: skip
    (layer,) = survey(made)
    assert (layer.nnz, layer.sparse) == (2, True)
    assert numpy_helper.to_array(sparse_tensor(made.graph.initializer[0]).indices).tolist() == [1, 28]


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float16, np.int8]),
        arrays.array_shapes(min_dims=2, max_dims=4, max_side=4),
        elements=st.sampled_from([0, 0, 0, 1, -2, 100]),
    )
)
def test_a_sparse_tensor_gives_back_every_value(values: NDArray[Any]) -> None:
    sparse = sparse_tensor(numpy_helper.from_array(values, "w"))
    rebuilt = np.zeros(values.size, values.dtype)
    np.add.at(rebuilt, numpy_helper.to_array(sparse.indices), numpy_helper.to_array(sparse.values))
    assert sparse.values.name == "w"
    assert sparse.values.data_type == helper.np_dtype_to_tensor_dtype(values.dtype)
    assert tuple(sparse.dims) == values.shape
    np.testing.assert_array_equal(rebuilt.reshape(values.shape), values)


def test_the_file_shrinks_as_the_rows_say() -> None:
    made = model([node("Gemm", ["x", "w"], ["y"])], (200,), {"w": with_density((200, 100), 1000)})
    after, (layer,) = check_portable(made)
    saved = len(made.SerializeToString()) - len(after.SerializeToString())
    assert saved == pytest.approx(layer.dense_bytes - layer.bytes, abs=60)


def test_metadata_is_added_to_and_replaced() -> None:
    made = FOREIGN["convolution"][0]
    copy = ModelProto()
    copy.CopyFrom(made)
    stamp(copy, {"a": "1", "b": "2"})
    stamp(copy, {"b": "3"})
    assert {entry.key: entry.value for entry in copy.metadata_props} == {"a": "1", "b": "3"}


def test_a_file_over_the_limit_is_refused_with_advice() -> None:
    made = FOREIGN["convolution"][0]
    size = len(made.SerializeToString())
    assert len(serialise(made, where="m", limit=size)) == size
    with pytest.raises(GraphError, match=r"m: The model has more than 2 GB.*portable target alone"):
        serialise(made, where="m", limit=size - 1)


def test_an_invalid_file_is_not_serialised() -> None:
    copy = ModelProto()
    copy.CopyFrom(FOREIGN["convolution"][0])
    copy.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 999  # only the full check sees this
    with pytest.raises(GraphError, match="not valid ONNX"):
        serialise(copy, where="m", source=FOREIGN["convolution"][0])
    # A source that says so itself is one that onnxruntime only warns of.
    assert serialise(copy, where="m", source=copy) == copy.SerializeToString()
    copy.graph.node[0].input[0] = "nowhere"
    with pytest.raises(GraphError, match=r"not valid ONNX.*nowhere"):
        serialise(copy, where="m", source=copy)
