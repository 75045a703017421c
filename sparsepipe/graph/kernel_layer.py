"""A node of a graph as the sparse kernels see it: its weight with the outputs first, its bias, its window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from sparsepipe.graph.index import Index, attribute, integer, is_standard, number
from sparsepipe.native import operators

LARGEST_KERNEL = 255
LARGEST = {"strides": 4096, "dilations": 4096, "pads": 65535}
"""What the kernels take of each attribute of a window."""
STEMS: Mapping[tuple[int, ...], Sequence[tuple[int, ...]]] = {(3, 3): [(1, 1), (2, 2)], (7, 7): [(2, 2)]}
"""Kernel -> strides of the first convolutions of images that were measured to gain."""
Array = NDArray[Any]


class Stays(Exception):
    """Why a node stays as it is."""


@dataclass
class KernelLayer:
    """A node in the terms of the kernels.

    Attributes:
        base: its operator, a key of `operators.INPUTS`.
        weight: [O, I, *kernel], float32.
        bias: [O], float32.
        source: name of its input.
        window: strides, pads and dilations of a convolution.
        last: the node whose output it makes.
        fused: further nodes that it stands for.
        residual: name of a tensor that is added to it.
        activation: a key of `operators.ACTIVATIONS`.
        limits: the bounds of the activation `clip`.
        pool: window and pads of a MaxPool at its end.
    """

    base: str
    weight: Array
    bias: Array
    source: str
    window: Mapping[str, Sequence[int]]
    last: NodeProto
    fused: list[NodeProto] = field(default_factory=list)
    residual: str | None = None
    activation: str = "none"
    limits: tuple[float, float] | None = None
    pool: tuple[Sequence[int], Sequence[int]] | None = None

    def take(self, *nodes: NodeProto) -> None:
        """Stand for these nodes, too; the last one makes the output."""
        self.fused += nodes
        self.last = nodes[-1]


def read(node: NodeProto, found: Index) -> KernelLayer:
    """`node` as the kernels see it.

    Raises:
        Stays: there is no kernel for it.
    """
    if node.op_type not in _READERS or not is_standard(node, node.op_type):
        raise Stays("transposed convolution" if node.op_type == "ConvTranspose" else f"no kernel for {node.op_type}")
    return _finite(_READERS[node.op_type](node, found))


def dense_kernel(node: NodeProto, found: Index) -> str | None:
    """The operator of the library that may take the place of a convolution that stays dense.

    `DepthwiseConv` has one filter for each channel, `StemConv` the few channels of an image and a window of `STEMS`.
    The weight is constant.
    """
    stored = found.constants.get(node.input[1]) if is_standard(node, "Conv") else None
    if stored is None:
        return None
    groups, dims = integer(node, "group", 1), list(stored.dims)
    if groups > 1:
        return "DepthwiseConv" if dims[:2] == [groups, 1] else None
    return "StemConv" if dims[1] <= operators.MOST_STEM_CHANNELS and tuple(dims[2:]) in STEMS else None


def read_dense(node: NodeProto, found: Index) -> KernelLayer:
    """A node that has a `dense_kernel` as that kernel sees it; the weight of a DepthwiseConv is [C, 1, *kernel].

    Raises:
        Stays: the kernel does not take it.
    """
    base = dense_kernel(node, found)
    assert base is not None
    layer = _finite(_convolution(base, node, found))
    strides, dilations = tuple(layer.window["strides"]), tuple(layer.window["dilations"])
    if base == "StemConv" and (strides not in STEMS[layer.weight.shape[2:]] or dilations != (1, 1)):
        raise Stays(f"onnxruntime's own kernel is as fast for strides {list(strides)} and dilations {list(dilations)}")
    return layer


def users(name: str, found: Index) -> list[NodeProto]:
    """The nodes that use the constant `name`, once per input slot, those behind transpositions of it among them."""
    direct = found.consumers.get(name, [])
    return [
        user for node in direct for user in (users(node.output[0], found) if is_standard(node, "Transpose") else [node])
    ]


def steps(name: str, found: Index) -> list[NodeProto]:
    """The transpositions through which a weight reaches its node."""
    step = found.producers.get(name)
    if step is None or not is_standard(step, "Transpose"):
        return []
    return [step, *steps(step.input[0], found)]


def _weight(name: str, found: Index) -> Array:
    """The constant weight `name`; a transposition of it is done here."""
    if found.pinned(name):
        raise Stays("the weight is an output of the network" if name in found.outputs else "a subgraph uses the weight")
    step = found.producers.get(name)
    if name not in found.constants and step is not None and is_standard(step, "Transpose"):
        order = attribute(step, "perm")
        return _weight(step.input[0], found).transpose(list(order.ints) if order else None)
    if name not in found.constants:
        raise Stays(f"the weight goes through {step.op_type}" if step is not None else "the weight is not constant")
    if found.constants[name].data_type != TensorProto.FLOAT:
        raise Stays(f"the weight is {TensorProto.DataType.Name(found.constants[name].data_type)}, not FLOAT")
    return numpy_helper.to_array(found.constants[name])


def _bias(node: NodeProto, outputs: int, found: Index) -> Array:
    """The third input as float32 [outputs]; zeros where there is none."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(outputs, np.float32)
    if node.input[2] not in found.constants:
        raise Stays("the bias is not constant")
    bias = numpy_helper.to_array(found.constants[node.input[2]])
    if bias.size not in (1, outputs) or (bias.ndim and bias.shape[-1] != bias.size):
        raise Stays("the bias differs from row to row")
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), outputs), np.float32)


