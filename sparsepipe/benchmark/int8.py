"""Dense int8 by onnxruntime's own static quantisation: the alternative to sparsity that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from sparsepipe.quantization import calibrate

METHOD = "static, QDQ, weights int8 per channel, activations uint8"
"""The pair of types that is fastest on x86 with VNNI; of int8 activations some networks there run slower than fp32."""


def quantise(source: Path, target: Path, samples: Sequence[calibrate.Feeds]) -> None:
    """Write the int8 form of an fp32 ONNX file.

    Args:
        source: the file.
        target: the file to write.
        samples: input name -> array of each calibration call; the smallest and largest activations are taken.
    """
    model = ModelProto.FromString(source.read_bytes())
    target.write_bytes(calibrate.quantise(model, samples).SerializeToString())
