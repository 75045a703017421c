"""The networks of the speed table as dense ONNX graphs with random weights. Nothing here needs torch.

Weights are He-normal (arXiv 1502.01852) and biases are small, so activations keep their scale; batch normalisations
are taken as folded. Batch sizes are fixed, opset 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8
INPUT = "input"
BIAS_SCALE = 0.1


@dataclass(frozen=True)
class Network:
    """A network by name.

    Attributes:
        title: as a table calls it.
        input_shape: batch first.
        layers: adds the layers to a graph and names the output.
    """

    title: str
    input_shape: tuple[int, ...]
    layers: Callable[[_Graph], str]


def build(name: str, *, seed: int = 0) -> ModelProto:
    """The network `name`, a key of `NETWORKS`, with random weights: the same for the same seed."""
    network = NETWORKS[name]
    graph = _Graph(np.random.default_rng(seed))
    output = network.layers(graph)
    made = helper.make_graph(
        graph.nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, network.input_shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    shape = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0]
    model.graph.output[0].CopyFrom(shape)
    return model


@dataclass
class _Graph:
    """A graph under construction."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def constant(self, value: NDArray[Any] | np.float32, name: str = "") -> str:
        name = name or f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def parameters(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A weight [O, I, *kernel] and a bias [O]."""
        scale = np.float32((2 / np.prod(shape[1:])) ** 0.5)
        weight = self.random.standard_normal(shape, np.float32) * scale
        return weight, self.random.standard_normal(shape[0], np.float32) * np.float32(BIAS_SCALE)

    def conv(
        self, x: str, shape: tuple[int, ...], stride: int = 1, *, relu: bool = True, residual: str = "", group: int = 1
    ) -> str:
        """A convolution that keeps the size (but for the stride), perhaps a sum, perhaps ReLU."""
        weight, bias = self.parameters(shape)
        stem = f"conv{len(self.nodes)}"
        out = self.add(
            "Conv", [x, self.constant(weight, f"{stem}.weight"), self.constant(bias, f"{stem}.bias")],
            kernel_shape=list(shape[2:]), strides=[stride] * 2, pads=[shape[2] // 2] * 4, group=group,
        )  # fmt: skip
        if residual:
            out = self.add("Add", [out, residual])
        return self.add("Relu", [out]) if relu else out

    def classifier(self, x: str, shape: tuple[int, int]) -> str:
        """The mean over the positions, and a linear layer of the weight [O, I]."""
        return self.gemm(self.add("Flatten", [self.add("GlobalAveragePool", [x])]), shape)

    def gemm(self, x: str, shape: tuple[int, int]) -> str:
        weight, bias = self.parameters(shape)
        stem = f"linear{len(self.nodes)}"
        return self.add(
            "Gemm", [x, self.constant(weight, f"{stem}.weight"), self.constant(bias, f"{stem}.bias")], transB=1
        )

    def linear(self, x: str, shape: tuple[int, int]) -> str:
        """A linear layer on any leading dimensions, as MatMul and Add."""
        weight, bias = self.parameters(shape)
        stem = f"linear{len(self.nodes)}"
        out = self.add("MatMul", [x, self.constant(np.ascontiguousarray(weight.T), f"{stem}.weight")])
        return self.add("Add", [out, self.constant(bias, f"{stem}.bias")])

    def gelu(self, x: str) -> str:
        scaled = self.add("Mul", [x, self.constant(np.float32(0.5**0.5))])
        gate = self.add("Add", [self.add("Erf", [scaled]), self.constant(np.float32(1))])
        return self.add("Mul", [self.add("Mul", [x, gate]), self.constant(np.float32(0.5))])

    def layer_norm(self, x: str, width: int) -> str:
        ones, zeros = (self.constant(make(width, np.float32)) for make in (np.ones, np.zeros))
        return self.add("LayerNormalization", [x, ones, zeros], axis=-1)


def _resnet50(graph: _Graph) -> str:
    """He et al., arXiv 1512.03385, with the stride in the 3x3 convolution."""
    x = graph.conv(INPUT, (64, 3, 7, 7), 2)
    x = graph.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return _bottlenecks(graph, x, 1000)


def _bottlenecks(graph: _Graph, x: str, classes: int) -> str:
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for position in range(blocks):
            step = stride if position == 0 else 1
            short = graph.conv(x, (4 * width, channels, 1, 1), step, relu=False) if position == 0 else x
            y = graph.conv(x, (width, channels, 1, 1))
            y = graph.conv(y, (width, width, 3, 3), step)
            x = graph.conv(y, (4 * width, width, 1, 1), residual=short)
            channels = 4 * width
    return graph.classifier(x, (classes, channels))


def _resnet50_cifar(graph: _Graph) -> str:
    """ResNet-50 for images of 32 x 32: a 3x3 convolution without stride or pooling in front."""
    return _bottlenecks(graph, graph.conv(INPUT, (64, 3, 3, 3)), 10)


def _mobilenet_v1(graph: _Graph) -> str:
    """Howard et al., arXiv 1704.04861, table 1."""
    x, channels = graph.conv(INPUT, (32, 3, 3, 3), 2), 32
    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
    for outputs, stride in plan:
        x = graph.conv(x, (channels, 1, 3, 3), stride, group=channels)
        x = graph.conv(x, (outputs, channels, 1, 1))
        channels = outputs
    return graph.classifier(x, (1000, channels))


def _vgg19(graph: _Graph) -> str:
    """Simonyan and Zisserman, arXiv 1409.1556, for small images: one classifier layer."""
    x, channels = INPUT, 3
    for stage, (width, layers) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        if stage:
            x = graph.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
        for _ in range(layers):
            x = graph.conv(x, (width, channels, 3, 3))
            channels = width
    return graph.classifier(x, (10, channels))


def _resnet20(graph: _Graph) -> str:
    """He et al., arXiv 1512.03385, section 4.2, with projections where the shape changes."""
    x, channels = graph.conv(INPUT, (16, 3, 3, 3)), 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for position in range(3):
            step = stride if position == 0 else 1
            short = graph.conv(x, (width, channels, 1, 1), step, relu=False) if step != 1 else x
            y = graph.conv(x, (width, channels, 3, 3), step)
            x = graph.conv(y, (width, width, 3, 3), residual=short)
            channels = width
    return graph.classifier(x, (10, channels))


def _mlp(graph: _Graph) -> str:
    x = INPUT
    for shape in ((4096, 1024), (4096, 4096), (4096, 4096)):
        x = graph.add("Relu", [graph.gemm(x, shape)])
    return graph.gemm(x, (10, 4096))


def _encoder(graph: _Graph) -> str:
    """Four layers of a BERT-base encoder (arXiv 1810.04805): normalisation after each sum, GELU."""
    x, tokens, width, heads, hidden = INPUT, 128, 768, 12, 3072
    split = graph.constant(np.array([1, tokens, heads, width // heads], np.int64))
    join = graph.constant(np.array([1, tokens, width], np.int64))
    scale = graph.constant(np.float32((width // heads) ** -0.5))
    for _ in range(4):
        query, key, value = (graph.add("Reshape", [graph.linear(x, (width, width)), split]) for _ in range(3))
        query, value = (graph.add("Transpose", [part], perm=[0, 2, 1, 3]) for part in (query, value))
        scores = graph.add("MatMul", [query, graph.add("Transpose", [key], perm=[0, 2, 3, 1])])
        shares = graph.add("Softmax", [graph.add("Mul", [scores, scale])], axis=-1)
        mixed = graph.add("Transpose", [graph.add("MatMul", [shares, value])], perm=[0, 2, 1, 3])
        attended = graph.linear(graph.add("Reshape", [mixed, join]), (width, width))
        x = graph.layer_norm(graph.add("Add", [x, attended]), width)
        expanded = graph.gelu(graph.linear(x, (hidden, width)))
        x = graph.layer_norm(graph.add("Add", [x, graph.linear(expanded, (width, hidden))]), width)
    return x


NETWORKS: Mapping[str, Network] = {
    "resnet50": Network("ResNet-50 224", (1, 3, 224, 224), _resnet50),
    "mobilenet-v1": Network("MobileNetV1 224", (1, 3, 224, 224), _mobilenet_v1),
    "vgg19": Network("VGG-19 CIFAR", (1, 3, 32, 32), _vgg19),
    "resnet50-cifar": Network("ResNet-50 CIFAR", (1, 3, 32, 32), _resnet50_cifar),
    "resnet20": Network("ResNet-20 CIFAR", (1, 3, 32, 32), _resnet20),
    "mlp": Network("MLP 1024-4096-4096-4096-10, 16 rows", (16, 1024), _mlp),
    "encoder": Network("4 encoder layers 768/3072, 128 tokens", (1, 128, 768), _encoder),
}
