"""One-layer models timed side by side, as their layer runs inside of a network.

Inside of a network, dense convolutions follow one another in onnxruntime's blocked layout (NCHWc): the changes of
layout belong to the first and the last of them, so a model is timed without. And the weights of a network rarely stay
in the L2 cache from one call to the next: several copies of the layer run in turn, each with weights of its own. What
a call costs besides (Python, the session) is measured with a model that does nothing, and left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper

from sparsepipe.benchmark.interleaved import interleave
from sparsepipe.errors import GraphError, one_line
from sparsepipe.runtime.sessions import session

NCHWC = "com.microsoft.nchwc"
WEIGHT_BYTES = 8 << 20
"""Bytes of dense weights that the copies of a layer shall have together, about: more than an L2 cache holds."""
MOST_COPIES = 8
BLOCK_NS = 5_000_000
"""CPU time of a block of calls: single layers are short, and there are many of them."""
LINE_BYTES = 64
"""Of a cache line."""
Shape = tuple[int, ...]


def copies_of(weight_bytes: int) -> int:
    """How many copies of a layer with a dense weight of this size are timed together."""
    return max(1, min(MOST_COPIES, round(WEIGHT_BYTES / max(weight_bytes, 1))))


def layer_times(
    dense: ModelProto,
    sparse: Sequence[ModelProto],
    inputs: Mapping[str, Shape],
    seconds: float,
    *,
    copies: int = 1,
    rounds: int = 3,
) -> list[float]:
    """Nanoseconds of CPU time of each model with one thread: the best decile of calls in turn, for one copy.

    Args:
        dense: with these inputs (float32), as onnxruntime runs it without the kernel library.
        sparse: the same layer as operators of the kernel library.
        inputs: name -> shape.
        seconds: wall time for all of them together.
        copies: of each model, that run in one call.
        rounds: turns that are run at least.

    Returns:
        The time of `dense`, then those of `sparse`.

    Raises:
        GraphError: onnxruntime cannot run a model.
    """
    random = np.random.default_rng(0)
    values = {name: aligned(random.standard_normal(shape).astype(np.float32)) for name, shape in inputs.items()}
    networks = [repeated(model, copies) for model in (without_layout_changes(dense), *sparse)]
    calls = [bound_call(network, values, optimise=False) for network in (*networks, _nothing(inputs))]
    timings = interleave(calls, seconds, rounds=rounds, block_ns=BLOCK_NS)
    *times, overhead = (timing.best_decile for timing in timings)
    return [max(time - overhead, 1.0) / copies for time in times]


def aligned(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy at the start of a cache line, where onnxruntime puts its tensors; NumPy's own may be anywhere.

    Kernels that read it in place would otherwise load across lines, as they never do inside of a network.
    """
    buffer = np.empty(value.nbytes + LINE_BYTES, np.uint8)
    start = -buffer.ctypes.data % LINE_BYTES
    copy = buffer[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


def without_layout_changes(model: ModelProto) -> ModelProto:
    """The model as onnxruntime optimises it on this machine, without changes to and from its blocked layout.

    What it computes is then another permutation of the channels: good for timing alone.
    """
    result = optimised(model)
    graph = result.graph
    same: dict[str, str] = {}
    for node in [node for node in graph.node if node.domain == NCHWC and node.op_type.startswith("Reorder")]:
        inner, outer = (node.output, node.input) if node.op_type == "ReorderInput" else (node.input, node.output)
        same[inner[0]] = outer[0]
        graph.node.remove(node)
    _rename(graph, lambda name: same.get(name, name))
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    return result


def optimised(model: ModelProto) -> ModelProto:
    """The model as onnxruntime optimises it on this machine without the kernel library; it runs here only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model.SerializeToString(), library=False, optimized_model_filepath=str(path))
        result = onnx.load(path)
    del result.functions[:]
    return result


def repeated(model: ModelProto, copies: int) -> ModelProto:
    """`copies` of the graph side by side on the same inputs, each with its own weights and outputs."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    inputs = {value.name for value in graph.input}
    for number in range(1, copies):
        other = GraphProto()
        other.CopyFrom(model.graph)
        _rename(other, lambda name, ending=f"/{number}": name if name in inputs or not name else name + ending)  # type: ignore[misc]
        graph.node.extend(other.node)
        graph.initializer.extend(other.initializer)
        graph.output.extend(other.output)
    return result


def _rename(graph: GraphProto, new: Callable[[str], str]) -> None:
    for node in graph.node:
        node.name = ""  # two of one name would be refused
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for entry in (*graph.initializer, *graph.output):
        entry.name = new(entry.name)


def _nothing(inputs: Mapping[str, Shape]) -> ModelProto:
    """A model with these inputs that computes as good as nothing."""
    graph = helper.make_graph(
        [helper.make_node("Shape", [next(iter(inputs))], ["y"])],
        "nothing",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bound_call(model: ModelProto, values: Mapping[str, Any], *, optimise: bool = True) -> Callable[[], None]:
    """A call of a session with one thread that copies nothing: its inputs and outputs are bound.

    Args:
        model: to be called.
        values: its inputs.
        optimise: whether onnxruntime optimises it; otherwise it runs as it is.

    Raises:
        GraphError: onnxruntime cannot run it.
    """
    level = onnxruntime.GraphOptimizationLevel
    opened = session(
        model.SerializeToString(),
        graph_optimization_level=level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL,
    )
    binding = opened.io_binding()
    names = [output.name for output in opened.get_outputs()]
    try:
        for name, value in values.items():
            binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu")
        opened.run_with_iobinding(binding)
        for name, value in zip(names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
    except Exception as error:  # onnxruntime's errors have no common base class
        raise GraphError(f"onnxruntime cannot run it: {one_line(error)}") from error
    return lambda: opened.run_with_iobinding(binding)
