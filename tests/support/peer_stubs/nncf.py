"""A stand-in for NNCF, OpenVINO's tool to quantise: it rounds the weights of linear layers to int8 or to 7 bits."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import numpy as np
import onnx
import openvino
import peer_stub
from onnx import numpy_helper


class OverflowFix(Enum):
    ENABLE = "enable"
    FIRST_LAYER = "first_layer_only"
    DISABLE = "disable"


class AdvancedQuantizationParameters:
    def __init__(self, overflow_fix: OverflowFix | None = None) -> None:
        self.overflow_fix = overflow_fix


class Dataset:
    def __init__(self, data_source: Iterable[Any]) -> None:
        self.items = list(data_source)


def quantize(
    model: openvino.Model,
    calibration_dataset: Dataset,
    *,
    subset_size: int = 300,
    advanced_parameters: AdvancedQuantizationParameters | None = None,
) -> openvino.Model:
    fix = advanced_parameters.overflow_fix if advanced_parameters else None
    used = calibration_dataset.items[:subset_size]
    peer_stub.note(
        "quantize",
        overflow_fix=fix.name if fix else None,
        calls=[{name: value.tolist() for name, value in call.items()} for call in used],
    )
    if wrong := peer_stub.fault("openvino int8: quantize"):
        raise RuntimeError(wrong)
    held = onnx.ModelProto.FromString(model.onnx)
    for tensor in held.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        step = np.abs(weight).max() / (63 if fix is OverflowFix.ENABLE else 127)
        tensor.CopyFrom(numpy_helper.from_array(np.round(weight / step) * step, tensor.name))
    return openvino.Model(held.SerializeToString(), "openvino int8")
