"""A stand-in for MNN's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peer_stub
from MNN import expr

peer_stub.note("MNN is imported")


def create_runtime_manager(config: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    (settings,) = config
    unknown = set(settings) - {"backend", "numThread", "precision", "memory", "power"}
    if unknown or settings.get("precision") not in ("normal", "high", "low", None):
        raise ValueError(f"no such setting: {settings}")
    return settings


class Module:
    def __init__(self, model: bytes, inputs: list[str], outputs: list[str]) -> None:
        self._engine = peer_stub.Engine(model, "mnn")
        self._inputs, self._outputs = inputs, outputs

    def forward(self, variables: list[expr.Var]) -> list[expr.Var]:
        values = dict(zip(self._inputs, (variable.read() for variable in variables), strict=True))
        wide = {name: np.int64 for name, kind in self._engine.types.items() if kind == "tensor(int64)"}
        feeds = {name: value.astype(wide.get(name, value.dtype)) for name, value in values.items()}
        return [expr.Var(output) for output in self._engine.run(feeds, self._outputs)]


def load_module_from_file(
    file_name: str, input_names: list[str], output_names: list[str], *, runtime_manager: dict[str, Any]
) -> Module:
    peer_stub.note("load_module_from_file", file=Path(file_name).name, settings=runtime_manager)
    if wrong := peer_stub.fault("mnn: load"):
        raise RuntimeError(wrong)
    return Module(Path(file_name).read_bytes(), input_names, output_names)
