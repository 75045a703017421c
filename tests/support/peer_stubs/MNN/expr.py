"""A stand-in for MNN's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

NCHW, NHWC = "NCHW", "NHWC"
float, int, uint8 = "float", "int", "uint8"
TYPES = {float: np.float32, int: np.int32, uint8: np.uint8}


class Var:
    def __init__(self, value: Any) -> None:
        self._value = value

    def read(self) -> Any:
        return self._value


def const(value: Any, shape: list[Any], data_format: str, dtype: str) -> Var:
    if value.dtype != TYPES[dtype] or list(value.shape) != shape or not value.flags.c_contiguous:
        raise ValueError(f"not a {dtype} tensor of {shape}: {value.dtype} {value.shape}")
    return Var(value)
