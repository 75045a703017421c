"""One build of the library, and the same files, in old and new versions of onnxruntime, each installed by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite

PROGRAM = Path(__file__).with_name("run_networks.py")
TOLERANCE = 1e-5
TOO_OLD = "1.16.3"
NEWEST = "newest"
VERSIONS = ["1.17.3", "1.20.1", "1.24.4", NEWEST]

Networks = dict[str, tuple[Path, Path]]

pytestmark = pytest.mark.gate


def install(version: str, folder: Path) -> None:
    """onnxruntime and numpy alone in a folder; skips where this machine cannot download wheels for this Python."""
    wanted = "onnxruntime" if version == NEWEST else f"onnxruntime=={version}"
    # The wheels before 1.19 are built for the first numpy.
    numpy = "numpy<2" if version.startswith(("1.16.", "1.17.")) else "numpy"
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(folder), wanted, numpy]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {wanted}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program with nothing but that folder and the standard library on its path."""
    return subprocess.run(
        [sys.executable, "-S", str(PROGRAM), *map(str, arguments)], check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(networks: Networks) -> Path:
    """The folder of the networks, with an input for each."""
    random = np.random.default_rng(1)
    for name, (dense, _) in networks.items():
        session = onnxruntime.InferenceSession(str(dense), providers=["CPUExecutionProvider"])
        shape = [3, *session.get_inputs()[0].shape[1:]]
        np.save(dense.with_name(f"{name}.npy"), random.standard_normal(shape).astype(np.float32))
    return next(iter(networks.values()))[0].parent


@pytest.mark.parametrize("version", VERSIONS)
def test_files_run_with_and_without_the_library(
    networks: Networks, library: Path, folder: Path, tmp_path: Path, version: str
) -> None:
    install(version, tmp_path / "installed")
    done = run(tmp_path / "installed", library, folder, tmp_path / "outputs.npz", *networks)
    assert done.returncode == 0, done.stderr
    used = done.stdout.strip()
    assert used == version or version == NEWEST
    print(f"onnxruntime {used}")
    found = np.load(tmp_path / "outputs.npz")
    assert len(found.files) == 4 * len(networks)
    for key in found.files:
        expected = found[f"{key.split('/')[0]}/dense"]
        scale = np.abs(expected).max()
        assert scale > 0
        assert found[key].shape == expected.shape
        assert np.abs(found[key] - expected).max() <= TOLERANCE * scale, key


def int8_network() -> onnx.ModelProto:
    """Every int8 operator: an image layer, pooling, depthwise, sparse with a sum and without, a table, and linear."""
    random = np.random.default_rng(0)
    weights = {
        "image": random.standard_normal((16, 3, 3, 3)),
        "depthwise": random.standard_normal((16, 1, 3, 3)),
        "point": random.standard_normal((32, 16, 1, 1)),
        "block": random.standard_normal((32, 32, 3, 3)) / 4,
        "linear": random.standard_normal((16, 32)),
    }
    for name in ("point", "block", "linear"):
        rows, columns = weights[name].shape[0] // 4, weights[name].shape[1] // 4
        kept = (random.random((rows, columns)) < 0.3).repeat(4, 0).repeat(4, 1)
        weights[name] *= kept.reshape(*kept.shape, *[1] * (weights[name].ndim - 2))
    nodes: list[onnx.NodeProto] = []

    def add(op_type: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [f"t{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def conv(x: str, name: str, group: int = 1) -> str:
        pads = [weights[name].shape[2] // 2] * 4
        return add("Conv", x, f"{name}.weight", f"{name}.bias", pads=pads, group=group)

    x = add("MaxPool", add("Relu", conv("x", "image")), kernel_shape=[2, 2], strides=[2, 2])
    short = add("HardSwish", conv(add("Relu", conv(x, "depthwise", 16)), "point"))
    x = add("Relu", add("Add", conv(short, "block"), short))
    x = add("Gemm", add("Flatten", add("GlobalAveragePool", x)), "linear.weight", "linear.bias", transB=1)
    constants = {f"{name}.weight": value for name, value in weights.items()}
    constants |= {f"{name}.bias": random.standard_normal(len(value)) for name, value in weights.items()}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, ["n", 3, 18, 18])],
        [info(x, TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an int8 network, plain and sparse, with an input and what the kernels make of it here."""
    folder = tmp_path_factory.mktemp("int8")
    x = np.random.default_rng(1).standard_normal((3, 3, 18, 18)).astype(np.float32)
    plain = quantise(int8_network(), [{"x": x}], reduce_range=True)  # of 8 bits products saturate without VNNI
    made, _ = rewrite(plain)
    kinds = {node.op_type for node in made.graph.node if node.domain}
    assert kinds == {"SparseQConv", "SparseQConvAdd", "QDepthwiseConv", "QMaxPool", "QLookup", "SparseQLinear"}
    (folder / "net").mkdir()
    onnx.save(plain, folder / "net.onnx")
    onnx.save(made, folder / "net" / "model.universal.onnx")
    np.save(folder / "net.npy", x)
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_int8_files_run_with_and_without_the_library(
    library: Path, int8_folder: Path, tmp_path: Path, version: str
) -> None:
    install(version, tmp_path / "installed")
    done = run(tmp_path / "installed", library, int8_folder, tmp_path / "outputs.npz", "net")
    assert done.returncode == 0, done.stderr
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    universal = str(int8_folder / "net" / "model.universal.onnx")
    here = onnxruntime.InferenceSession(universal, options, providers=["CPUExecutionProvider"])
    expected = here.run(None, {"x": np.load(int8_folder / "net.npy")})[0]
    step = np.ptp(expected) / 255
    assert step > 0
    found = np.load(tmp_path / "outputs.npz")
    for threads in (1, 3):
        np.testing.assert_array_equal(found[f"net/{threads}"], expected)
    assert np.abs(found["net/0"] - expected).max() <= 3 * step  # sums and what follows them may round otherwise
    assert np.abs(found["net/dense"] - expected).max() <= 6 * step  # and HardSwish is rounded in two steps


def test_an_onnxruntime_that_is_too_old_is_told_the_version_it_needs(
    library: Path, folder: Path, tmp_path: Path
) -> None:
    install(TOO_OLD, tmp_path / "installed")
    done = run(tmp_path / "installed", library, folder, tmp_path / "outputs.npz", "conv")
    assert done.returncode == 1
    assert f"sparsepipe's kernels need onnxruntime 1.17 or newer; this is onnxruntime {TOO_OLD}" in done.stderr
