"""Recognise an activation in the nodes that exporters write for it.

The few nodes after a tensor x are read as a formula of x, in a form that does not depend on the order of factors and
terms or on where a constant factor stands; the formula is then looked up:

    silu       x sigmoid(x)
    hardswish  x hardsigmoid(x) with slope 1/6 and offset 1/2,  or  x clip(x + 3, 0, 6) / 6
    gelu       x (1 + erf(x / sqrt 2)) / 2                      (the approximation by tanh is another function)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from sparsepipe.graph.index import Index, attribute, is_standard, number

MOST_NODES = 8  # of one activation
TOLERANCE = 1e-6  # relative, of the constants in a formula: float32 has 6e-8
FLOAT_LIMITS = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


@dataclass(frozen=True)
class Activation:
    """An activation of a kernel, and the nodes that compute it.

    Attributes:
        kind: a key of `operators.ACTIVATIONS`.
        nodes: the last one makes the output.
        limits: the bounds of `clip`.
    """

    kind: str
    nodes: tuple[NodeProto, ...]
    limits: tuple[float, float] | None = None


class Formula(NamedTuple):
    """`op` of `parts`, with `numbers`, which are compared with a tolerance.

    A "product" has a factor as its only number, a "sum" a term; their parts are sorted. A product of no parts is a
    number.
    """

    op: str
    numbers: tuple[float, ...] = ()
    parts: tuple[Any, ...] = ()


X = Formula("x")


def after(name: str, found: Index) -> Activation | None:
    """The activation of the tensor `name`, where its nodes alone use it, and only its result is used further."""
    region: list[NodeProto] = []
    formulas = {name: X}
    while len(region) < MOST_NODES:
        following = _following(formulas, region, found)
        if following is None:
            return None
        node, formula = following
        region.append(node)
        formulas[node.output[0]] = formula
        open_ends = [output for output in formulas if _is_open(output, region, found)]
        if open_ends == [node.output[0]] and (known := _lookup(formula)) is not None:
            return Activation(known[0], tuple(region), known[1])
    return None


def _is_open(name: str, region: Sequence[NodeProto], found: Index) -> bool:
    """Whether something else than the nodes of `region` uses a tensor, or nothing does."""
    users = found.consumers.get(name, [])
    return found.pinned(name) or not users or not all(_is_in(region, user) for user in users)


def _is_in(region: Sequence[NodeProto], node: NodeProto) -> bool:
    return any(node is part for part in region)


def _following(
    formulas: Mapping[str, Formula], region: Sequence[NodeProto], found: Index
) -> tuple[NodeProto, Formula] | None:
    """The next node of which all inputs are constants or have a formula, and its own."""
    for source in formulas:
        for node in found.consumers.get(source, []):
            reader = _READERS.get(node.op_type) if is_standard(node, node.op_type) else None
            if reader is None or _is_in(region, node) or len(node.output) != 1:
                continue
            inputs = [formulas.get(name) or _constant(name, found) for name in node.input]
            formula = reader(node, inputs[0], *inputs[1:]) if None not in inputs else None
            if formula is not None:
                return node, formula
    return None


def _constant(name: str, found: Index) -> Formula | None:
    """A single number that leaves the shape of the other operand as it is; an input that is left out is no number."""
    if not name:
        return _number(math.nan)
    stored = found.constants.get(name)
    if stored is None or stored.data_type != TensorProto.FLOAT or len(stored.dims) > 1:
        return None
    values = numpy_helper.to_array(stored)
    return _number(float(values.reshape(-1)[0])) if values.size == 1 else None


def _number(value: float) -> Formula:
    return Formula("product", (value,))


def _value(formula: Formula) -> float | None:
    return formula.numbers[0] if formula.op == "product" and not formula.parts else None


def _multiply(*factors: Formula) -> Formula:
    flat = [part if part.op == "product" else Formula("product", (1.0,), (part,)) for part in factors]
    factor = math.prod(part.numbers[0] for part in flat)
    parts = sorted((part for product in flat for part in product.parts), key=_structure)
    return parts[0] if len(parts) == 1 and factor == 1 else Formula("product", (factor,), tuple(parts))


def _add(*terms: Formula) -> Formula:
    values = [_value(term) for term in terms]
    constant = math.fsum(value for value in values if value is not None)
    parts = sorted((term for term, value in zip(terms, values, strict=True) if value is None), key=_structure)
    return Formula("sum", (constant,), tuple(parts))


def _structure(formula: Formula) -> str:
    return f"{formula.op}({','.join(map(_structure, formula.parts))})"


def _hard_sigmoid(of: Formula, slope: float, offset: float) -> Formula:
    return Formula("hardsigmoid", (slope, offset), (of,))


def _hard_swish(of: Formula) -> Formula:
    return _multiply(of, _hard_sigmoid(of, 1 / 6, 0.5))


def _swish(of: Formula, slope: float) -> Formula:
    return _multiply(of, Formula("sigmoid", (), (_multiply(of, _number(slope)),)))


def _exact_gelu(of: Formula) -> Formula:
    error = Formula("erf", (), (_multiply(of, _number(0.5**0.5)),))
    return _multiply(of, _add(error, _number(1.0)), _number(0.5))


def _divide(node: NodeProto, of: Formula, by: Formula) -> Formula | None:
    divisor = _value(by)
    return _multiply(of, _number(1 / divisor)) if divisor else None


def _clip(node: NodeProto, of: Formula, *bounds: Formula) -> Formula | None:
    limits = list(FLOAT_LIMITS)
    for place, bound in enumerate(bounds):
        value = _value(bound)
        if value is None:
            return None
        limits[place] = limits[place] if math.isnan(value) else value
    if not np.isfinite(limits).all() or limits[0] > limits[1]:
        return None
    return Formula("clip", tuple(limits), (of,))


def _gelu(node: NodeProto, of: Formula) -> Formula | None:
    way = attribute(node, "approximate")
    return _exact_gelu(of) if way is None or way.s in (b"", b"none") else None


_READERS: Mapping[str, Callable[..., Formula | None]] = {
    "Relu": lambda node, of: Formula("relu", (), (of,)),
    "Sigmoid": lambda node, of: Formula("sigmoid", (), (of,)),
    "Erf": lambda node, of: Formula("erf", (), (of,)),
    "HardSigmoid": lambda node, of: _hard_sigmoid(of, number(node, "alpha", 0.2), number(node, "beta", 0.5)),
    "HardSwish": lambda node, of: _hard_swish(of),
    "Swish": lambda node, of: _swish(of, number(node, "alpha", 1.0)),
    "Gelu": _gelu,
    "Clip": _clip,
    "Add": lambda node, *terms: _add(*terms),
    "Mul": lambda node, *factors: _multiply(*factors),
    "Div": _divide,
}
"""Operator -> its formula, from the node and the formulas of its inputs; None where it is not one of those here."""

_KNOWN: Mapping[str, tuple[Formula, ...]] = {
    "relu": (Formula("relu", (), (X,)),),
    "silu": (_swish(X, 1.0),),
    "gelu": (_exact_gelu(X),),
    "hardswish": (
        _hard_swish(X),
        _multiply(X, Formula("clip", (0.0, 6.0), (_add(X, _number(3.0)),)), _number(1 / 6)),
    ),
}


def _lookup(formula: Formula) -> tuple[str, tuple[float, float] | None] | None:
    """The key and the limits of an activation."""
    if formula.op == "clip" and formula.parts == (X,):
        return "clip", (formula.numbers[0], formula.numbers[1])
    names = (name for name, forms in _KNOWN.items() if any(_alike(formula, form) for form in forms))
    name = next(names, None)
    return (name, None) if name is not None else None


def _alike(one: Formula, other: Formula) -> bool:
    return (
        one.op == other.op
        and len(one.parts) == len(other.parts)
        and len(one.numbers) == len(other.numbers)
        and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(one.numbers, other.numbers, strict=True))
        and all(_alike(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    )
