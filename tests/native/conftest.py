"""What the tests of the native operators share: the library, sessions, and single-node models."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sparsepipe.native
from sparsepipe.environment import int8_saturates
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


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``build(compiler, *options)`` -> a folder with the library and the test programs, built by CMake."""

    def make(compiler: str, *options: str) -> Path:
        for tool in (compiler, "cmake", "ninja"):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        folder = tmp_path_factory.mktemp("build")
        sources = Path(sparsepipe.native.__file__).parent
        configure = ["cmake", "-S", str(sources), "-B", str(folder), "-G", "Ninja"]
        options = (f"-DCMAKE_CXX_COMPILER={compiler}", f"-DSPARSEPIPE_TESTS={Path(__file__).parent}", *options)
        for command in ([*configure, *options], ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr
        assert "warning:" not in done.stdout
        return folder

    return make


Session = Callable[..., Any]


@pytest.fixture(scope="session")
def session(library: Path) -> Session:
    """``session(model, native=True, threads=1)`` -> InferenceSession."""

    def make(model: onnx.ModelProto, *, native: bool = True, threads: int = 1) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Each tensor is an allocation of its own, so that a sanitizer sees any access beyond one.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        # Products of bytes saturate in stock onnxruntime on CPUs without VNNI, unless it is told to be exact. With VNNI
        # they are exact, and onnxruntime 1.31 would refuse convolutions of int8 activations.
        if int8_saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
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


ISAS = ["avx512vnni", "avx512", "avxvnni", "avx2", "sse4", "neon", "portable"]


@pytest.fixture(scope="session", params=ISAS)
def isa(request: pytest.FixtureRequest, session: Any, model: Any) -> str:
    """Every instruction set that this machine runs."""
    from sparsepipe.native import operators

    name: str = request.param
    values, deltas = operators.encode(np.ones((4, 4), np.float32))
    node = operators.sparse_linear(["X", "values", "deltas"], "Y", weight_shape=(4, 4), name="the_node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", name)
        try:
            session(model(node, {"values": values, "deltas": deltas}))
        except Exception as error:
            if "unknown" in str(error) or "does not run" in str(error):
                pytest.skip(str(error))
            raise
    return name


def _weight(random: np.random.Generator, *shape: int, block: int = 1) -> np.ndarray[Any, Any]:
    """Random values with 5% of their blocks of consecutive outputs kept, scaled to outputs of about 1."""
    kept = random.random((shape[0] // block, 1, *shape[1:])) < 0.05
    weight = random.standard_normal(shape) * np.repeat(kept, block, axis=1).reshape(shape)
    return (weight / max(1.0, 0.05 * float(np.prod(shape[1:]))) ** 0.5).astype(np.float32)


def _dense_networks() -> dict[str, onnx.ModelProto]:
    """One small network for each way of the exported operators, with 95% zeros in its weights."""
    random = np.random.default_rng(0)
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    image: list[int | str] = ["n", 64, 14, 14]
    padded = {"pads": [1, 1, 1, 1]}
    small, large = (64, 64, 1, 1), (64, 64, 3, 3)
    networks: dict[str, tuple[list[int | str], list[onnx.NodeProto], dict[str, np.ndarray[Any, Any]]]] = {
        "conv": (
            image,
            [
                node("Conv", ["x", "w0", "b0"], ["a"], **padded),
                node("Relu", ["a"], ["b"]),
                node("Conv", ["b", "w1"], ["y"], strides=[2, 2], dilations=[2, 1], **padded),
            ],
            {"w0": _weight(random, *large), "b0": _weight(random, 64), "w1": _weight(random, *large)},
        ),
        "blocks": (
            image,
            [node("Conv", ["x", "w0"], ["a"], **padded), node("Conv", ["a", "w1"], ["y"])],
            {"w0": _weight(random, *large, block=4), "w1": _weight(random, *small, block=2)},
        ),
        "residual": (
            image,
            [
                node("Conv", ["x", "w0"], ["a"], **padded),
                node("Conv", ["a", "w1"], ["b"], **padded),
                node("Add", ["b", "x"], ["c"]),
                node("Relu", ["c"], ["y"]),
            ],
            {"w0": _weight(random, *large), "w1": _weight(random, *large)},
        ),
        "depthwise": (
            image,
            [
                node("Conv", ["x", "w0"], ["a"]),
                node("Conv", ["a", "w1"], ["b"], group=64, **padded),
                node("Conv", ["b", "w2"], ["y"]),
            ],
            {
                "w0": _weight(random, *small),
                "w1": random.standard_normal((64, 1, 3, 3)).astype(np.float32),
                "w2": _weight(random, *small),
            },
        ),
        "linear": (
            ["n", 5, 256],
            [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["c"]), node("Relu", ["c"], ["y"])],
            {"w": _weight(random, 256, 256).T.copy(), "b": _weight(random, 256)},
        ),
    }
    made = {}
    for name, (shape, nodes, weights) in networks.items():
        graph = onnx.helper.make_graph(
            nodes,
            name,
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [tensor(value, key) for key, value in weights.items()],
        )
        made[name] = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return made


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> the dense file and the universal one that `sparsepipe export` makes of it; all inputs are "x"."""
    from sparsepipe.recipe import Export
    from sparsepipe.stages import export

    folder = tmp_path_factory.mktemp("networks")
    files = {}
    for name, dense in _dense_networks().items():
        onnx.save(dense, path := folder / f"{name}.onnx")
        made = export.from_onnx(path, Export(targets=("universal",)), folder / name).file("model.universal.onnx")
        assert any(node.domain == "sparsepipe" for node in onnx.load(made).graph.node), f"{name} has stayed dense"
        files[name] = (path, made)
    return files
