"""Exports in int8: the samples to calibrate on, and the quantised files."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto

from sparsepipe import data as datasets
from sparsepipe.errors import GraphError, RecipeError
from sparsepipe.graph.choice import Choice
from sparsepipe.graph.finish import serialise
from sparsepipe.quantization.calibrate import Feeds, Ranges, calibration_rows, ranges
from sparsepipe.quantization.noise import is_quantised
from sparsepipe.quantization.normal import normal_form
from sparsepipe.quantization.points import completed
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.quantization.sensitivity import mixed
from sparsepipe.recipe import Export
from sparsepipe.runtime.inputs import Input, inputs_of, random_inputs
from sparsepipe.runtime.samples import Batch, labelled_samples
from sparsepipe.runtime.sessions import session
from sparsepipe.settings import check
from sparsepipe.spec import SPEC_KEY, ModelSpec
from sparsepipe.stages.fit import input_for
from sparsepipe.stages.int8_selection import Selection, select

log = logging.getLogger("sparsepipe")

BATCH = 16
SELECTION_SAMPLES = 1000
"""Samples on which accuracy is measured for `max_drop`; of a small dataset, those that the calibration leaves."""


@dataclass(frozen=True)
class Int8:
    """The int8 forms of a network.

    Attributes:
        files: target -> model.
        kernels: a row for each layer, of the file `universal`.
        samples: number of samples that the ranges come from.
        call: inputs of one call, by name, on which a file is tried.
        selection: what was decided by `max_drop`; None without that.
    """

    files: Mapping[str, ModelProto]
    kernels: list[Choice]
    samples: int
    call: Feeds
    selection: Selection | None = None


def prepare(folded: ModelProto, properties: Mapping[str, str], config: Export) -> Int8:
    """Calibrate and quantise.

    Args:
        folded: the network in fp32, without batch normalisations.
        properties: metadata that the files will have beside those of `folded`.
        config: with a dataset in `calibrate`; a network that was trained by int8-qat brings ranges of its own, which
            come first, and may need none.

    Raises:
        RecipeError: there is nothing to calibrate with.
        DataError: the dataset cannot be read, or does not fit the network.
        GraphError: the network is quantised already, is not float32, or onnxruntime cannot quantise it.
    """
    if is_quantised(folded):
        raise GraphError(
            "It is quantised already, and quantising bytes again would only lose more.",
            where=folded.graph.name or "model",
            advice="Export the fp32 network that it was made from with --precision int8, or leave that out here.",
        )
    folded = normal_form(folded)
    stored = {entry.key: entry.value for entry in folded.metadata_props} | dict(properties)
    spec = stored.get(SPEC_KEY)
    observed = (check(ModelSpec, json.loads(spec), where=SPEC_KEY).activation_ranges if spec else None) or {}
    found: Ranges = {}
    missing: Collection[str] = ()
    if observed:
        found, missing = completed(folded, observed)
    calibration: list[Batch] = []
    held_out: list[Batch] = []
    if config.calibrate is None:
        _refuse_without_samples(bool(observed), missing, config)
    else:
        calibration, held_out = _samples(folded, spec, config)
    feeds = [batch.inputs for batch in calibration]
    if feeds:
        found = {**ranges(folded, feeds, method=config.calibration), **found}
    selection = None
    if config.max_drop is not None:
        selection = select(folded, found, feeds, held_out, config.max_drop)
    dense = mixed(folded, found, set(selection.kept) if selection else set())
    sparse, kernels = rewrite(dense)
    if selection is not None:
        kernels = [replace(row, reason=selection.kept.get(row.output, row.reason)) for row in kernels]
    count = sum(batch.count for batch in calibration)
    call = feeds[0] if feeds else random_inputs(_inputs(folded), 1, 0)
    return Int8({"dense": dense, "universal": sparse}, kernels, count, call, selection)


def _refuse_without_samples(trained: bool, missing: Collection[str], config: Export) -> None:
    """Raise where there are no samples to calibrate on, but something has to be found on them."""
    if not trained:
        what = "int8 needs samples, on which the ranges of activations are found."
    elif missing:
        what = f"Its training by int8-qat found no ranges of {', '.join(sorted(missing))}, so samples are needed."
    elif config.max_drop is not None:
        what = "--max-drop measures the accuracy on samples, and none are named."
    else:
        return
    raise RecipeError(
        what,
        where="export.calibrate",
        advice="Add --calibrate DATA, a dataset as `sparsepipe validate` takes it: npz:FILE, for example.",
    )


def _samples(model: ModelProto, spec: str | None, config: Export) -> tuple[list[Batch], list[Batch]]:
    """Samples of the training split to calibrate on, and, where layers are to be selected, others to select on."""
    assert config.calibrate is not None
    name = config.calibrate.name
    dataset = datasets.load(name, config.calibrate.options)
    entry = input_for(dataset, _inputs(model), where=name)
    preprocessing = dataset.preprocessing
    if spec is None:
        log.info("The network names no preprocessing, so that of the dataset '%s' is used.", name)
    else:
        preprocessing = check(ModelSpec, json.loads(spec), where=SPEC_KEY).preprocessing
    wanted = config.calibration_samples
    rows = calibration_rows(len(dataset.train), wanted, config.calibration_seed)
    others: Any = []
    if config.max_drop is not None:
        # With a larger number the same ones come first, and then these.
        more = calibration_rows(len(dataset.train), wanted + SELECTION_SAMPLES, config.calibration_seed)
        others = np.setdiff1d(more, rows)
        if not len(others):
            raise RecipeError(
                f"All {len(rows)} training samples are for calibration, so that none are left to measure accuracy on.",
                where="export.calibration_samples",
                advice="Name fewer with --calibration-samples.",
            )

    def batches(chosen: Any) -> list[Batch]:
        def load(indices: Any) -> Any:
            return datasets.prepare(dataset.train.load(chosen[indices]), preprocessing)

        return list(labelled_samples(entry, dataset.train.labels[chosen], BATCH, load)) if len(chosen) else []

    return batches(rows), batches(others)


def _inputs(model: ModelProto) -> list[Input]:
    return inputs_of(session(serialise(model, where=model.graph.name), library=False))
