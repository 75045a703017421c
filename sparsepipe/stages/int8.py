"""Exports in int8: the samples to calibrate on, and the quantised files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto

from sparsepipe import data as datasets
from sparsepipe.errors import RecipeError
from sparsepipe.graph.choice import Choice
from sparsepipe.graph.finish import serialise
from sparsepipe.quantization.calibrate import Feeds, calibration_rows, quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.recipe import Export, check
from sparsepipe.runtime.inputs import inputs_of
from sparsepipe.runtime.samples import labelled_samples
from sparsepipe.runtime.sessions import session
from sparsepipe.spec import ModelSpec
from sparsepipe.stages.validate import input_for

log = logging.getLogger("sparsepipe")

BATCH = 16
SPEC_KEY = "sparsepipe.spec"
TARGETS = ("dense", "universal")


@dataclass(frozen=True)
class Int8:
    """The int8 forms of a network.

    Attributes:
        files: target -> model.
        kernels: a row for each layer, of the file `universal`.
        samples: number of samples that the ranges come from.
    """

    files: Mapping[str, ModelProto]
    kernels: list[Choice]
    samples: int


def check_settings(config: Export) -> None:
    """Refuse what has no meaning for int8.

    Raises:
        RecipeError: nothing to calibrate with, a target without an int8 form, or kernels to be timed.
    """
    if config.calibrate is None:
        raise RecipeError(
            "int8 needs samples, on which the ranges of activations are found.",
            where="export.calibrate",
            advice="Add --calibrate DATA, a dataset as `sparsepipe validate` takes it: npz:FILE, for example.",
        )
    if "targets" in config.model_fields_set and "portable" in config.targets:
        raise RecipeError(
            "The target portable has no int8 form.", where="export.targets", advice="Name dense, universal or both."
        )
    if config.measure:
        raise RecipeError(
            "int8 layers are not chosen by timing them.", where="export.measure", advice="Leave --measure out."
        )


def prepare(folded: ModelProto, properties: Mapping[str, str], config: Export) -> Int8:
    """Calibrate and quantise.

    Args:
        folded: the network in fp32, without batch normalisations.
        properties: metadata that the files will have beside those of `folded`.
        config: with a dataset in `calibrate`.

    Raises:
        DataError: the dataset cannot be read, or does not fit the network.
        GraphError: onnxruntime cannot quantise the network.
    """
    stored = {entry.key: entry.value for entry in folded.metadata_props} | dict(properties)
    feeds, count = _samples(folded, stored.get(SPEC_KEY), config)
    dense = quantise(folded, feeds, method=config.calibration)
    sparse, kernels = rewrite(dense)
    return Int8({"dense": dense, "universal": sparse}, kernels, count)


def _samples(model: ModelProto, spec: str | None, config: Export) -> tuple[list[Feeds], int]:
    """Calls with samples of the training split, and their number."""
    assert config.calibrate is not None
    name = config.calibrate.name
    dataset = datasets.load(name, config.calibrate.options)
    taken = inputs_of(session(serialise(model, where=model.graph.name), library=False))
    entry = input_for(dataset, taken, where=name)
    preprocessing = dataset.preprocessing
    if spec is None:
        log.info("The network names no preprocessing, so that of the dataset '%s' is used.", name)
    else:
        preprocessing = check(ModelSpec, json.loads(spec), where=SPEC_KEY).preprocessing
    rows = calibration_rows(len(dataset.train), config.calibration_samples, config.calibration_seed)

    def load(indices: Any) -> Any:
        return datasets.prepare(dataset.train.load(rows[indices]), preprocessing)

    batches = labelled_samples(entry, dataset.train.labels[rows], BATCH, load)
    return [batch.inputs for batch in batches], len(rows)
