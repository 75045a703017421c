"""Single layers of a network as models of their own, in each form that the kernels can run them in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto, NodeProto, TensorProto, helper

from sparsepipe.graph import cost
from sparsepipe.graph.choice import Choice
from sparsepipe.graph.index import Index, copy, index
from sparsepipe.graph.sizes import Sizes
from sparsepipe.graph.universal import rewrite
from sparsepipe.native import operators

SOME_ROWS = range(2, 16)
"""Rows of a linear layer for which either mode may be the faster one."""
HOPELESS = 1.5
"""A layer that is predicted to take so many times the dense time is not tried."""
NEAR_BEST = 1.3
"""Nor is a block that is predicted to take so many times what the best one takes."""
DENSITY_STEPS = 4
"""Layers whose stored shares differ by less than a factor of 2 ** (1 / 4) share a measurement."""


@dataclass(frozen=True)
class Form:
    """A layer alone, sparse: rows of its blocks, mode, and the model."""

    block: int
    mode: str
    model: ModelProto

    @property
    def kernel(self) -> str:
        """The operator without what is fused into it."""
        op_type = self.model.graph.node[0].op_type
        return operators.BASES[op_type]

    @property
    def bytes(self) -> int:
        """Of the values and of where they are."""
        values, deltas = self.model.graph.initializer[:2]
        delta_bytes = helper.tensor_dtype_to_np_dtype(deltas.data_type).itemsize
        return int(4 * math.prod(values.dims) + delta_bytes * math.prod(deltas.dims))


@dataclass(frozen=True)
class Candidate:
    """A layer that could go sparse.

    Attributes:
        choice: what the cost model made of it.
        inputs: of the layer alone, name -> shape.
        forms: to be timed; without the library the first is the dense layer.
        key: equal for layers that take the same time.
    """

    choice: Choice
    inputs: Mapping[str, tuple[int, ...]]
    forms: Sequence[Form]
    key: tuple[object, ...]


def candidates_of(model: ModelProto, choices: Sequence[Choice], sizes: Sizes) -> list[Candidate]:
    """The layers that may be faster sparse and whose inputs have known sizes, in the order of `choices`.

    Args:
        model: what `choices` were made for.
        choices: as `universal.choose` gives them.
        sizes: of the model's tensors, for the inputs that it shall be timed with.
    """
    found = index(model.graph)
    forms: dict[str, dict[int, Form]] = {}
    for block in cost.BLOCKS:
        forced = [
            replace(choice, sparse=True, block=block, mode="auto")
            for choice in choices
            if choice.predicted.get(block, math.inf) < _limit(choice)
        ]
        rewritten = rewrite(model, forced)
        constants = {tensor.name: tensor for tensor in rewritten.graph.initializer}
        made = {node.output[0]: node for node in rewritten.graph.node if node.domain == operators.DOMAIN}
        for choice in forced:
            node = _made_of(choice.output, made, found)
            if node is None:
                continue
            inputs = {name: sizes.get(name, ()) for name in node.input if name and name not in constants}
            if all(shape and None not in shape for shape in inputs.values()):
                forms.setdefault(choice.output, {})[block] = Form(
                    block, "auto", _alone(rewritten, node, constants, inputs)
                )
    return [_candidate(choice, forms[choice.output]) for choice in choices if choice.output in forms]


def _limit(choice: Choice) -> float:
    best = min(choice.predicted.values(), default=math.inf)
    return NEAR_BEST * best if best < HOPELESS else 0.0


def _made_of(output: str, made: Mapping[str, NodeProto], found: Index) -> NodeProto | None:
    """The operator that stands for the node with this output, and perhaps for some that follow it."""
    while output not in made:
        users = found.consumers.get(output, [])
        if len(users) != 1 or not users[0].output:
            return None
        output = users[0].output[0]
    return made[output]


def _alone(
    model: ModelProto, node: NodeProto, constants: Mapping[str, TensorProto], inputs: Mapping[str, Sequence[int | None]]
) -> ModelProto:
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        [constants[name] for name in node.input if name in constants],
    )
    bodies = [function for function in model.functions if function.name == node.op_type]
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=bodies)


def _candidate(choice: Choice, forms: Mapping[int, Form]) -> Candidate:
    """All forms of one layer: each block, and the likeliest one in each mode, too."""
    likeliest = forms[min(forms, key=lambda block: choice.predicted[block])]
    node = likeliest.model.graph.node[0]
    inputs = {
        value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in likeliest.model.graph.input
    }
    modes = [_in_mode(likeliest, mode) for mode in _modes(likeliest, inputs[node.input[0]])]
    blocks = [max(form.model.graph.initializer[0].dims[0], 1) for form in forms.values()]
    kept = [round(DENSITY_STEPS * math.log2(count)) for count in blocks]
    attributes = sorted(str(found) for found in node.attribute if found.name != "block")
    key = (node.op_type, *attributes, *inputs.values(), *forms, *kept)
    return Candidate(choice, inputs, [*forms.values(), *modes], key)


def _modes(form: Form, shape: Sequence[int]) -> tuple[str, ...]:
    """The modes that may suit this layer, where there are several; `shape` is that of its input."""
    if form.kernel == "SparseLinear":
        return ("vector", "tiles") if math.prod(shape[:-1]) in SOME_ROWS else ()
    window = {found.name: list(found.ints) for found in form.model.graph.node[0].attribute if found.ints}
    point = all(size == 1 for name in ("kernel_shape", "strides") for size in window[name]) and not any(window["pads"])
    return ("direct", "flat") if point else ("rows", "columns", "shift")


def _in_mode(form: Form, mode: str) -> Form:
    model = copy(form.model)
    for found in model.graph.node[0].attribute:
        if found.name == "mode":
            found.i = operators.MODES[form.kernel].index(mode)
    return Form(form.block, mode, model)
