"""onnxruntime with its own static quantisation, in each of the two forms of the file that it writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sparsepipe.benchmark.calls import read
from sparsepipe.benchmark.runtimes import FastInt8, Preparation
from sparsepipe.environment import int8_saturates


class Qdq(FastInt8):
    """QuantizeLinear and DequantizeLinear around fp32 operators, which onnxruntime fuses when it loads the file."""

    form = "QDQ"

    def prepare(self, work: Preparation) -> Path:
        """Quantise: weights int8 for each output channel, activations uint8, ranges from smallest to largest value.

        Weights get 7 bits where 8 would saturate, as onnxruntime's documentation advises for such processors.
        """
        logging.disable(logging.WARNING)  # advice on a preprocessing that changes nothing here
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        assert work.samples is not None
        calls = iter(read(work.samples))

        class Samples(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
            def get_next(self) -> dict[str, Any] | None:
                return next(calls, None)

        target = work.folder / "model.onnx"
        quantize_static(
            str(work.source),
            str(target),
            Samples(),
            quant_format=QuantFormat[self.form],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=int8_saturates(),
        )
        return target

    def describe(self) -> dict[str, Any]:
        weights = "int8 of 7 bits (no VNNI here)" if int8_saturates() else "int8"
        return {**super().describe(), "int8": f"static, {self.form}, weights {weights} per channel, activations uint8"}


class QOperator(Qdq):
    """Integer operators in the file itself."""

    form = "QOperator"
