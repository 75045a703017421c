"""Fit the constants of the cost model (`sparsepipe.graph.cost`) to single layers timed on this machine.

    python -m sparsepipe.benchmark.fit_cost --isa avx512 --samples examples/results/cost_fit.json

Each layer of a grid (the shapes of ResNet-50, MobileNetV1 at 224 and 32 pixels, VGG-19, ResNet-20, perceptrons and
encoders) runs dense in onnxruntime and sparse at several densities and blocks, in turn, in one thread. The constants
minimise the error of log time; the margin follows from what the fit leaves over, so that 98% of the layers that it lets
pass do pay. It takes about five minutes and writes `sparsepipe/graph/cost.json`, which the wheel carries. Without
--isa nothing is timed: the constants are fitted to the samples again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from scipy.optimize import least_squares

from sparsepipe.artefact import atomic_write
from sparsepipe.benchmark.layers import copies_of, layer_times, optimised
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.graph import cost
from sparsepipe.graph.choice import as_it_is
from sparsepipe.graph.universal import rewrite
from sparsepipe.progress import track
from sparsepipe.runtime import library_path

Array = NDArray[np.float32]
Times = NDArray[np.float64]

CONVOLUTIONS = (
    # ResNet-50 at 224: outputs, inputs, kernel, side of the input, stride
    *((64, 64, 1, 56, 1), (64, 64, 3, 56, 1), (256, 64, 1, 56, 1), (64, 256, 1, 56, 1), (128, 256, 1, 56, 1)),
    *((128, 128, 3, 56, 2), (512, 128, 1, 28, 1), (512, 256, 1, 56, 2), (128, 512, 1, 28, 1), (128, 128, 3, 28, 1)),
    *((256, 256, 3, 28, 2), (1024, 256, 1, 14, 1), (1024, 512, 1, 28, 2), (256, 1024, 1, 14, 1), (256, 256, 3, 14, 1)),
    *((512, 512, 3, 14, 2), (2048, 512, 1, 7, 1), (2048, 1024, 1, 14, 2), (512, 2048, 1, 7, 1), (512, 512, 3, 7, 1)),
    # MobileNetV1 at 224 and at 32
    *((64, 32, 1, 112, 1), (128, 64, 1, 56, 1), (256, 128, 1, 28, 1), (512, 256, 1, 14, 1), (512, 512, 1, 14, 1)),
    *((1024, 512, 1, 7, 1), (1024, 1024, 1, 7, 1), (64, 32, 1, 32, 1), (128, 64, 1, 16, 1), (128, 128, 1, 16, 1)),
    *((256, 128, 1, 8, 1), (256, 256, 1, 8, 1), (512, 256, 1, 4, 1), (512, 512, 1, 4, 1), (1024, 512, 1, 2, 1)),
    *((1024, 1024, 1, 2, 1), (512, 512, 1, 2, 1), (1024, 512, 1, 1, 1), (1024, 1024, 1, 1, 1), (256, 256, 1, 4, 1)),
    # VGG-19 and ResNets at 32
    *((64, 64, 3, 32, 1), (128, 64, 3, 16, 1), (128, 128, 3, 16, 1), (256, 128, 3, 8, 1), (256, 256, 3, 8, 1)),
    *((512, 256, 3, 4, 1), (512, 512, 3, 4, 1), (512, 512, 3, 2, 1), (16, 16, 3, 32, 1), (32, 16, 3, 32, 2)),
    *((32, 32, 3, 16, 1), (64, 32, 3, 16, 2), (64, 64, 3, 8, 1), (32, 16, 1, 32, 2), (64, 32, 1, 16, 2)),
    *((256, 64, 1, 32, 1), (64, 256, 1, 32, 1), (2048, 512, 1, 4, 1), (128, 128, 3, 32, 2), (32, 32, 3, 32, 1)),
    # small ones, of which the call is a part
    *((16, 16, 1, 8, 1), (32, 32, 1, 4, 1), (32, 16, 1, 16, 1), (64, 32, 1, 7, 1), (16, 16, 3, 8, 1)),
)
LINEARS = (
    # outputs, inputs, rows
    *((4096, 1024, 1), (4096, 1024, 16), (2048, 2048, 1), (1000, 2048, 1), (1024, 1024, 1), (100, 512, 1)),
    *((512, 784, 1), (512, 512, 1), (256, 256, 1), (1000, 192, 1), (300, 784, 16), (512, 512, 128), (768, 768, 16)),
    *((768, 768, 128), (3072, 768, 128), (768, 3072, 128), (768, 3072, 1), (192, 192, 65), (576, 192, 65)),
    *((768, 192, 65), (192, 768, 65), (192, 192, 197), (768, 192, 197), (1024, 1024, 2), (1024, 1024, 3)),
    *((1024, 1024, 4), (1024, 1024, 8), (1024, 1024, 32)),
    *((16, 16, 50), (32, 32, 16), (64, 32, 4), (24, 48, 100), (48, 96, 41), (64, 64, 1)),
)
SETTINGS = {1: (0.03, 0.1, 0.2, 0.3, 0.45), 2: (0.05, 0.2, 0.4), 4: (0.05, 0.2, 0.4)}
"""Rows of a block -> densities, each of which varies by a fifth from layer to layer."""
LAYOUTS = ((64, 112), (64, 56), (256, 28), (256, 14), (64, 16), (512, 4), (64, 8))
"""Channels and side of tensors whose layout is changed."""
SECONDS = 0.1
STREAMED_BYTES = 3 << 20
"""Copies of a layer with more bytes of weights do not find them in the L2 cache."""
PAYING = 0.98
"""A few of the samples are disturbed runs: no margin would let only layers pass that pay."""
WIDEST = 0.8
"""Other machines, and layers that share their caches with others, need room in any case."""


@dataclass(frozen=True)
class Timed:
    """A layer and what it takes, in nanoseconds.

    Attributes:
        work: what it computes.
        dense: time in onnxruntime.
        sparse: rows of a block, share of the values stored, time of the sparse kernel; for each setting.
    """

    work: cost.Work
    dense: float
    sparse: tuple[tuple[int, float, float], ...]


def measure(seconds: float = SECONDS) -> list[Timed]:
    """Time the grid: `seconds` at least for each layer."""
    random = np.random.default_rng(0)
    layers = [*(("conv", *numbers) for numbers in CONVOLUTIONS), *(("linear", *numbers) for numbers in LINEARS)]
    return [timed for layer in track(layers, "Layers", len(layers)) for timed in _measure(layer, seconds, random)]


def measure_layouts(seconds: float = SECONDS) -> list[tuple[int, float]]:
    """Floats of a tensor, and nanoseconds of a change of its layout: what a pooling of one position takes besides."""
    found = []
    for channels, side in LAYOUTS:
        shape = (1, channels, side, side)
        nodes = [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[1, 1])]
        pooling = _model(nodes, shape, {})
        within, alone = layer_times(pooling, [optimised(pooling)], {"x": shape}, seconds)
        found.append((math.prod(shape), max(alone - within, 1.0) / 2))
    return found


def _measure(layer: tuple[Any, ...], seconds: float, random: np.random.Generator) -> Iterator[Timed]:
    kind, outputs, inputs, *rest = layer
    shape = (outputs, inputs, rest[0], rest[0]) if kind == "conv" else (outputs, inputs)
    feeds = (1, inputs, rest[1], rest[1]) if kind == "conv" else (rest[0], inputs)
    weight_bytes = 4 * math.prod(shape)
    dense: ModelProto | None = None
    sparse: list[ModelProto] = []
    settings: list[tuple[int, float]] = []
    for block, densities in SETTINGS.items():
        for density in densities if outputs % block == 0 else ():
            weight = random_weight(random, shape, density * random.uniform(0.8, 1.2), block)
            made = convolution(weight, *rest[1:]) if kind == "conv" else linear(weight, rest[0])
            dense = dense or made
            row = as_it_is(made.graph.node[0], made.graph.initializer[0], "")
            sparse.append(rewrite(made, [replace(row, sparse=True, block=block)]))
            settings.append((block, np.count_nonzero(weight) / weight.size))
    assert dense is not None
    # With copies the weights come from beyond the L2 cache, as in a large network; alone from it, as in a small one.
    for copies in sorted({1, copies_of(weight_bytes)}):
        work = _work(layer, streamed=weight_bytes * copies > STREAMED_BYTES)
        dense_time, *times = layer_times(dense, sparse, {"x": feeds}, seconds, copies=copies)
        yield Timed(work, dense_time, tuple((*pair, time) for pair, time in zip(settings, times, strict=True)))


def _work(layer: tuple[Any, ...], streamed: bool) -> cost.Work:
    kind, outputs, inputs, *rest = layer
    if kind == "linear":
        return cost.Work(kind, outputs, inputs, rest[0], 1, rest[0], streamed)
    kernel, side, stride = rest
    return cost.Work(kind, outputs, inputs * kernel**2, (-(-side // stride)) ** 2, kernel**2, side**2, streamed)


def random_weight(random: np.random.Generator, shape: tuple[int, ...], density: float, block: int) -> Array:
    """Normal values in a share `density` of the blocks of `block` consecutive outputs, zeros elsewhere."""
    kept = np.repeat(random.random((shape[0] // block, *shape[1:])) < density, block, axis=0)
    return (random.standard_normal(shape) * kept).astype(np.float32)


def convolution(weight: Array, side: int, stride: int) -> ModelProto:
    """A convolution that keeps the side of its input but for the stride, with bias and ReLU."""
    pads = [weight.shape[2] // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "weight", "bias"], ["sum"], strides=[stride] * 2, pads=pads),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    return _model(
        nodes, (1, weight.shape[1], side, side), {"weight": weight, "bias": np.zeros(len(weight), np.float32)}
    )


def linear(weight: Array, rows: int) -> ModelProto:
    """A linear layer with bias and ReLU."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    weights = {"weight": np.ascontiguousarray(weight.T), "bias": np.zeros(len(weight), np.float32)}
    return _model(nodes, (rows, weight.shape[1]), weights)