def _finite(layer: KernelLayer) -> KernelLayer:
    if not np.isfinite(layer.weight).all() or not np.isfinite(layer.bias).all():
        raise Stays("a value is not finite")
    return layer


def _convolution(base: str, node: NodeProto, found: Index) -> KernelLayer:
    weight = _weight(node.input[1], found)
    window = window_of(node, weight.shape[2:])
    return KernelLayer(base, weight, _bias(node, weight.shape[0], found), node.input[0], window, node)


def _read_conv(node: NodeProto, found: Index) -> KernelLayer:
    if (groups := integer(node, "group", 1)) != 1:
        raise Stays(f"convolution of {groups} groups")
    return _convolution("SparseConv", node, found)


def window_of(node: NodeProto, kernel: Sequence[int]) -> dict[str, Sequence[int]]:
    """Strides, pads and dilations in numbers."""
    if (rank := len(kernel)) not in (1, 2):
        raise Stays(f"no kernel for convolutions in {rank} dimensions")
    if max(kernel) > LARGEST_KERNEL:
        raise Stays(f"no kernel for a window of {list(kernel)}")
    window: dict[str, Sequence[int]] = {}
    for name, count, default in (("strides", rank, 1), ("pads", 2 * rank, 0), ("dilations", rank, 1)):
        given = attribute(node, name)
        window[name] = list(given.ints) if given is not None else [default] * count
    padding = attribute(node, "auto_pad")
    if padding is not None and padding.s not in (b"", b"NOTSET"):
        window["pads"] = _automatic_pads(padding.s, kernel, window)
    for name, numbers in window.items():
        if not all(0 <= value <= LARGEST[name] for value in numbers):
            raise Stays(f"no kernel for {name} {list(numbers)}")
    return window


def _automatic_pads(way: bytes, kernel: Sequence[int], window: Mapping[str, Sequence[int]]) -> list[int]:
    """The pads that `auto_pad` stands for, where every size of the input has the same."""
    if way == b"VALID":
        return [0] * 2 * len(kernel)
    if any(stride != 1 for stride in window["strides"]):
        raise Stays(f"auto_pad {way.decode()} depends on the size of the input")
    all_pads = [dilation * (size - 1) for size, dilation in zip(kernel, window["dilations"], strict=True)]
    fewer = [pads // 2 for pads in all_pads]
    more = [pads - half for pads, half in zip(all_pads, fewer, strict=True)]
    return [*fewer, *more] if way == b"SAME_UPPER" else [*more, *fewer]


def _read_gemm(node: NodeProto, found: Index) -> KernelLayer:
    if node.input[1] not in found.constants and node.input[0] in found.constants:
        raise Stays("the weight is the left factor")
    if integer(node, "transA", 0) or number(node, "alpha", 1.0) != 1:
        raise Stays("no kernel for transA, or alpha other than 1")
    weight = _weight(node.input[1], found)
    weight = weight if integer(node, "transB", 0) else weight.T
    bias = _bias(node, weight.shape[0], found) * np.float32(number(node, "beta", 1.0))
    return KernelLayer("SparseLinear", weight, bias, node.input[0], {}, node)


def _read_matmul(node: NodeProto, found: Index) -> KernelLayer:
    if node.input[0] in found.constants:
        raise Stays("the weight is the left factor")
    weight = _weight(node.input[1], found)
    if weight.ndim != 2:
        raise Stays(f"a weight of {weight.ndim} dimensions is several matrices")
    return KernelLayer("SparseLinear", weight.T, np.zeros(weight.shape[1], np.float32), node.input[0], {}, node)


_READERS: Mapping[str, Callable[[NodeProto, Index], KernelLayer]] = {
    "Conv": _read_conv,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
}
