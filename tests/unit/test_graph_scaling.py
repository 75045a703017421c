"""Work on a graph grows as the graph does: calls are counted, which are the same on every machine."""

from __future__ import annotations

import cProfile
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph.fold import fold
from sparsepipe.graph.opset import convert
from sparsepipe.graph.restore import restore
from sparsepipe.graph.universal import choose, rewrite

SMALL, LARGE = 10, 40
WIDTH = 64
RANDOM = np.random.default_rng(6)
node = helper.make_node


def chain(steps: Callable[[str, int], list[NodeProto]], count: int, **weights: tuple[int, ...]) -> ModelProto:
    """`count` times the same nodes one after another, each time with weights of their own, nearly all zeros."""
    nodes: list[NodeProto] = []
    tensors = []
    for place in range(count):
        nodes += steps(nodes[-1].output[0] if nodes else "x", place)
        for name, shape in weights.items():
            value = RANDOM.standard_normal(shape) * (RANDOM.random(shape) < 0.02)
            tensors.append(
                numpy_helper.from_array(value.astype(np.float32) ** 2 + 1e-30 * (name == "v"), f"{name}{place}")
            )
    nodes.append(node("Neg", [nodes[-1].output[0]], ["y"]))
    shape = ["n", WIDTH, 8, 8] if "Conv" in {entry.op_type for entry in nodes} else ["n", 64, WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def identities(count: int) -> ModelProto:
    return chain(lambda x, i: [node("Identity", [x], [f"i{i}"]), node("Tanh", [f"i{i}"], [f"t{i}"])], count)


def norms(count: int) -> ModelProto:
    def steps(x: str, i: int) -> list[NodeProto]:
        norm = node("BatchNormalization", [f"c{i}", f"v{i}", f"v{i}", f"v{i}", f"v{i}"], [f"b{i}"])
        return [node("Conv", [x, f"w{i}"], [f"c{i}"]), norm]

    return chain(steps, count, w=(WIDTH, WIDTH, 1, 1), v=(WIDTH,))


def linear(count: int) -> ModelProto:
    def steps(x: str, i: int) -> list[NodeProto]:
        return [
            node("MatMul", [x, f"w{i}"], [f"m{i}"]),
            node("Relu", [f"m{i}"], [f"r{i}"]),
            node("Tanh", [f"r{i}"], [f"t{i}"]),
        ]

    return chain(steps, count, w=(WIDTH, WIDTH))


def shapes(count: int) -> ModelProto:
    def steps(x: str, i: int) -> list[NodeProto]:
        return [node("Shape", [x], [f"s{i}"], start=0, end=3), node("Reshape", [x, f"s{i}"], [f"r{i}"])]

    return chain(steps, count)


def universal(count: int) -> ModelProto:
    model = linear(count)
    return rewrite(model, choose(model, "avx512"))


CASES: dict[str, tuple[Callable[[int], ModelProto], Callable[[ModelProto], object]]] = {
    "pass-through nodes": (identities, fold),
    "batch normalisations": (norms, fold),
    "choose": (linear, lambda model: choose(model, "avx512")),
    "rewrite": (linear, lambda model: rewrite(model, choose(model, "avx512"))),
    "restore": (universal, lambda model: restore(model, where="", limit=2**30)),
    "lower": (shapes, lambda model: convert(model, 13, where="")),
}


def calls(work: Callable[[ModelProto], object], model: ModelProto) -> int:
    profile = cProfile.Profile()
    profile.enable()
    work(model)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("case", CASES)
def test_the_work_is_linear_in_the_layers(case: str) -> None:
    make, work = CASES[case]
    work(make(1))  # what happens once in a process
    small, large = (calls(work, make(count)) for count in (SMALL, LARGE))
    assert large < 1.25 * LARGE / SMALL * small
