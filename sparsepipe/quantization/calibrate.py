"""Dense int8 by onnxruntime's own static quantisation, from the activations that a network has on given samples.

Weights become int8, symmetric for each output channel: a zero stays a zero. Activations become uint8 with a zero point,
one range for each tensor; biases int32. The result holds QuantizeLinear and DequantizeLinear around fp32 operators,
which onnxruntime fuses to integer ones when it loads the file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import copy, opset

Feeds = Mapping[str, NDArray[Any]]

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
    model: ModelProto, samples: Sequence[Feeds], *, method: str = "minmax", exclude: Collection[str] = ()
) -> ModelProto:
    """The int8 form of an fp32 model.

    Args:
        model: float32, without batch normalisations where they can be folded.
        samples: input name -> array of each calibration call.
        method: a key of `METHODS`. All but `minmax` keep every activation of every sample in memory.
        exclude: outputs of the nodes that stay fp32.

    Raises:
        GraphError: the opset is older than 13, there are no samples, or onnxruntime cannot quantise the model.
    """
    where = model.graph.name or "model"
    if opset(model) < OLDEST_OPSET:
        raise GraphError(
            f"Its opset {opset(model)} has no int8 weights with a scale for each channel.",
            where=where,
            advice=f"Export it with --opset {OLDEST_OPSET} or newer.",
        )
    if not samples:
        raise GraphError("There are no samples to calibrate with.", where=where)
    named, excluded = _named(model, exclude)
    with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder, _quiet():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(named.SerializeToString())
        try:
            quantize_static(
                str(source),
                str(target),
                _Samples(samples),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=METHODS[method],
                nodes_to_exclude=excluded,
            )
        except Exception as error:  # onnxruntime's tools raise errors of every kind
            text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise GraphError(f"onnxruntime's tools cannot quantise it: {text}.", where=where) from error
        result: ModelProto = ModelProto.FromString(target.read_bytes())
    result.ir_version = model.ir_version
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result


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
def _quiet() -> Iterator[None]:
    """Without what the tools print, and their advice on a preprocessing that changes nothing here."""
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
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
