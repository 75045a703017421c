"""A stand-in for OpenVINO: what `sparsepipe` uses of it, with its names of properties and their types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peer_stub

__version__ = "2099.1.0"

PROPERTIES: dict[str, Any] = {
    "PERFORMANCE_HINT": lambda value: value in ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT"),
    "NUM_STREAMS": lambda value: value == "AUTO" or int(value) >= 0,
    "INFERENCE_NUM_THREADS": lambda value: type(value) is int and value >= 0,
    "ENABLE_CPU_PINNING": lambda value: type(value) is bool,
    "INFERENCE_PRECISION_HINT": lambda value: value in ("f32", "bf16", "f16"),
}
TYPES = {"f32": "<Type: 'float32'>", "bf16": "<Type: 'bfloat16'>", "f16": "<Type: 'float16'>"}

peer_stub.note("openvino is imported")


class Model:
    def __init__(self, onnx: bytes, place: str) -> None:
        self.onnx, self.place = onnx, place


class Core:
    def read_model(self, model: str | Path) -> Model:
        path = Path(model)
        if path.suffix == ".xml":
            return Model(path.with_suffix(".bin").read_bytes(), "openvino int8")
        return Model(path.read_bytes(), "openvino fp32")

    def compile_model(self, model: Model, device_name: str, config: dict[str, Any]) -> CompiledModel:
        for name, value in config.items():
            if not PROPERTIES.get(name, lambda value: False)(value):
                raise RuntimeError(f"Option not found or not valid: {name}={value}")
        peer_stub.note("compile_model", model=model.place, device=device_name, config=config)
        if wrong := peer_stub.fault(f"{model.place}: compile"):
            raise RuntimeError(wrong)
        return CompiledModel(model, config)


class CompiledModel:
    def __init__(self, model: Model, config: dict[str, Any]) -> None:
        self._model, self._config = model, config

    def get_property(self, name: str) -> Any:
        if name == "INFERENCE_PRECISION_HINT":  # what the device took, in its own words
            return TYPES[self._config.get(name, "bf16")]
        return self._config[name]

    def create_infer_request(self) -> InferRequest:
        return InferRequest(peer_stub.Engine(self._model.onnx, self._model.place))


class InferRequest:
    def __init__(self, engine: peer_stub.Engine) -> None:
        self._engine = engine
        self._memory: list[Any] = []

    def infer(self, inputs: dict[str, Any], share_inputs: bool = False, share_outputs: bool = False) -> dict[str, Any]:
        found = self._engine.run(inputs)
        if share_outputs:  # every call then answers with the same memory
            self._memory = self._memory or [output.copy() for output in found]
            for kept, output in zip(self._memory, found, strict=True):
                kept[...] = output
            found = self._memory
        return dict(zip(self._engine.outputs, found, strict=True))


def save_model(model: Model, output_model: str | Path, compress_to_fp16: bool = True) -> None:
    peer_stub.note("save_model", compress_to_fp16=compress_to_fp16)
    Path(output_model).write_text("<net/>")
    Path(output_model).with_suffix(".bin").write_bytes(model.onnx)
