"""Which nodes of a graph become operators of the kernel library: a row for every node with a constant weight, and why.

The cost model (`cost`, `verdict`) says what each layer gains alone. Then what depends on the others: a weight that
several nodes share goes sparse in all of them or in none, some dense convolutions go by their neighbours, and layers
whose gain the changes of layout around them would eat (`balance`) stay dense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from sparsepipe.graph import beside, cost
from sparsepipe.graph.balance import worth_it
from sparsepipe.graph.beside import Neighbours, Spans
from sparsepipe.graph.index import Index, index, label, opset
from sparsepipe.graph.kernel_layer import KernelLayer, Stays, dense_kernel, read, steps, users
from sparsepipe.graph.layout import Layout
from sparsepipe.graph.select import uses
from sparsepipe.graph.sizes import Sizes
from sparsepipe.graph.verdict import ANY_ISA, Network, judge
from sparsepipe.native import operators

OLDEST_OPSET = 13  # of the fallback bodies


@dataclass(frozen=True)
class Choice:
    """What becomes of one node with a constant weight.

    Attributes:
        name: name of the stored weight.
        node: what the node is called.
        op: its operator.
        shape: shape of the weight as it was stored.
        nnz: values that are not zero.
        size: all values.
        sparsity: share of zeros.
        dense_bytes: bytes of the values stored dense.
        bytes: bytes as stored.
        sparse: whether a sparse kernel takes the node's place.
        block: rows of its blocks; 0 for a dense layer.
        reason: why.
        output: name of the node's output; empty where the node is inside of a subgraph or function.
        kernel: the operator of the library that takes the node's place; empty where it stays. The two convolutions of
            a SparseSeparableConv both have that.
        mode: how the kernel shall read the input, of `operators.MODES`; "auto" leaves it to the kernel.
        predicted: rows of a block -> time of the sparse layer by the cost model, in times of the dense one; empty where
            it stays dense whatever it takes.
        measured: the same for the best block, as it was timed on this machine; None where it was not.
        dense_us: microseconds of the dense layer at batch 1: timed, or by the cost model for the machine that it was
            fitted on; 0 where `predicted` is empty.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    nnz: int
    size: int
    sparsity: float
    dense_bytes: int
    bytes: int
    sparse: bool
    block: int
    reason: str
    output: str
    kernel: str = ""
    mode: str = "auto"
    predicted: Mapping[int, float] = field(default_factory=dict)
    measured: float | None = None
    dense_us: float = 0.0

    @property
    def relative(self) -> float:
        """Time of a sparse layer in times of the dense one, on the safe side: as measured, or predicted with margin."""
        return self.predicted[self.block] / cost.pays_below() if self.measured is None else self.measured


def choose(model: ModelProto, isa: str = ANY_ISA) -> list[Choice]:
    """A row for each node with a constant weight, in the order of the graph; subgraphs and functions last.

    The bytes of a weight that several nodes use are counted in the first row.

    Args:
        model: without batch normalisations, so that what follows a layer can become part of it.
        isa: the instruction set that the file is for, a key of `cost.ISAS`; `any` for a file that may run anywhere.
    """
    found = index(model.graph)
    network = Network.of(model)
    inputs = {value.name for value in model.graph.input}
    choices = []
    keys = []
    for use in uses(model):
        keys.append(use.key)
        try:
            if use.place:
                raise Stays(f"inside of {use.place}, which is left alone")
            if opset(model) < OLDEST_OPSET:
                raise Stays(f"opset {opset(model)} is older than {OLDEST_OPSET}")
            if use.weight.name in inputs:
                raise Stays("the weight is an input of the network")
            layer = read(use.node, found)
            verdict = judge(layer, network, isa)
            choice = as_it_is(use.node, use.weight, verdict.reason)
            choice = replace(choice, predicted=verdict.times, dense_us=round(verdict.dense / 1e3, 3))
            choices.append(_sparse(choice, layer, verdict.block) if verdict.block else choice)
        except Stays as reason:
            choice = as_it_is(use.node, use.weight, str(reason))
            choices.append(replace(choice, output="") if use.place else choice)
    return counted_once(balanced(model, choices, network.sizes), keys)


def settle(model: ModelProto, choices: Sequence[Choice]) -> list[Choice]:
    """The rows with what follows from other rows: shared weights, and dense convolutions beside sparse layers."""
    return _settled(choices, Spans(model.graph), opset(model))


def _settled(choices: Sequence[Choice], spans: Spans, version: int) -> list[Choice]:
    nodes, found = spans.found.producers, spans.found
    choices = _all_or_none(choices, found)
    dense = [nodes[row.output] for row in choices if not row.sparse and row.output in nodes]
    neighbours = Neighbours(
        [nodes[row.output] for row in choices if row.sparse],
        [node for node in dense if dense_kernel(node, found)],
        spans,
    )
    settled = []
    separable = set()  # outputs of sparse layers that a depthwise convolution is fused with
    for choice in choices:
        node = nodes.get(choice.output)
        kernel = None if node is None or choice.sparse else dense_kernel(node, found)
        if node is not None and kernel is not None and version >= OLDEST_OPSET:
            choice, pointwise = _dense(choice, node, kernel, neighbours)
            separable.add(pointwise)
        elif not choice.sparse:
            choice = replace(choice, kernel="")
        elif choice.kernel == beside.SEPARABLE:  # by earlier rows
            choice = replace(choice, kernel="SparseConv")
        settled.append(choice)
    return [
        replace(choice, kernel=beside.SEPARABLE) if choice.sparse and choice.output in separable else choice
        for choice in settled
    ]


