"""Sparse files of a dense network that has not been trained: random zeros, then the very export that users run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from sparsepipe.errors import GraphError
from sparsepipe.graph.finish import serialise, stamp
from sparsepipe.graph.fold import fold
from sparsepipe.graph.prune import prune
from sparsepipe.graph.select import sparsity as whole_sparsity
from sparsepipe.graph.select import survey
from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.recipe import Export
from sparsepipe.runtime.compare import Tally, largest
from sparsepipe.runtime.sessions import run, session
from sparsepipe.spec import PRECISION_KEY, TARGET_KEY
from sparsepipe.stages import export

MAX_RELATIVE = 1e-3
"""As for `validate`: a file whose outputs are further from the dense ones is not timed."""
MAX_INT8_ERROR = 0.02
"""Root mean square in units of the outputs' range. Sums may round by 1 otherwise than in the plain int8 file."""


@dataclass(frozen=True)
class Variant:
    """A universal file at one setting.

    Attributes:
        pattern: of the zeros.
        sparsity: of the layers that are pruned.
        path: the universal file.
        total_sparsity: share of zeros over all weights.
        layers_sparse: layers that run on a sparse kernel.
        layers_dense: layers that stay dense.
        max_relative_error: of the outputs, against the same weights as a dense file in onnxruntime without the
            kernel library, relative to the largest output.
    """

    pattern: str
    sparsity: float
    path: Path
    total_sparsity: float
    layers_sparse: int
    layers_dense: int
    max_relative_error: float

    @property
    def label(self) -> str:
        return f"{self.pattern} {self.sparsity:.4g}"

    def facts(self) -> dict[str, Any]:
        """All but the path, as JSON-able values."""
        return {key: value for key, value in vars(self).items() if key != "path"}


def export_dense(model: ModelProto, folder: Path) -> Path:
    """The dense file of `model`, as `export` writes it.

    Raises:
        GraphError: it is not valid, or onnxruntime cannot load it.
    """
    return _export(model, "dense", folder)[0]


def export_sparse(
    model: ModelProto, pattern: str, sparsity: float, folder: Path, feeds: Mapping[str, np.ndarray[Any, Any]]
) -> Variant:
    """The universal file of `model` with random zeros, checked against dense onnxruntime on the inputs `feeds`.

    Raises:
        GraphError: no weight can be pruned, or the outputs are not finite, all zero, or not those of the dense file.
    """
    pruned, _ = prune(model, sparsity, pattern)
    path, metrics = _export(pruned, "universal", folder)
    error = _error(serialise(pruned, where=path.name), path, feeds, where=f"{pattern}, sparsity {sparsity:.4g}")
    sparse = sum(layer["sparse"] for layer in metrics["kernels"])
    return Variant(
        pattern=pattern,
        sparsity=sparsity,
        path=path,
        total_sparsity=metrics["sparsity"],
        layers_sparse=sparse,
        layers_dense=len(metrics["kernels"]) - sparse,
        max_relative_error=error,
    )


def export_sparse_int8(
    model: ModelProto, pattern: str, sparsity: float, folder: Path, calls: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> Variant:
    """The int8 universal file of `model` with random zeros, checked against its plain int8 file in onnxruntime.

    Args:
        model: the dense network.
        pattern: of the zeros.
        sparsity: of the layers that are pruned.
        folder: where the file is written.
        calls: input name -> array, to calibrate on; the first also to check on.

    Raises:
        GraphError: no weight can be pruned, or the outputs are not those of the plain int8 file.
    """
    where = f"int8 {pattern}, sparsity {sparsity:.4g}"
    folded = fold(prune(model, sparsity, pattern)[0])[0]
    plain = quantise(folded, calls)
    made, choices = rewrite(plain)
    total = whole_sparsity(survey(folded))
    stamp(made, {TARGET_KEY: "universal", PRECISION_KEY: "int8"})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / export.file_name("universal")
    path.write_bytes(serialise(made, where=path.name))
    tally = Tally()
    expected = run(session(serialise(plain, where=path.name), library=False), calls[0], where=where)
    tally.add(expected, run(session(path), calls[0], where=where))
    if not tally.complete or tally.rms_of_range > MAX_INT8_ERROR:
        raise GraphError(
            tally.note or f"The outputs differ from plain int8 by {tally.rms_of_range:.1%} of their range.", where=where
        )
    sparse = sum(choice.sparse for choice in choices)
    return Variant(pattern, sparsity, path, total, sparse, len(choices) - sparse, tally.max_relative)


def _export(model: ModelProto, target: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.onnx"
    source.write_bytes(serialise(model, where=model.graph.name))
    try:
        artefact = export.from_onnx(source, Export(targets=(target,)), folder / target)
    finally:
        source.unlink()
    return artefact.file(export.file_name(target)), artefact.metrics


def _error(dense: bytes, sparse: Path, feeds: Mapping[str, np.ndarray[Any, Any]], where: str) -> float:
    """Largest difference of the outputs relative to the largest output of the dense model."""
    expected = run(session(dense, library=False), feeds, where=where)
    tally = Tally()
    tally.add(expected, run(session(sparse), feeds, where=where))
    if not tally.passed(MAX_RELATIVE, min_agreement=0.0):
        raise GraphError(
            tally.note or f"The outputs of the sparse file differ from the dense ones by {tally.max_relative:.1e}.",
            where=where,
        )
    dead = [index for index, output in enumerate(expected) if output.dtype.kind == "f" and largest(output) == 0]
    if dead:
        raise GraphError(
            f"With random zeros the network computes nothing: output {dead[0]} is zero everywhere.", where=where
        )
    return tally.max_relative
