"""Whether two tensors of a graph have the same shape, whatever the sizes of its inputs turn out to be.

A size that is not known is a term: `("of", tensor, axis)` where it is all that is known, `("plus", t, c)` for t + c,
and `("window", t, c, s)` for floor((t + c) / s) + 1, which is what a window of stride s makes of a side. Equal terms
are equal sizes, so two branches that shrink one tensor in the same way are known to fit each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx import GraphProto, NodeProto

from sparsepipe.graph.index import Index, attribute, integer, is_standard

Size = int | tuple[Any, ...]
Shape = tuple[Size, ...]

_LIKE_THE_INPUT = """
Abs BatchNormalization Cast Celu Clip DequantizeLinear Dropout Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu
Log Mish Neg PRelu QuantizeLinear Relu Selu Sigmoid Softmax Softplus Softsign Sqrt Swish Tanh ThresholdedRelu
"""


class Shapes:
    """The shapes of one graph at the moment that this was made: as recorded in the file, and as derived here."""

    def __init__(self, graph: GraphProto, found: Index) -> None:
        self._recorded = {
            value.name: value.type.tensor_type.shape.dim
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.tensor_type.HasField("shape")
        }
        self._known: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in found.constants.items()}
        for value in graph.input:
            self._note(value.name, None)
        for node in graph.node:
            rule = _RULES.get(node.op_type) if is_standard(node, node.op_type) else None
            shapes = [self._known.get(name) for name in node.input]
            derived = rule(node, shapes) if rule is not None and shapes and shapes[0] is not None else None
            for position, name in enumerate(node.output):
                self._note(name, derived if position == 0 else None)

    def rank(self, name: str) -> int | None:
        """Number of dimensions of a tensor; None where it is not known."""
        known = self._known.get(name)
        return None if known is None else len(known)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are known to have the same shape."""
        one, other = self._known.get(first), self._known.get(second)
        if one is None or other is None or len(one) != len(other):
            return False
        names = [[size.dim_param for size in self._recorded.get(name, ())] for name in (first, second)]
        named_alike = [bool(left) and left == right for left, right in zip(*names, strict=False)]
        named_alike += [False] * (len(one) - len(named_alike))
        return all(alike or left == right for left, right, alike in zip(one, other, named_alike, strict=True))

    def _note(self, name: str, derived: Shape | None) -> None:
        """Take the numbers that the file records, then what was derived, then the names of the file."""
        recorded = self._recorded.get(name)
        if recorded is None:
            if derived is not None:
                self._known[name] = derived
            return
        sizes: list[Size] = []
        for axis, size in enumerate(recorded):
            if size.dim_value:
                sizes.append(size.dim_value)
            elif derived is not None and len(derived) == len(recorded):
                sizes.append(derived[axis])
            else:
                sizes.append(("named", size.dim_param) if size.dim_param else ("of", name, axis))
        self._known[name] = tuple(sizes)


def _plus(size: Size, by: int) -> Size:
    if isinstance(size, int):
        return size + by
    if size[0] == "plus":
        return _plus(size[1], size[2] + by)
    return ("plus", size, by) if by else size


def _window(size: Size, by: int, stride: int) -> Size:
    """floor((size + by) / stride) + 1."""
    if stride == 1:
        return _plus(size, by + 1)
    moved = _plus(size, by)
    if isinstance(moved, int):
        return moved // stride + 1
    base, by = (moved[1], moved[2]) if moved[0] == "plus" else (moved, 0)
    return ("window", base, by, stride)


def _like_first(node: NodeProto, shapes: Sequence[Shape | None]) -> Shape | None:
    return shapes[0]


def _broadcast(node: NodeProto, shapes: Sequence[Shape | None]) -> Shape | None:
    first, second = shapes
    if first is None or second is None:
        return None
    rank = max(len(first), len(second))
    sizes: list[Size] = []
    for one, other in zip(*((1,) * (rank - len(shape)) + shape for shape in (first, second)), strict=True):
        if one == other or other == 1:
            sizes.append(one)
        elif one == 1:
            sizes.append(other)
        else:  # a size that is not known may be 1
            fixed = next((size for size in (one, other) if isinstance(size, int)), None)
            if fixed is None:
                return None
            sizes.append(fixed)
    return tuple(sizes)


def _slide(node: NodeProto, shapes: Sequence[Shape | None]) -> Shape | None:
    """Convolutions and poolings."""
    source = shapes[0]
    given = attribute(node, "kernel_shape")
    weight = shapes[1] if len(shapes) > 1 else None
    kernel = list(given.ints) if given is not None else []
    if given is None and weight is not None:
        kernel = [size for size in weight[2:] if isinstance(size, int)]
    if source is None or len(kernel) != len(source) - 2 or integer(node, "ceil_mode", 0):
        return None
    channels = source[1] if weight is None else weight[0]
    rank = len(kernel)
    lists = {}
    for name, default in (("strides", [1] * rank), ("dilations", [1] * rank), ("pads", [0] * 2 * rank)):
        found = attribute(node, name)
        lists[name] = list(found.ints) if found is not None and found.ints else default
        if len(lists[name]) != len(default) or (name == "strides" and min(lists[name]) < 1):
            return None
    padding = attribute(node, "auto_pad")
    way = padding.s if padding is not None else b"NOTSET"
    sides: list[Size] = []
    for axis in range(rank):
        stride = lists["strides"][axis]
        if way in (b"SAME_UPPER", b"SAME_LOWER"):  # ceil(side / stride)
            sides.append(_window(source[2 + axis], -1, stride))
            continue
        pads = 0 if way == b"VALID" else lists["pads"][axis] + lists["pads"][rank + axis]
        sides.append(_window(source[2 + axis], pads - lists["dilations"][axis] * (kernel[axis] - 1) - 1, stride))
    return (source[0], channels, *sides)


def _global_pool(node: NodeProto, shapes: Sequence[Shape | None]) -> Shape | None:
    return None if shapes[0] is None else (*shapes[0][:2], *[1] * (len(shapes[0]) - 2))


_RULES: Mapping[str, Callable[[NodeProto, Sequence[Shape | None]], Shape | None]] = {
    **dict.fromkeys(_LIKE_THE_INPUT.split(), _like_first),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _broadcast),
    **dict.fromkeys(("Conv", "MaxPool", "AveragePool", "LpPool"), _slide),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
}
"""Operator -> the shape of its output from those of its inputs; None where that is not known."""
