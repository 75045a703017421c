"""What every runtime gets of a network: a file with fixed sizes, inputs, and the outputs of dense onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from sparsepipe import data as datasets
from sparsepipe.benchmark import calls
from sparsepipe.graph.finish import serialise
from sparsepipe.graph.resize import resize
from sparsepipe.quantization.calibrate import calibration_rows
from sparsepipe.runtime.inputs import Input, inputs_of, resolve
from sparsepipe.runtime.samples import labelled_samples, random_samples
from sparsepipe.runtime.sessions import run, session
from sparsepipe.settings import check
from sparsepipe.spec import SPEC_KEY, ModelSpec
from sparsepipe.stages.fit import input_for

if TYPE_CHECKING:
    from sparsepipe.stages.peers import Peers

SEED = 0
Calls = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What all runtimes get of a network at one batch size: files, and the outputs of dense onnxruntime.

    Attributes:
        source: the dense network with fixed sizes.
        feeds: a file of one call, which is timed.
        checks: calls whose outputs are compared.
        calibration: calls to calibrate int8 with.
        expected: the outputs for `checks`.
    """

    source: Path
    feeds: Path
    checks: Path
    calibration: Path
    expected: Sequence[Sequence[Any]]


def work_of(model: ModelProto, label: str, config: Peers, batch: int, folder: Path) -> Work:
    """Write what all runtimes get.

    Raises:
        GraphError: the network cannot be run so, as where its batch size is fixed at another one.
        DataError: the dataset cannot be read, or does not fit the network.
    """
    source = _fixed(model, config, batch, folder / "dense.onnx")
    training, testing = _samples(source, model, config)
    opened = session(source, library=False)
    return Work(
        source,
        calls.write(folder / "feeds.npz", testing[:1]),
        calls.write(folder / "checks.npz", testing),
        calls.write(folder / "calibration.npz", training),
        [run(opened, one, where=label) for one in testing],
    )


def _fixed(model: ModelProto, config: Peers, batch: int, path: Path) -> Path:
    """Write the model with all sizes of its inputs fixed, as some runtimes need them."""
    fixed = resize(model, config.input)
    shapes = resolve(inputs_of(session(serialise(fixed, where=model.graph.name), library=False)), batch)
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    del fixed.graph.value_info[:]
    path.write_bytes(serialise(fixed, where=model.graph.name))
    return path


def random_calls(inputs: Sequence[Input], samples: int, seed: int) -> Calls:
    """Calls with about so many random samples, for inputs of fixed sizes; what int8 is calibrated on by default."""
    return [dict(batch.inputs) for batch in random_samples(inputs, samples, _batch(inputs), seed, {})]


def _batch(inputs: Sequence[Input]) -> int:
    return next((entry.batch for entry in inputs if entry.batch), 1)


def _samples(source: Path, model: ModelProto, config: Peers) -> tuple[Calls, Calls]:
    """Calls to calibrate with and calls to compare on, each with about `config.samples` samples."""
    taken = inputs_of(session(source, library=False))
    if config.calibrate is None:
        return random_calls(taken, config.samples, SEED), random_calls(taken, config.samples, SEED + 10**6)
    size = _batch(taken)
    name = config.calibrate.name
    dataset = datasets.load(name, config.calibrate.options)
    entry = input_for(dataset, taken, where=name)
    preprocessing = dataset.preprocessing
    if spec := next((one.value for one in model.metadata_props if one.key == SPEC_KEY), None):
        preprocessing = check(ModelSpec, json.loads(spec), where=SPEC_KEY).preprocessing
    found: list[Calls] = []
    for split in (dataset.train, dataset.test):
        chosen_rows = calibration_rows(len(split), config.samples, SEED)

        def prepared(indices: Any, split: Any = split, rows: Any = chosen_rows) -> Any:
            return datasets.prepare(split.load(rows[indices]), preprocessing)

        batches = labelled_samples(entry, np.asarray(split.labels)[chosen_rows], size, prepared)
        found.append([dict(batch.inputs) for batch in batches])
    return found[0], found[1]
