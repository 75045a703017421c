"""DeepSparse, which runs sparse weights on x86; it is no longer developed."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsepipe.benchmark.calls import Feeds
from sparsepipe.benchmark.runtimes import Preparation, Runtime

log = logging.getLogger("sparsepipe")

NEWEST_IR_VERSION = 8
"""What the onnxruntime inside of it reads."""


class DeepSparse(Runtime):
    """Its engine with one stream."""

    def __init__(self) -> None:
        import deepsparse  # noqa: F401 (before anything is timed)

    def prepare(self, work: Preparation) -> Path:
        import onnx

        model = onnx.load(str(work.source))
        model.ir_version = min(model.ir_version, NEWEST_IR_VERSION)
        for entry in [entry for entry in model.opset_import if entry.domain]:
            model.opset_import.remove(entry)
        target = work.folder / "model.onnx"
        onnx.save(model, str(target))
        return target

    def load(self, model: str, threads: int) -> None:
        from deepsparse import Engine

        self._engine = Engine(model=model, batch_size=_batch_size(model), num_cores=threads)
        supported = self._engine.fraction_of_supported_ops
        if supported < 1:  # its figures are then those of an old onnxruntime
            log.warning(
                "its engine runs %.0f%% of the operators; an onnxruntime inside runs the others", 100 * supported
            )

    def give(self, feeds: Feeds) -> None:
        import numpy as np

        self._feeds = [np.ascontiguousarray(feeds[name]) for name in self._engine.input_names]

    def run(self) -> list[Any]:
        return list(self._engine.run(self._feeds))

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "deepsparse",
            "version": version("deepsparse"),
            "instructions": self._engine.cpu_avx_type,
            "cores": self._engine.num_cores,
            "supported_operators": self._engine.fraction_of_supported_ops,
        }


def _batch_size(model: str) -> int:
    import onnx

    loaded = onnx.load(model, load_external_data=False)
    weights = {tensor.name for tensor in loaded.graph.initializer}
    taken = next(value for value in loaded.graph.input if value.name not in weights)
    return int(taken.type.tensor_type.shape.dim[0].dim_value)
