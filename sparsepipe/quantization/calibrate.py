"""Dense int8 by onnxruntime's own static quantisation, from the activations that a network has on given samples.

Weights become int8, symmetric for each output channel: a zero stays a zero. Activations become uint8 with a zero point,
one range for each tensor; biases int32. Attention stays fp32 (`attention`). The result holds QuantizeLinear and
DequantizeLinear around fp32 operators, which onnxruntime fuses to integer ones when it loads the file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import copy, mentioned, opset, subgraphs
from sparsepipe.quantization.attention import attention
from sparsepipe.quantization.normal import normal_form, stay_fp32

Feeds = Mapping[str, NDArray[Any]]
Ranges = Mapping[str, tuple[float, float]]
"""Tensor -> its smallest and largest value."""

METHODS: Mapping[str, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
"""How the range of a tensor comes from its values: all of them, the middle 99.999%, or the range of the least
divergence between the histograms before and after."""
OLDEST_OPSET = 13
"""The first with a scale for each channel."""


def quantise(
    model: ModelProto,
    samples: Sequence[Feeds],
    *,
    method: str = "minmax",
    exclude: Collection[str] = (),
    reduce_range: bool = False,
) -> ModelProto:
    """The int8 form of an fp32 model, with the ranges that its activations have on samples.

    Args:
        model: float32, without batch normalisations where they can be folded.
        samples: input name -> array of each calibration call.
        method: a key of `METHODS`. All but `minmax` keep every activation of every sample in memory.
        exclude: outputs of the nodes that stay fp32.
        reduce_range: give weights 7 bits instead of 8.

    Raises:
        GraphError: the opset is older than 13, the model is not float32, there are no samples, or onnxruntime cannot
            quantise it.
    """
    model = normal_form(model)
    return with_ranges(model, ranges(model, samples, method=method), exclude=exclude, reduce_range=reduce_range)


def ranges(model: ModelProto, samples: Sequence[Feeds], *, method: str = "minmax") -> Ranges:
    """The range of every tensor that may be quantised, as `quantise` finds it.

    Args:
        model: in normal form.
        samples: as of `quantise`.
        method: as of `quantise`.

    Raises:
        GraphError: the opset is older than 13, there are no samples, or onnxruntime cannot calibrate the model.
    """
    where = model.graph.name or "model"
    _check_opset(model, where)
    if not samples:
        raise GraphError("There are no samples to calibrate with.", where=where)
    with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder, _tools(where):
        source = Path(folder) / "fp32.onnx"
        source.write_bytes(_named(model, ())[0].SerializeToString())
        calibrator = create_calibrator(
            str(source),
            _quantisable(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method],
        )
        calibrator.collect_data(_Samples(samples))
        found = calibrator.compute_data()
        limits = {name: data.range_value for name, data in found.items()}
        return {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in limits.items()}


def with_ranges(
    model: ModelProto, found: Ranges, *, exclude: Collection[str] = (), reduce_range: bool = False
) -> ModelProto:
    """The int8 form of an fp32 model, with given ranges of its activations.

    Args:
        model: in normal form.
        found: tensor -> smallest and largest value.
        exclude: outputs of the nodes that stay fp32.
        reduce_range: give weights 7 bits instead of 8.

    Raises:
        GraphError: the opset is older than 13, a range is missing, or onnxruntime cannot quantise the model.
    """
    where = model.graph.name or "model"
    _check_opset(model, where)
    named, excluded = _named(model, {*exclude, *attention(model), *stay_fp32(model)})
    limits = {name: (np.float32(low), np.float32(high)) for name, (low, high) in found.items()}
    settings: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_qType": QuantType.QInt8,
        "activation_qType": QuantType.QUInt8,
        "tensors_range": TensorsData(CalibrationMethod.MinMax, limits),
        "nodes_to_quantize": [],
        "nodes_to_exclude": excluded,
        "op_types_to_quantize": _quantisable(),
        "extra_options": {},
    }
    if "static" in inspect.signature(QDQQuantizer).parameters:  # before onnxruntime 1.18
        settings |= {"mode": QuantizationMode.QLinearOps, "static": True}
    with _tools(where):
        quantizer = QDQQuantizer(named, **settings)
        quantizer.quantize_model()
        result: ModelProto = quantizer.model.model
        _sort(result.graph)
    result.ir_version = model.ir_version
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result


def _check_opset(model: ModelProto, where: str) -> None:
    if opset(model) < OLDEST_OPSET:
        raise GraphError(
            f"Its opset {opset(model)} has no int8 weights with a scale for each channel.",
            where=where,
            advice=f"Export it with --opset {OLDEST_OPSET} or newer.",
        )


def _sort(graph: GraphProto) -> None:
    """Put each node behind those that it needs; the tools' own sort does not see what subgraphs use."""
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needed = {}
    for place, node in enumerate(graph.node):
        inside = sorted({name for _, inner in subgraphs(node) for name in mentioned(inner)})
        needed[place] = [makers[name] for name in (*node.input, *inside) if name in makers]
    nodes = [graph.node[place] for place in TopologicalSorter(needed).static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def _quantisable() -> list[str]:
    """The operators that onnxruntime's tools know in int8."""
    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _named(model: ModelProto, exclude: Collection[str]) -> tuple[ModelProto, list[str]]:
    """A copy in which every node has a name of its own, and the names of the nodes that make the outputs `exclude`."""
    named = copy(model)
    seen: set[str] = set()
    for place, node in enumerate(named.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{place}"
        seen.add(node.name)
    return named, [node.name for node in named.graph.node if not set(exclude).isdisjoint(node.output)]


@contextlib.contextmanager
def _tools(where: str) -> Iterator[None]:
    """Without what the tools print, and with their errors as one of this project.

    Raises:
        GraphError: the tools failed.
    """
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # onnxruntime's tools raise errors of every kind
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise GraphError(f"onnxruntime's tools cannot quantise it: {text}.", where=where) from error
    finally:
        logging.disable(was)


class _Samples(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
    def __init__(self, samples: Sequence[Feeds]) -> None:
        self._left = iter(samples)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def calibration_rows(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` samples to calibrate with: `wanted` of them, or all, drawn by `seed`, in their own order."""
    # RandomState's streams are frozen; those of numpy's newer generators may change with the version.
    return np.sort(np.random.RandomState(seed).permutation(count)[:wanted])
