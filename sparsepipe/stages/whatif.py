"""What-if: the speed of a network at several sparsities and patterns on this machine, before any training."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from sparsepipe.artefact import Artefact, digest_bytes, digest_file, draft, write_json
from sparsepipe.benchmark import int8
from sparsepipe.errors import MissingExtraError, ModelError
from sparsepipe.graph.fold import fold
from sparsepipe.graph.load import load
from sparsepipe.graph.prune import block_shape
from sparsepipe.graph.resize import resize
from sparsepipe.models.registry import MODELS, create
from sparsepipe.progress import bar
from sparsepipe.recipe import Bench, Fraction
from sparsepipe.runtime.inputs import inputs_of, random_inputs, resolve
from sparsepipe.runtime.library import status
from sparsepipe.runtime.sessions import session
from sparsepipe.stages import bench
from sparsepipe.stages.variants import Variant, export_dense, export_sparse, export_sparse_int8

log = logging.getLogger("sparsepipe")

RESULT_FILE = "whatif.json"
SCHEMA_VERSION = 1
SEED = 0
DENSE, INT8 = "dense", "int8"
CALIBRATION_CALLS = 4


class WhatIf(Bench):
    """What is measured.

    `model` is a name of `sparsepipe models` or an ONNX file; the first number of a shape in `input` takes the place of
    `batch`.
    """

    model: str
    sparsity: tuple[Fraction, ...] = (0.8, 0.9, 0.95, 0.98)
    pattern: tuple[str, ...] = ("unstructured", "2x1", "4x1")
    precision: Literal["fp32", "int8"] = "fp32"
    """int8: the sparse files are int8, calibrated on random inputs, and a dense int8 file runs beside them."""


def measure(config: WhatIf) -> dict[str, Any]:
    """Measure a network with random zeros, at each sparsity and pattern, against its dense form.

    The files are what `export` writes for such weights, and take turns in processes of their own, all patterns of one
    sparsity beside a dense file. Outputs are compared with dense onnxruntime before anything is timed.

    Returns:
        `model`, `input`, `results` (a row for each sparsity, pattern, number of threads and batch size, each with the
        rows `dense` and `sparse` of `bench`, for int8 also `int8`, the dense int8 file), `verdicts` (as of `bench`, for
        each sparsity and setting) and `environment`.

    Raises:
        ModelError: no such network.
        GraphError: there is no such pattern, the file cannot be read, its size cannot be changed, or a sparse file
            computes something else.
        MissingExtraError: a network was named, and torch is not installed.
    """
    for pattern in config.pattern:
        block_shape(pattern)
    model, config = _network(config)
    kernels = status()
    if not kernels["loadable"]:
        log.warning("The kernel library is not used, so nothing can be faster than dense: %s.", kernels["reason"])
    results: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    runtimes: dict[str, dict[str, Any]] = {}
    steps = len(config.sparsity) * (len(config.pattern) + bench.rounds(config))
    # The files are as large as the network many times over; only those of one sparsity exist at once.
    with tempfile.TemporaryDirectory(prefix="sparsepipe-") as name, bar("What if", steps) as running:
        dense = export_dense(model, Path(name))
        opened = inputs_of(session(dense))
        feeds = random_inputs(opened, config.batch[0], SEED)
        shapes = resolve(opened, config.batch[0])
        baselines, calls = {DENSE: dense}, [feeds]
        if config.precision == INT8:
            calls += [random_inputs(opened, config.batch[0], SEED + call) for call in range(1, CALIBRATION_CALLS)]
            baselines[INT8] = Path(name) / "dense-int8.onnx"
            int8.quantise(dense, baselines[INT8], calls)
        for sparsity in config.sparsity:
            with tempfile.TemporaryDirectory(prefix="variants-", dir=name) as folder:
                variants = []
                for pattern in config.pattern:
                    running.advance(0, note=f"sparsity {sparsity:.4g}: exporting {pattern}")
                    place = Path(folder) / pattern
                    if config.precision == INT8:
                        variants.append(export_sparse_int8(model, pattern, sparsity, place, calls))
                    else:
                        variants.append(export_sparse(model, pattern, sparsity, place, feeds))
                    running.advance()
                paths = [*baselines.values(), *(variant.path for variant in variants)]
                labels = [*baselines, *(variant.label for variant in variants)]
                race = bench.take_turns(
                    paths,
                    labels,
                    0,
                    config,
                    lambda note, sparsity=sparsity: running.advance(note=f"sparsity {sparsity:.4g}, {note}"),  # type: ignore[misc]
                    int8=1 if INT8 in baselines else None,
                    fast_int8=True,
                )
            results += _pairs(race.results, list(baselines), variants)
            verdicts += [{"sparsity": sparsity, **verdict} for verdict in race.verdicts]
            runtimes |= {str(one): one for one in race.runtimes}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "input": {name: list(shape) for name, shape in shapes.items()},
        "results": results,
        "verdicts": verdicts,
        "environment": {**bench.environment(config), "runtimes": list(runtimes.values())},
    }


def record(config: WhatIf, out: Path) -> Artefact:
    """`measure`, and keep the result in the folder `out`."""
    path = Path(config.model)
    digest = digest_file(path) if path.is_file() else digest_bytes(config.model.encode())
    with draft(out, "whatif", config, {"model": digest}) as building:
        result = measure(config)
        write_json(building.folder / RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def _pairs(rows: list[dict[str, Any]], baselines: list[str], variants: list[Variant]) -> list[dict[str, Any]]:
    """The rows of one race, one for each baseline and for each variant at each setting, as pairs."""
    pairs = []
    size = len(baselines) + len(variants)
    for first in range(0, len(rows), size):
        shared = dict(zip(baselines, rows[first:], strict=False))
        for variant, row in zip(variants, rows[first + len(baselines) : first + size], strict=True):
            setting = {"threads": row["threads"], "batch": row["batch"]}
            pairs.append({**variant.facts(), **setting, **shared, "sparse": row})
    return pairs


def _network(config: WhatIf) -> tuple[ModelProto, WhatIf]:
    """The dense network, and the settings with the batch size that it takes."""
    path = Path(config.model)
    if path.suffix == ".onnx" or path.is_file():
        model = load(path)
        if not config.input and "batch" not in config.model_fields_set and (fixed := _fixed_batch(model)):
            config = config.model_copy(update={"batch": (fixed,)})
    else:
        model = _from_zoo(config)
    return resize(model, config.input), bench.with_batch_of_input(config)


def _fixed_batch(model: ModelProto) -> int | None:
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name not in weights]
    return next((dims[0].dim_value for dims in shapes if len(dims) > 1 and dims[0].dim_value > 0), None)


def _from_zoo(config: WhatIf) -> ModelProto:
    if config.model not in MODELS:
        raise ModelError(
            f"There is no network and no ONNX file '{config.model}'.",
            where="model",
            advice=f"Networks: {', '.join(MODELS)}. Export your own to ONNX, with any weights, and name that file.",
        )
    try:
        import torch

        from sparsepipe.graph.build import build
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", f"Building the network '{config.model}'") from error
    info = MODELS[config.model]
    shape = next(iter(config.input.values()))[1:] if config.input else info.input_shape
    torch.manual_seed(SEED)
    log.info("Building %s for inputs of %s.", config.model, "x".join(map(str, shape)))
    network = create(config.model, input_shape=shape, classes=info.classes)
    return fold(build(network, shape))[0]
