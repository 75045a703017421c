"""Convert: every layer in the format that makes it smallest.

A converted network is `model.safetensors` (components, see formats/io.py), `layers.json` (the table of layers) and, for
a network that sparsepipe froze, `model.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.artefact import Artefact, Draft, digest_file, draft, write_json
from sparsepipe.errors import ArtefactError
from sparsepipe.formats import Compressed
from sparsepipe.formats.choice import block_text, choose, verify
from sparsepipe.formats.finite import ADVICE, not_finite
from sparsepipe.formats.io import DENSE, load_dense, save
from sparsepipe.formats.layout import Array
from sparsepipe.formats.tensors import read_tensors
from sparsepipe.progress import track
from sparsepipe.recipe import Conversion
from sparsepipe.spec import LAYERS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec

UNKNOWN_PATTERN = "unstructured"


def run(config: Conversion, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
    """Convert what the stage `freeze` made.

    A layer is a floating-point tensor of two or more dimensions; everything else stays as it is. Each converted layer
    is decoded again and compared bit for bit before anything is written.

    Args:
        config: the formats to choose from.
        inputs: the artefact of `freeze`.
        out: folder to write.

    Raises:
        ArtefactError: a file is missing or damaged, or a value is not finite.
        FormatError: a layer does not come back as it was.
    """
    frozen = inputs["freeze"]
    spec = ModelSpec.read(frozen.file(SPEC_FILE))
    state = read_tensors(frozen.file(WEIGHTS_FILE)).tensors
    _refuse_not_finite(state, frozen.file(WEIGHTS_FILE))
    with draft(out, "convert", config, {"freeze": frozen.digest}) as building:
        spec.write(building.folder)
        _write(building, state, config, spec.pattern)
    return Artefact.read(out, "convert")


def from_onnx(path: Path, config: Conversion, out: Path) -> Artefact:
    """Convert the weights of any ONNX file: the float constants that feed Conv, ConvTranspose, Gemm and MatMul.

    They keep the names and the shapes that they have in the file; so the blocks of a weight [inputs, outputs], as
    MatMul takes it, lie along its own two axes: rows of the format are inputs there. A -0.0 in a compressed layer
    becomes +0.0. There is no `model.json`, because the file does not say how to build the network.

    Args:
        path: the ONNX file.
        config: the formats to choose from.
        out: folder to write.

    Raises:
        GraphError: the file is missing or damaged, or none of its constants is such a weight.
        ArtefactError: a value of a weight is not finite.
        FormatError: a layer does not come back as it was.
    """
    from sparsepipe.stages import onnx_weights

    state = onnx_weights.read(path)
    _refuse_not_finite(state, path)
    with draft(out, "convert", config, {"onnx": digest_file(path)}) as building:
        _write(building, state, config, UNKNOWN_PATTERN)
    return Artefact.read(out, "convert")


def load_weights(artefact: Artefact) -> dict[str, Array]:
    """The dense weights and buffers of a frozen or converted network, by name. Needs no torch.

    Raises:
        ArtefactError: an artefact of another stage, or its weights are missing or damaged.
        FormatError: a compressed layer is malformed; the message names the component.
    """
    if artefact.manifest.stage == "freeze":
        return read_tensors(artefact.file(WEIGHTS_FILE)).tensors
    if artefact.manifest.stage == "convert":
        return load_dense(artefact.file(WEIGHTS_FILE))
    raise ArtefactError(
        f"Weights are read from the stages 'freeze' and 'convert', not from '{artefact.manifest.stage}'.",
        where=str(artefact.folder),
    )


def _refuse_not_finite(state: Mapping[str, Array], where: Path) -> None:
    if problem := not_finite(state.items()):
        raise ArtefactError(problem, where=str(where), advice=ADVICE)


def _write(building: Draft, state: Mapping[str, Array], config: Conversion, pattern: str) -> None:
    converted: dict[str, Array | Compressed] = dict(state)
    layers = []
    names = [name for name, array in state.items() if array.ndim >= 2 and array.dtype.kind == "f"]
    for name in track(names, "Converting", len(names)):
        dense = state[name]
        choice = choose(dense, config.formats, pattern, where=name)
        if choice.weight is not None:
            verify(choice.weight, dense, where=name)
            converted[name] = choice.weight
        layers.append(_layer(name, dense, choice.weight, choice.reason))
    save(building.folder / WEIGHTS_FILE, converted)
    write_json(building.folder / LAYERS_FILE, layers)
    building.metrics |= {
        "bytes_before": sum(array.nbytes for array in state.values()),
        "bytes_after": sum(entry.nbytes for entry in converted.values()),
        "layers": layers,
    }


def _layer(name: str, dense: Array, weight: Compressed | None, reason: str) -> dict[str, Any]:
    nnz = int(np.count_nonzero(dense))
    return {
        "name": name,
        "shape": list(dense.shape),
        "nnz": nnz,
        "size": dense.size,
        "sparsity": 1 - nnz / dense.size if dense.size else 0.0,
        "format": DENSE if weight is None else weight.format,
        "block": None if weight is None else block_text(weight),
        "dense_bytes": dense.nbytes,
        "bytes": dense.nbytes if weight is None else weight.nbytes,
        "reason": reason,
    }
