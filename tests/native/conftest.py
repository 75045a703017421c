"""What the tests of the native operators share: the library, sessions, and single-node models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsepipe.runtime import library_path

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="session")
def library() -> Path:
    path = os.environ.get("SPARSEPIPE_LIBRARY") or library_path()
    if path is not None and Path(path).is_file():
        return Path(path)
    if compiler := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        pytest.fail(f"the native library was not built, though there is a compiler, {compiler}")
    pytest.skip("the native library was not built: there is no C++ compiler")


Session = Callable[..., Any]


@pytest.fixture(scope="session")
def session(library: Path) -> Session:
    """``session(model, native=True, threads=1)`` -> InferenceSession."""

    def make(model: onnx.ModelProto, *, native: bool = True, threads: int = 1) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if native:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return make


Model = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="session")
def model() -> Model:
    """``model(node, initializers, functions=())`` -> a model whose other inputs are graph inputs."""

    def make(
        node: onnx.NodeProto, initializers: Mapping[str, np.ndarray[Any, Any]], functions: Any = ()
    ) -> onnx.ModelProto:
        from onnx import TensorProto, helper, numpy_helper

        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in node.input
            if name and name not in initializers
        ]
        graph = helper.make_graph(
            [node],
            "one_node",
            inputs,
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("sparsepipe", 1)]
        return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)

    return make
