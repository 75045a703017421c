"""Measures the kernels on whole networks with random weights against dense onnxruntime in the same process.

Run it as ``python -m sparsepipe.native.bench``. Both sessions run interleaved with one thread; the figure is the
ratio of the best deciles of thread CPU time, which a busy machine distorts least.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.native import operators
from sparsepipe.runtime.library import library_path

Array = NDArray[np.float32]


@dataclass
class Net:
    """An ONNX graph under construction. Sparse layers are written as the operators, or dense with the same zeros.

    ``block``: output channels of a block.
    """

    sparsity: float
    block: int
    native: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, value: NDArray[Any] | np.float32, stem: str = "c") -> str:
        name = self.name(stem)
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        out = self.name("t")
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out

    def weight(self, shape: tuple[int, ...], sparse: bool) -> Array:
        fan_in = int(np.prod(shape[1:]))
        density = 1 - self.sparsity if sparse else 1.0
        weight = self.random.standard_normal(shape).astype(np.float32) * np.float32((2 / (fan_in * density)) ** 0.5)
        if sparse:
            mask = self.random.random((shape[0] // self.block, 1, fan_in)) < density
            weight *= np.repeat(mask, self.block, axis=1).reshape(shape)
        return weight

    def bias(self, size: int) -> Array:
        return (self.random.standard_normal(size) * 0.1).astype(np.float32)

    def encoded(self, weight: Array, bias: Array | None) -> list[str]:
        values, deltas = operators.encode(weight, self.block)
        return [self.constant(values), self.constant(deltas), self.constant(bias) if bias is not None else ""]

    def conv(
        self,
        x: str,
        shape: tuple[int, ...],
        stride: int = 1,
        *,
        activation: str = "none",
        residual: str = "",
        sparse: bool = True,
        group: int = 1,
    ) -> str:
        pads = [shape[2] // 2] * 4
        weight = self.weight(shape, sparse)
        bias = self.bias(shape[0])
        if sparse and self.native:
            inputs = [x, *self.encoded(weight, bias), *([residual] if residual else [])]
            out = self.name("t")
            node = operators.sparse_conv(
                inputs, out, weight_shape=shape, strides=[stride] * 2, pads=pads, block=self.block,
                activation=activation, limits=(0.0, 6.0) if activation == "clip" else None, name=out,
            )  # fmt: skip
            self.nodes.append(node)
            return out
        out = self.add(
            "Conv", [x, self.constant(weight), self.constant(bias)],
            kernel_shape=list(shape[2:]), strides=[stride] * 2, pads=pads, group=group,
        )  # fmt: skip
        if residual:
            out = self.add("Add", [out, residual])
        if activation == "relu":
            out = self.add("Relu", [out])
        elif activation == "clip":
            out = self.add("Clip", [out, self.constant(np.float32(0)), self.constant(np.float32(6))])
        return out

    def separable(self, x: str, shape: tuple[int, int], stride: int) -> str:
        """A depthwise 3x3 and a sparse 1x1 convolution to ``shape`` [O, I], with ReLU after each."""
        outputs, channels = shape
        if not self.native:
            x = self.conv(x, (channels, 1, 3, 3), stride, activation="relu", sparse=False, group=channels)
            return self.conv(x, (outputs, channels, 1, 1), activation="relu")
        inputs = [x, self.constant(self.weight((channels, 1, 3, 3), False)), self.constant(self.bias(channels))]
        weight = self.weight((outputs, channels, 1, 1), True)
        out = self.name("t")
        node = operators.sparse_separable_conv(
            [*inputs, *self.encoded(weight, self.bias(outputs))], out,
            weight_shape=weight.shape, strides=[stride] * 2, pads=[1] * 4, block=self.block,
            depthwise_activation="relu", activation="relu", name=out,
        )  # fmt: skip
        self.nodes.append(node)
        return out

    def linear(
        self, x: str, shape: tuple[int, int], activation: str = "none", residual: str = "", sparse: bool = True
    ) -> str:
        weight = self.weight(shape, sparse)
        bias = self.bias(shape[0])
        if sparse and self.native:
            out = self.name("t")
            inputs = [x, *self.encoded(weight, bias), *([residual] if residual else [])]
            self.nodes.append(
                operators.sparse_linear(
                    inputs, out, weight_shape=shape, block=self.block, activation=activation, name=out
                )
            )
            return out
        out = self.add("MatMul", [x, self.constant(np.ascontiguousarray(weight.T))])
        out = self.add("Add", [out, self.constant(bias)])
        if residual:
            out = self.add("Add", [out, residual])
        if activation == "relu":
            return self.add("Relu", [out])
        if activation == "gelu":
            scaled = self.add("Mul", [out, self.constant(np.float32(0.5**0.5))])
            gate = self.add("Add", [self.add("Erf", [scaled]), self.constant(np.float32(1))])
            return self.add("Mul", [self.add("Mul", [out, gate]), self.constant(np.float32(0.5))])
        return out

    def model(self, output: str, input_shape: tuple[int, ...]) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
        model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        return model


def resnet50(net: Net) -> tuple[str, tuple[int, ...]]:
    """He et al. 2015, stride in the 3x3 (v1.5), 224 x 224."""
    x = net.conv("x", (64, 3, 7, 7), 2, activation="relu", sparse=False)
    x = net.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            step = stride if i == 0 else 1
            short = net.conv(x, (4 * width, channels, 1, 1), step) if i == 0 else x
            y = net.conv(x, (width, channels, 1, 1), activation="relu")
            y = net.conv(y, (width, width, 3, 3), step, activation="relu")
            x = net.conv(y, (4 * width, width, 1, 1), activation="relu", residual=short)
            channels = 4 * width
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    return net.linear(x, (1000, 2048)), (1, 3, 224, 224)


def mobilenetv1(net: Net) -> tuple[str, tuple[int, ...]]:
    """Howard et al. 2017, 224 x 224; depthwise layers stay dense."""
    x = net.conv("x", (32, 3, 3, 3), 2, activation="relu", sparse=False)
    channels = 32
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for out, stride in plan:
        x = net.separable(x, (out, channels), stride)
        channels = out
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    return net.linear(x, (1000, 1024)), (1, 3, 224, 224)


def vgg19(net: Net) -> tuple[str, tuple[int, ...]]:
    """VGG-19 for 32 x 32 images, one classifier layer."""
    x, channels = "x", 3
    for i, (width, layers) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        if i:
            x = net.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
        for _ in range(layers):
            x = net.conv(x, (width, channels, 3, 3), activation="relu", sparse=channels != 3)
            channels = width
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    return net.linear(x, (10 if net.block == 1 else 12, 512)), (1, 3, 32, 32)


def resnet20(net: Net) -> tuple[str, tuple[int, ...]]:
    """He et al. 2015 for 32 x 32 images."""
    x = net.conv("x", (16, 3, 3, 3), activation="relu", sparse=False)
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            step = stride if i == 0 else 1
            short = net.conv(x, (width, channels, 1, 1), step) if step != 1 else x
            y = net.conv(x, (width, channels, 3, 3), step, activation="relu")
            x = net.conv(y, (width, width, 3, 3), activation="relu", residual=short)
            channels = width
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    return net.linear(x, (10 if net.block == 1 else 12, 64)), (1, 3, 32, 32)


def mlp(net: Net) -> tuple[str, tuple[int, ...]]:
    """1024-4096-4096-4096-10, 16 rows."""
    x = "x"
    for out, features in ((4096, 1024), (4096, 4096), (4096, 4096)):
        x = net.linear(x, (out, features), activation="relu")
    return net.linear(x, (10 if net.block == 1 else 12, 4096)), (16, 1024)


def encoder(net: Net) -> tuple[str, tuple[int, ...]]:
    """Four transformer encoder layers of 768, 12 heads, 3072 hidden, 128 tokens."""
    x, tokens, width, heads = "x", 128, 768, 12
    split = net.constant(np.array([1, tokens, heads, width // heads], np.int64))
    join = net.constant(np.array([1, tokens, width], np.int64))
    for _ in range(4):
        q, k, v = (net.add("Reshape", [net.linear(x, (width, width)), split]) for _ in range(3))
        q, v = (net.add("Transpose", [t], perm=[0, 2, 1, 3]) for t in (q, v))
        scores = net.add("MatMul", [q, net.add("Transpose", [k], perm=[0, 2, 3, 1])])
        scores = net.add("Softmax", [net.add("Mul", [scores, net.constant(np.float32(0.125))])], axis=-1)
        mixed = net.add("Transpose", [net.add("MatMul", [scores, v])], perm=[0, 2, 1, 3])
        y = net.linear(net.add("Reshape", [mixed, join]), (width, width), residual=x)
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        y = net.add("LayerNormalization", [y, net.constant(ones), net.constant(zeros)], axis=-1)
        x = net.linear(net.linear(y, (3072, width), activation="gelu"), (width, 3072), residual=y)
        x = net.add("LayerNormalization", [x, net.constant(ones), net.constant(zeros)], axis=-1)
    return x, (1, tokens, width)


MODELS: dict[str, Callable[[Net], tuple[str, tuple[int, ...]]]] = {
    "resnet50": resnet50,
    "mobilenetv1": mobilenetv1,
    "vgg19": vgg19,
    "resnet20": resnet20,
    "mlp": mlp,
    "encoder": encoder,
}


def session(model: bytes, library: Path, threads: int, profile: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def best_decile(samples: list[int]) -> float:
    """Milliseconds that the fastest tenth of the samples stays under."""
    return float(np.quantile(np.array(samples), 0.1)) / 1e6


def interleaved(runs: Sequence[Callable[[], Any]], seconds: float) -> list[list[int]]:
    """CPU nanoseconds of the calling thread for each run, in turn, until the time is over."""
    samples: list[list[int]] = [[] for _ in runs]
    for run in runs:
        for _ in range(3):
            run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[0]) < 5:
        for run, into in zip(runs, samples, strict=True):
            start = time.thread_time_ns()
            run()
            into.append(time.thread_time_ns() - start)
    return samples


def build(name: str, sparsity: float, block: int, native: bool) -> tuple[bytes, tuple[int, ...]]:
    net = Net(sparsity, block, native)
    output, shape = MODELS[name](net)
    return net.model(output, shape), shape


@dataclass(frozen=True)
class Cell:
    """One setting of one model: milliseconds of CPU time, and the largest difference relative to the largest output."""

    sparsity: float
    block: int
    dense: float
    sparse: float
    error: float


def measure(name: str, settings: list[tuple[float, int]], library: Path, seconds: float) -> Iterator[Cell]:
    """One model at each (sparsity, block)."""
    for sparsity, block in settings:
        models = [build(name, sparsity, block, native) for native in (False, True)]
        x = np.random.default_rng(1).standard_normal(models[0][1]).astype(np.float32)
        runs = [
            partial(session(model, library, threads=1).run, None, {"x": x})  # the outputs, all of them
            for model, _ in models
        ]
        expected, actual = (run()[0] for run in runs)
        error = float(np.abs(expected - actual).max() / np.abs(expected).max())
        dense, sparse = (best_decile(samples) for samples in interleaved(runs, seconds))
        yield Cell(sparsity, block, dense, sparse, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, default=os.environ.get("SPARSEPIPE_LIBRARY") or library_path())
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sparsity", default="0.8,0.9,0.95,0.98")
    parser.add_argument("--blocks", default="1,4", help="output channels of a block: 1, 2, 4")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each cell of the table")
    arguments = parser.parse_args()
    if arguments.library is None or not arguments.library.is_file():
        parser.error(f"there is no kernel library {arguments.library or 'in this installation'}; name one by --library")
    settings = [(float(s), int(b)) for b in arguments.blocks.split(",") for s in arguments.sparsity.split(",")]
    print(f"{'model':12} {'block':>5} {'sparsity':>8} {'dense ms':>9} {'sparse ms':>9} {'ratio':>6} {'error':>8}")
    for name in arguments.models.split(","):
        for c in measure(name, settings, arguments.library, arguments.seconds):
            times = f"{c.dense:>9.3f} {c.sparse:>9.3f} {c.dense / c.sparse:>6.2f}"
            print(f"{name:12} {c.block:>4}x1 {c.sparsity:>8} {times} {c.error:>8.0e}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
