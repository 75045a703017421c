"""Small graphs, and the check that every test of the universal target makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph.finish import serialise
from sparsepipe.graph.universal import Choice, choose, rewrite
from sparsepipe.runtime import run, session

Array = NDArray[Any]
RANDOM = np.random.default_rng(5)


def weight(*shape: int, density: float = 0.1, block: int = 1) -> Array:
    """Random values, zero but for a share of the blocks of consecutive outputs; the first dimension is the output."""
    kept = np.repeat(RANDOM.random((shape[0] // block, *shape[1:])) < density, block, axis=0)
    return (RANDOM.standard_normal(shape) * kept).astype(np.float32)


def model(
    nodes: list[NodeProto],
    shape: tuple[int | str | None, ...],
    constants: dict[str, Array],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 18,
    ir_version: int = 8,
    inputs: tuple[str, ...] = (),
) -> ModelProto:
    tensors = {name: numpy_helper.from_array(value, name) for name, value in constants.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape]),
            *[helper.make_tensor_value_info(name, tensors[name].data_type, tensors[name].dims) for name in inputs],
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(tensors.values()),
    )
    imports = [helper.make_opsetid("", opset)]
    made = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=ir_version))
    onnx.checker.check_model(made, full_check=True)
    return made


def check(before: ModelProto, side: int = 9, batches: tuple[int, ...] = (1, 3)) -> tuple[ModelProto, dict[str, Choice]]:
    """Rewrite, and compare with the dense model; the dense model must not change."""
    untouched = before.SerializeToString()
    choices = choose(before)
    after = rewrite(before, choices)
    assert before.SerializeToString() == untouched
    data = serialise(after, where="test")
    ways = [session(data), session(data, library=False)]
    dense = session(untouched)
    entry = dense.get_inputs()[0]
    for batch in batches:
        dims = [batch, *[size if isinstance(size, int) else side for size in entry.shape[1:]]]
        x = {entry.name: np.random.default_rng(2).standard_normal(dims).astype(np.float32)}
        expected = run(dense, x)
        for way in ways:
            for found, wanted in zip(run(way, x), expected, strict=True):
                assert found.shape == wanted.shape
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1e-30, float(np.abs(wanted).max())))
    return after, {choice.output or choice.node: choice for choice in choices}


def ops(made: ModelProto) -> list[str]:
    return [entry.op_type for entry in made.graph.node]
