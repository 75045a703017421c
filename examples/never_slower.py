"""Is an exported file ever slower than the dense one? Networks and single layers, from few zeros to many.

    python examples/never_slower.py --out examples/results/never_slower.json

The networks of `sparsepipe bench --suite kernels`, with random weights, get zeros at random and are exported as
`sparsepipe export` does it, with the default cost model; so are single layers of random shapes. Each file runs beside
the dense one and beside a second session of the dense one: one process, one thread, blocks of calls in random order,
CPU time of the thread. The figure is how many times faster than dense a file is, the median over the rounds.

What the second dense session differs from the first by is noise: its 97.5% quantile over all rows. A file is slower
than dense where it is so by more than that, and the script then ends with an error. Files in which every layer stays
dense are not timed: they are the dense file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from sparsepipe.benchmark import networks
from sparsepipe.benchmark.fit_cost import convolution, linear, random_weight
from sparsepipe.benchmark.interleaved import interleave
from sparsepipe.benchmark.layers import bound_call
from sparsepipe.benchmark.statistics import speedup
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.graph.prune import prune
from sparsepipe.progress import track
from sparsepipe.recipe import Export
from sparsepipe.runtime import session
from sparsepipe.runtime.inputs import inputs_of, random_inputs
from sparsepipe.stages import export

DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.5, 0.7)
LAYERS = 60
SEED = 0
QUANTILE = 0.975


@dataclass(frozen=True)
class Row:
    """One file. The speed-ups are None where every layer stays dense.

    Attributes:
        name: of the network, or the layer in words.
        pattern: of the zeros.
        density: share of the weights that is kept.
        layers_sparse: layers that run on a sparse kernel.
        layers_dense: layers that stay dense.
        dense_ms: milliseconds of the dense file.
        speedup: median over the rounds, low and high end of its 95% interval.
        same: the same for a second session of the dense file.
    """

    name: str
    pattern: str
    density: float
    layers_sparse: int
    layers_dense: int
    dense_ms: float | None = None
    speedup: tuple[float, float, float] | None = None
    same: tuple[float, float, float] | None = None


def measure(name: str, model: ModelProto, pattern: str, density: float, seconds: float) -> Row:
    """Export a model whose weights hold zeros, and time the universal file beside the dense one."""
    with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder:
        path = Path(folder) / "dense.onnx"
        onnx.save(model, path)
        made = export.from_onnx(path, Export(targets=("universal",)), Path(folder) / "export")
        sparse = onnx.load(made.file(export.file_name("universal")))
    chosen = sum(layer["sparse"] for layer in made.metrics["kernels"])
    counts = (chosen, len(made.metrics["kernels"]) - chosen)
    if not chosen:
        return Row(name, pattern, density, *counts)
    feeds = random_inputs(inputs_of(session(model.SerializeToString())), model_batch(model), SEED)
    timings = interleave([bound_call(one, feeds) for one in (model, sparse, model)], seconds)
    dense = timings[0]
    estimates = [speedup(dense.rounds, other.rounds, SEED) for other in timings[1:]]
    found, same = ((round(e.value, 3), round(e.low, 3), round(e.high, 3)) for e in estimates if e is not None)
    return Row(name, pattern, density, *counts, round(dense.best_decile / 1e6, 4), found, same)


def model_batch(model: ModelProto) -> int:
    """The first dimension of the input, which these models fix."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)


def network_rows(names: list[str], seconds: float) -> Iterator[Row]:
    """The networks by name at each density; blocks only where few zeros make them interesting."""
    settings = [(name, "unstructured", density) for name in names for density in DENSITIES]
    settings += [(name, "4x1", 0.5) for name in names]
    for name, pattern, density in track(settings, "Networks", len(settings)):
        model, _ = prune(networks.build(name, seed=SEED), 1 - density, pattern)
        yield measure(name, model, pattern, density, seconds)


def layer_rows(count: int, seconds: float) -> Iterator[Row]:
    """Single layers of random shapes and densities, with bias and ReLU."""
    random = np.random.default_rng(SEED)
    for number in track(range(count), "Layers", count):
        density = round(float(np.exp(random.uniform(math.log(0.02), math.log(0.7)))), 3)
        block = int(random.choice([1, 1, 2, 4]))
        outputs, inputs = (int(2 ** random.uniform(4, 9)) // 4 * 4 for _ in range(2))
        if number % 3 == 0:
            rows = int(2 ** random.uniform(0, 7))
            name = f"linear {outputs} x {inputs}, {rows} rows"
            model = linear(random_weight(random, (outputs, inputs), density, block), rows)
        else:
            kernel, side = int(random.choice([1, 3])), int(2 ** random.uniform(1, 6))
            name = f"convolution {outputs} x {inputs} x {kernel} x {kernel} on {side} x {side}"
            weight = random_weight(random, (outputs, inputs, kernel, kernel), density, block)
            model = convolution(weight, side, 1)
        yield measure(name, model, f"{block}x1" if block > 1 else "unstructured", density, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(networks.NETWORKS))
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of single layers")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each file; six rounds are run at least")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    names = [name for name in arguments.networks.split(",") if name]
    for found in (layer_rows(arguments.layers, arguments.seconds), network_rows(names, 0.0)):
        for row in found:
            figure = "the dense file" if row.speedup is None else "{:.2f} ({:.2f}-{:.2f})".format(*row.speedup)
            counts = f"{row.layers_sparse}/{row.layers_sparse + row.layers_dense} sparse"
            print(f"{row.name:45} {row.density:6.1%} {row.pattern:12} {counts:12} {figure}", flush=True)
            rows.append(row)
    timed = [row for row in rows if row.speedup and row.same]
    noise = float(np.quantile([abs(math.log(row.same[0])) for row in timed if row.same], QUANTILE)) if timed else 0.0
    slower = [row for row in timed if row.speedup and row.speedup[0] < math.exp(-noise)]
    print(f"{len(timed)} files with sparse layers; noise {noise:.1%}; slower than dense: {len(slower)}")
    if arguments.out:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": package_versions(),
            "method": " ".join((__doc__ or "").split("\n\n", 2)[2].split()),
            "noise": round(noise, 4),
            "slower": [row.name for row in slower],
            "rows": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if slower:
        raise SystemExit("Slower than dense: " + "; ".join(f"{row.name} at {row.density:.1%}" for row in slower))


if __name__ == "__main__":
    main()
