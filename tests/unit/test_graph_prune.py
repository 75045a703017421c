"""Random zeros in ONNX models: exact counts and patterns, and what stays dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.benchmark import networks
from sparsepipe.errors import GraphError
from sparsepipe.formats.patterns import followed
from sparsepipe.graph.load import check
from sparsepipe.graph.prune import block_shape, prune
from sparsepipe.runtime import run, session


def model_of(nodes: list[onnx.NodeProto], weights: dict[str, Any], shape: list[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def weights_of(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


CONVOLUTIONS = (
    [
        helper.make_node("Conv", ["x", "stem"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "depthwise"], ["b"], pads=[1] * 4, group=16),
        helper.make_node("Conv", ["b", "conv"], ["c"], pads=[1] * 4),
        helper.make_node("ConvTranspose", ["c", "up"], ["d"]),
        helper.make_node("Conv", ["d", "odd"], ["y"]),
    ],
    {
        "stem": normal(16, 3, 3, 3),
        "depthwise": normal(16, 1, 3, 3),
        "conv": normal(32, 16, 3, 3),
        "up": normal(32, 8, 2, 2),
        "odd": normal(10, 8, 1, 1),
    },
    [1, 3, 8, 8],
)


@pytest.mark.parametrize(("pattern", "size"), [("unstructured", 1), ("2x1", 2), ("4x1", 4), ("4x4", 16)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
def test_counts_are_exact_and_blocks_whole(pattern: str, size: int, sparsity: float) -> None:
    pruned, rows = prune(model_of(*CONVOLUTIONS), sparsity, pattern)
    weights = weights_of(pruned)
    groups = 32 * 16 * 9 // size
    assert np.count_nonzero(weights["conv"]) == round((1 - sparsity) * groups) * size
    if size > 1 and sparsity:
        assert pattern in followed(weights["conv"])
        assert pattern in followed(weights["up"].swapaxes(0, 1))  # stored as [I, O, *kernel]
    assert {row.name: row.nnz for row in rows} == {name: np.count_nonzero(value) for name, value in weights.items()}


def test_stem_depthwise_kernels_and_what_a_block_does_not_fit_stay_dense_bit_for_bit() -> None:
    original = CONVOLUTIONS[1]
    pruned, rows = prune(model_of(*CONVOLUTIONS), 0.9, "4x1")
    weights = weights_of(pruned)
    dense = {row.name: row.reason for row in rows if row.reason is not None}
    assert dense.keys() == {"stem", "depthwise", "odd"}
    assert "first convolution" in str(dense["stem"])
    assert "depthwise" in str(dense["depthwise"])
    assert "10 outputs" in str(dense["odd"])
    assert all(np.array_equal(weights[name], original[name]) for name in dense)
    # the same one fits no block, but is pruned unstructured
    assert np.count_nonzero(weights_of(prune(model_of(*CONVOLUTIONS), 0.9, "unstructured")[0])["odd"]) == 8


@pytest.mark.parametrize(
    ("nodes", "shape", "outputs_first"),
    [
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], (8, 12), True),
        ([helper.make_node("Gemm", ["x", "w"], ["y"])], (12, 8), False),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], (12, 8), False),
        (
            [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])],
            (8, 12),
            True,
        ),
        ([helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("Gemm", ["x", "t"], ["y"])], (8, 12), True),
    ],
)
def test_blocks_lie_along_the_outputs_however_the_weight_is_stored(
    nodes: list[onnx.NodeProto], shape: tuple[int, int], outputs_first: bool
) -> None:
    pruned, _ = prune(model_of(nodes, {"w": normal(*shape)}, [5, 12]), 0.5, "4x1")
    weight = weights_of(pruned)["w"]
    assert np.count_nonzero(weight) == 48
    assert "4x1" in followed(weight if outputs_first else weight.T)


def test_a_weight_used_twice_gets_one_mask_and_keeps_its_variance() -> None:
    weight = normal(64, 64)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    pruned, rows = prune(model_of(nodes, {"w": weight}, [5, 64]), 0.75, "unstructured")
    after = weights_of(pruned)["w"]
    assert len(rows) == 1
    assert np.count_nonzero(after) == 1024
    kept = after != 0
    np.testing.assert_allclose(after[kept], weight[kept] * 2, rtol=1e-6)  # 1 / sqrt(1 / 4)


def test_the_weight_of_a_constant_node_is_pruned_in_place() -> None:
    value = numpy_helper.from_array(normal(8, 12), "anything")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    pruned, _ = prune(model_of(nodes, {}, [5, 12]), 0.5, "unstructured")
    assert np.count_nonzero(numpy_helper.to_array(pruned.graph.node[0].attribute[0].t)) == 48


def test_other_patterns_and_networks_without_weights_are_refused() -> None:
    for pattern in ("2:4", "4x", "0x1", "channel", ""):
        with pytest.raises(GraphError, match="4x1"):
            block_shape(pattern)
    only_stem = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": normal(8, 3, 3, 3)}, [1, 3, 8, 8])
    with pytest.raises(GraphError, match="first convolution"):
        prune(only_stem, 0.5, "unstructured")
    with pytest.raises(GraphError, match="it has none"):
        prune(model_of([helper.make_node("Relu", ["x"], ["y"])], {}, [1, 3]), 0.5, "unstructured")


def test_the_same_seed_makes_the_same_zeros_and_the_model_given_is_left_alone() -> None:
    model = model_of(*CONVOLUTIONS)
    before = model.SerializeToString()
    first, second = (prune(model, 0.9, "2x1", seed=3)[0].SerializeToString() for _ in range(2))
    assert first == second
    assert first != prune(model, 0.9, "2x1", seed=4)[0].SerializeToString()
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["resnet50", "mobilenet-v1", "vgg19", "resnet20"])
def test_networks_of_the_suite_have_as_many_weights_as_those_that_are_trained(name: str) -> None:
    pytest.importorskip("torch")
    from sparsepipe.models.registry import MODELS, create

    info = MODELS[name]
    network = create(name, input_shape=info.input_shape, classes=info.classes)
    expected = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert sum(value.size for value in weights_of(networks.build(name)).values() if value.ndim > 1) == expected


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mlp", 1024 * 4096 + 2 * 4096**2 + 4096 * 10), ("encoder", 4 * (4 * 768**2 + 2 * 768 * 3072))],
)
def test_linear_networks_of_the_suite_have_the_weights_of_their_titles(name: str, weights: int) -> None:
    model = networks.build(name)
    check(model, where=name, full=True)
    assert sum(value.size for value in weights_of(model).values() if value.ndim > 1) == weights


def test_activations_of_a_pruned_network_neither_die_nor_overflow() -> None:
    inputs = {"input": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    model = networks.build("resnet20")
    (dense,) = run(session(model.SerializeToString()), inputs)
    for sparsity in (0.5, 0.98):
        pruned, _ = prune(model, sparsity, "4x1")
        (sparse,) = run(session(pruned.SerializeToString()), inputs)
        assert np.isfinite(sparse).all()
        assert 0.05 < sparse.std() / dense.std() < 20
