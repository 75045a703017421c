"""MNN: its converter finds sparse weights, and its CPU backend runs these layers sparse."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsepipe.benchmark.calls import Feeds
from sparsepipe.benchmark.runtimes import Preparation, Runtime

NAMES = "names.json"


class Mnn(Runtime):
    """A module with weights that the converter has looked through for zeros."""

    def __init__(self) -> None:
        import MNN.nn  # noqa: F401 (before anything is timed)

    def prepare(self, work: Preparation) -> Path:
        # Not MNN.tools.mnnconvert: importing it installs packages and sends messages to its makers.
        import _tools

        target = work.folder / "model.mnn"
        files = ["--modelFile", str(work.source), "--MNNModel", str(target)]
        _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "sparsepipe", "--detectSparseSpeedUp"])
        if not target.is_file():
            raise RuntimeError("MNN's converter wrote no file")
        names = {"inputs": list(work.inputs), "outputs": list(work.outputs)}
        (work.folder / NAMES).write_text(json.dumps(names))
        return target

    def load(self, model: str, threads: int) -> None:
        import MNN.nn as nn

        names = json.loads(Path(model).with_name(NAMES).read_text())
        self._inputs = names["inputs"]
        # "high" is fp32 on every processor; elsewhere than on x86 the default is fp16.
        settings = {"backend": "CPU", "numThread": threads, "precision": "high"}
        manager = nn.create_runtime_manager((settings,))
        self._net = nn.load_module_from_file(model, self._inputs, names["outputs"], runtime_manager=manager)
        self._settings = settings

    def give(self, feeds: Feeds) -> None:
        import MNN.expr as expr
        import numpy as np

        kinds = {"float32": expr.float, "int32": expr.int, "int64": expr.int, "uint8": expr.uint8}
        self._variables = []
        for name in self._inputs:
            value = feeds[name]
            kind = kinds[value.dtype.name]
            plain = value.astype(np.int32) if value.dtype == np.int64 else value  # MNN has no wider integers
            self._variables.append(expr.const(np.ascontiguousarray(plain), list(value.shape), expr.NCHW, kind))

    def run(self) -> list[Any]:
        return [output.read() for output in self._net.forward(self._variables)]

    def describe(self) -> dict[str, Any]:
        return {"runtime": "mnn", "version": version("mnn"), **self._settings}