def _dense(choice: Choice, node: NodeProto, kernel: str, neighbours: Neighbours) -> tuple[Choice, str]:
    """The row of a convolution that has a `dense_kernel`; the output of the layer that it becomes a part of, or ""."""
    try:
        if (reason := neighbours.obstacle(node)) is not None:
            return replace(choice, kernel="", reason=reason), ""
        pointwise = neighbours.pointwise(node) if kernel == "DepthwiseConv" else None
    except Stays as stays:
        return replace(choice, kernel="", reason=f"{beside.KINDS[kernel]}: {stays}"), ""
    if pointwise is None:
        return replace(choice, kernel=kernel, reason=beside.REASONS[kernel]), ""
    return replace(choice, kernel=beside.SEPARABLE, reason=beside.FUSED), pointwise


def dense_again(choice: Choice, reason: str) -> Choice:
    """The row of a layer that stays dense after all."""
    return replace(choice, sparse=False, block=0, mode="auto", bytes=choice.dense_bytes, reason=reason, kernel="")


def balanced(model: ModelProto, choices: Sequence[Choice], sizes: Sizes) -> list[Choice]:
    """The rows as `settle` gives them, with those dense again that do not pay for their changes of layout.

    Args:
        model: what they were made for.
        choices: a row for each layer.
        sizes: of the model's tensors.
    """
    spans, version = Spans(model.graph), opset(model)
    choices = _settled(choices, spans, version)
    gains = {
        choice.output: choice.dense_us * (1 - choice.relative)
        for choice in choices
        if choice.sparse and choice.op == "Conv"
    }
    nodes = spans.found.producers
    has_dense = any(choice.output in nodes and dense_kernel(nodes[choice.output], spans.found) for choice in choices)

    def dense_beside(sparse: Collection[str]) -> list[str]:
        if not has_dense:
            return []
        rows = [
            replace(choice, sparse=False) if choice.output in gains.keys() - set(sparse) else choice
            for choice in choices
        ]
        taken = [row.output for row in _settled(rows, spans, version) if row.kernel and not row.sparse]
        return [*taken, *(spans.of(nodes[output])[1] for output in taken)]  # a pooling at the end among them

    kept = worth_it(gains, Layout(model.graph, sizes), dense_beside)
    if kept == gains.keys():
        return choices
    reason = "; but it saves less than the changes of layout between it and its dense neighbours cost"
    rows = [
        dense_again(choice, choice.reason + reason) if choice.output in gains.keys() - kept else choice
        for choice in choices
    ]
    return _settled(rows, spans, version)


def _all_or_none(choices: Sequence[Choice], found: Index) -> list[Choice]:
    """The rows with those dense again whose weight a node that stays uses, too: the file would hold it twice."""
    sparse = {choice.output for choice in choices if choice.sparse}

    def dense_user(name: str) -> NodeProto | None:
        for user in users(name, found):
            as_weight = sum(name in (slot, *_sources(slot, found)) for slot in user.input) == 1
            if user.output[0] not in sparse or not as_weight:
                return user
        return None

    result = []
    for choice in choices:
        other = dense_user(choice.name) if choice.sparse else None
        if other is not None:
            reason = f"{other.op_type} '{label(other)}', which stays, uses the weight, too"
            choice = dense_again(choice, reason)
        result.append(choice)
    return result


def _sources(name: str, found: Index) -> list[str]:
    return [step.input[0] for step in steps(name, found)]


def counted_once(choices: Sequence[Choice], keys: Sequence[tuple[str, str]]) -> list[Choice]:
    """The rows with no bytes where an earlier one counts the same weight; `keys` tell weights apart."""
    first: dict[tuple[str, str], str] = {}
    result = []
    for choice, key in zip(choices, keys, strict=True):
        if key in first:
            reason = f"{choice.reason}; same weight as in '{first[key]}'"
            choice = replace(choice, dense_bytes=0, bytes=0, reason=reason)
        first.setdefault(key, choice.node)
        result.append(choice)
    return result


def _sparse(choice: Choice, layer: KernelLayer, block: int) -> Choice:
    values, deltas = operators.encode(layer.weight, block)
    return replace(choice, sparse=True, block=block, bytes=values.nbytes + deltas.nbytes, kernel=layer.base)


def as_it_is(node: NodeProto, stored: TensorProto, reason: str) -> Choice:
    """The row of a node that stays as it is."""
    values = numpy_helper.to_array(stored)
    nnz = int(np.count_nonzero(values))
    return Choice(
        name=stored.name,
        node=label(node),
        op=node.op_type,
        shape=tuple(values.shape),
        nnz=nnz,
        size=values.size,
        sparsity=1 - nnz / values.size if values.size else 0.0,
        dense_bytes=values.nbytes,
        bytes=values.nbytes,
        sparse=False,
        block=0,
        reason=reason,
        output=node.output[0],
    )
