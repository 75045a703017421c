"""Dense int8 by onnxruntime's own static quantisation: the alternative to sparsity that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from sparsepipe.environment import int8_saturates
from sparsepipe.quantization import calibrate

METHOD = "static, QDQ, weights int8 per channel (7 bits on x86 without VNNI), activations uint8"
"""The pair of types that is fastest on x86 with VNNI; of int8 activations some networks there run slower than fp32."""


def quantise(source: Path, target: Path, samples: Sequence[calibrate.Feeds]) -> None:
    """Write the int8 form of an fp32 ONNX file, to be run as `sparsepipe.benchmark.runtimes.FastInt8` does.

    Weights get 7 bits where 8 would saturate, so that the fast operators of onnxruntime compute what they should.

    Args:
        source: the file.
        target: the file to write.
        samples: input name -> array of each calibration call; the smallest and largest activations are taken.
    """
    model = ModelProto.FromString(source.read_bytes())
    target.write_bytes(calibrate.quantise(model, samples, reduce_range=int8_saturates()).SerializeToString())