def _model(nodes: Sequence[NodeProto], shape: tuple[int, ...], constants: Mapping[str, Array]) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@dataclass(frozen=True)
class Samples:
    """What was timed on one instruction set.

    Attributes:
        machine: where.
        layers: as `measure` gives them.
        layouts: as `measure_layouts` gives them.
    """

    machine: Mapping[str, Any]
    layers: Sequence[Timed]
    layouts: Sequence[tuple[int, float]]


def fit(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """What `cost.json` holds: for each instruction set the constants and what they leave over, and the margin.

    Args:
        samples: by instruction set, a key of `cost.ISAS`.
    """
    fits, predicted, measured = {}, [], []
    for name, timed in samples.items():
        isa = cost.ISAS[name]
        pairs = [(layer, *setting) for layer in timed.layers for setting in layer.sparse]
        dense = [(cost.dense_terms(layer.work, isa), layer.dense) for layer in timed.layers]
        sparse = [(cost.sparse_terms(layer.work, stored, block, isa), time) for layer, block, stored, time in pairs]
        changes = [({"layout.call": 1.0, "layout.float": float(floats)}, time) for floats, time in timed.layouts]
        constants = {**_least_squares(dense), **_least_squares(sparse), **_least_squares(changes)}
        guesses = [cost.relative_time(layer.work, stored, block, isa, constants) for layer, block, stored, _ in pairs]
        truths = [time / layer.dense for layer, *_, time in pairs]
        fits[name] = {
            "cpu": timed.machine["cpu"],
            "onnxruntime": timed.machine["onnxruntime"],
            "layers": len(timed.layers),
            "samples": len(pairs),
            "spread": {
                "ratio": round(float(np.log(np.array(truths) / np.array(guesses)).std()), 3),
                "dense": round(float(_errors(dense, constants).std()), 3),
                "sparse": round(float(_errors(sparse, constants).std()), 3),
            },
            "constants": {key: float(f"{value:.4g}") for key, value in sorted(constants.items())},
        }
        predicted += guesses
        measured += truths
    return {"pays_below": round(_pays_below(np.array(predicted), np.array(measured)), 3), "fits": fits}


def _pays_below(predicted: Times, measured: Times) -> float:
    """The margin: the largest one up to `WIDEST` of which `PAYING` of the samples that pass are faster than dense."""
    order = np.argsort(predicted)
    paying = np.cumsum(measured[order] < 1) / np.arange(1, len(order) + 1)
    passing = predicted[order][paying >= PAYING]
    return min(float(passing.max(initial=0.0)), WIDEST)


Observations = Sequence[tuple[Mapping[str, float], float]]


def _least_squares(timed: Observations) -> dict[str, float]:
    """The constants, none negative, that explain these times: log error, outliers (a disturbed run) damped."""
    names = sorted({name for terms, _ in timed for name in terms})
    factors = np.array([[terms.get(name, 0.0) for name in names] for terms, _ in timed])
    target = np.log([time for _, time in timed])
    # The largest that one constant can be: it alone explains the time of its typical layer.
    times = np.exp(target)
    largest = [
        float(np.median(times[column > 0] / column[column > 0])) if column.any() else 1.0 for column in factors.T
    ]
    starts = [np.log(np.array(largest) * share) for share in (0.3, 0.05, 0.01)]

    def residuals(logarithms: Times) -> Any:
        return np.log(factors @ np.exp(logarithms)) - target

    results = [least_squares(residuals, start, loss="soft_l1", f_scale=0.15) for start in starts]
    best = min(results, key=lambda result: float(result.cost))
    return dict(zip(names, np.exp(best.x).tolist(), strict=True))


def _errors(timed: Observations, constants: cost.Constants) -> NDArray[np.float64]:
    return np.array([np.log(time / cost.time_of(terms, constants)) for terms, time in timed])


def read_samples(path: Path) -> dict[str, Samples]:
    """Instruction set -> what a file of `write_samples` holds; nothing where there is no file."""
    if not path.is_file():
        return {}
    return {
        isa: Samples(
            entry["machine"],
            [Timed(cost.Work(*work), dense, tuple(map(tuple, sparse))) for work, dense, sparse in entry["layers"]],
            [tuple(change) for change in entry["layouts"]],
        )
        for isa, entry in json.loads(path.read_text()).items()
    }


def write_samples(path: Path, samples: Mapping[str, Samples]) -> None:
    """Write them as JSON, a layer on each line."""
    parts = []
    for isa, timed in samples.items():
        rows = ",\n".join(
            json.dumps([astuple(one.work), round(one.dense), [(r, round(e, 5), round(t)) for r, e, t in one.sparse]])
            for one in timed.layers
        )
        layouts = [(floats, round(time)) for floats, time in timed.layouts]
        head = f'"machine": {json.dumps(timed.machine)},\n"layouts": {json.dumps(layouts)},\n'
        parts.append(f'"{isa}": {{{head}"layers": [\n{rows}\n]}}')
    _write(path, "{" + ",\n".join(parts) + "}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=list(cost.ISAS), help="time the layers on this machine, which has it")
    parser.add_argument("--samples", type=Path, required=True, help="file of what was timed; --isa adds to it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each layer")
    arguments = parser.parse_args()
    samples = read_samples(arguments.samples)
    if arguments.isa:
        if library_path() is None:
            raise SystemExit("The kernel library was not built. Reinstall sparsepipe where there is a compiler.")
        machine = {**describe_machine(), "onnxruntime": package_versions()["onnxruntime"]}
        layers, layouts = measure(arguments.seconds), measure_layouts(arguments.seconds)
        samples[arguments.isa] = Samples(machine, layers, layouts)
        write_samples(arguments.samples, samples)
    found = fit(samples)
    _write(cost.CONSTANTS_FILE, json.dumps(found, indent=2))
    print(json.dumps({name: entry["spread"] for name, entry in found["fits"].items()}), found["pays_below"])


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


if __name__ == "__main__":
    main()
