"""OpenVINO on the CPU: fp32, and int8 by the post-training quantisation of its own tool NNCF."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sparsepipe.benchmark.calls import Feeds, read
from sparsepipe.benchmark.runtimes import Preparation, Runtime
from sparsepipe.environment import int8_saturates


class OpenVino(Runtime):
    """One stream, tuned for latency."""

    # By default OpenVINO computes in bfloat16 where the processor has it (AMX, AVX512-BF16); this is the fp32 runtime.
    precision: ClassVar[Mapping[str, str]] = {"INFERENCE_PRECISION_HINT": "f32"}

    def __init__(self) -> None:
        import openvino

        self._openvino = openvino

    def prepare(self, work: Preparation) -> Path:
        return work.source

    def load(self, model: str, threads: int) -> None:
        core = self._openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # the harness has pinned the process
            **self.precision,
        }
        self._model = core.compile_model(core.read_model(model), "CPU", settings)
        self._request = self._model.create_infer_request()

    def give(self, feeds: Feeds) -> None:
        self._feeds = dict(feeds)

    def run(self) -> list[Any]:
        results = self._request.infer(self._feeds, share_inputs=True, share_outputs=True)
        return list(results.values())

    def describe(self) -> dict[str, Any]:
        names = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT")
        return {
            "runtime": "openvino",
            "version": self._openvino.__version__,
            **{name.lower(): str(self._model.get_property(name)) for name in names},
        }


class OpenVinoInt8(OpenVino):
    """Weights and activations int8 where NNCF finds that they can be; the rest in the default precision of the CPU."""

    precision: ClassVar[Mapping[str, str]] = {}

    def prepare(self, work: Preparation) -> Path:
        logging.disable(logging.WARNING)  # NNCF wants 300 samples, and says so
        import nncf

        assert work.samples is not None
        calls = read(work.samples)
        model = self._openvino.Core().read_model(work.source)
        # Where products saturate, NNCF's documentation advises weights of 7 bits in all layers.
        fix = nncf.OverflowFix.ENABLE if int8_saturates() else nncf.OverflowFix.FIRST_LAYER
        quantised = nncf.quantize(
            model,
            nncf.Dataset(calls),
            subset_size=len(calls),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )
        target = work.folder / "model.xml"
        self._openvino.save_model(quantised, target, compress_to_fp16=False)
        return target

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        weights = "int8 of 7 bits (no VNNI here)" if int8_saturates() else "int8"
        return {**super().describe(), "int8": f"static, nncf {version('nncf')}, weights {weights}"}
