"""What a file or a folder holds: a JSON-able description with one row per layer. Needs no torch and runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.artefact import MANIFEST, Artefact
from sparsepipe.errors import ArtefactError
from sparsepipe.formats import Compressed, decode
from sparsepipe.formats.choice import describe
from sparsepipe.formats.io import DENSE, is_network, load
from sparsepipe.formats.layout import VALUE_DTYPES, Array
from sparsepipe.formats.masks import is_masks, load_masks
from sparsepipe.formats.patterns import followed
from sparsepipe.formats.tensors import read_tensors
from sparsepipe.inspection_int8 import int8_blocks
from sparsepipe.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec

BEST_SOURCES = ("convert", "freeze", "train")
"""Stages whose weights stand for a whole run, best first."""


def inspect(path: Path) -> dict[str, Any]:
    """Describe an artefact, a run folder, an .onnx file or a .safetensors file.

    Every description has `kind` (`artefact`, `run`, `onnx`, `network`, `masks` or `tensors`), `path`, `bytes`, and
    `layers` with their totals `weights` (elements), `nnz` and `sparsity` (None where there are no layers). A layer is a
    floating-point or int8 tensor of two or more dimensions: `name`, `shape`, `dtype`, `nnz`, `size`, `sparsity`,
    `bytes` as stored, `format`, and `patterns`, the names of the block, n:m and channel patterns that its zeros
    happen to follow, `bytes_per_nonzero`, and `int8`, what blocks cost and save on the int8 operators (`int8_blocks`).
    For ONNX those that an operator takes as its weight are listed, as in `export`, with this `op`;
    `mode` is how a kernel of the library packs its input, None for other operators.

    Raises:
        ArtefactError: there is nothing of these kinds at `path`, or it is damaged.
        FormatError: a compressed weight or a mask is malformed.
        GraphError: an ONNX file is damaged, or its external data lies outside of its folder.
    """
    if path.is_dir():
        return _inspect_artefact(path) if (path / MANIFEST).is_file() else _inspect_run(path)
    if not path.is_file():
        missing = "This is neither a file nor a folder." if path.exists() else "There is no such file or folder."
        raise ArtefactError(missing, where=str(path))
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if path.suffix == ".safetensors":
        return _inspect_tensors(path)
    raise ArtefactError(
        f"A file of the type '{path.suffix}' cannot be inspected.",
        where=str(path),
        advice="Name an .onnx or .safetensors file or a folder; a .pt file becomes one with `sparsepipe freeze`.",
    )


def layer_row(
    name: str, dense: Array, *, stored_bytes: int, stored_as: str, inputs_first: bool = False
) -> dict[str, Any]:
    """The row of one weight of two or more dimensions.

    Args:
        name: its name.
        dense: the weight, [O, I, *kernel].
        stored_bytes: bytes that it takes in the file.
        stored_as: format that it has there.
        inputs_first: the weight is [I, O, *kernel], as MatMul and ConvTranspose take it.
    """
    nnz = int(np.count_nonzero(dense))
    outputs_first = dense.swapaxes(0, 1) if inputs_first else dense
    return {
        "name": name,
        "shape": list(dense.shape),
        "dtype": dense.dtype.name,
        "nnz": nnz,
        "size": dense.size,
        "sparsity": 1 - nnz / dense.size if dense.size else 0.0,
        "bytes": stored_bytes,
        "format": stored_as,
        "bytes_per_nonzero": stored_bytes / nnz if nnz else None,
        "patterns": followed(outputs_first, where=name),
        "int8": int8_blocks(outputs_first),
    }


def is_layer(array: Array) -> bool:
    """Whether a tensor is listed as a layer."""
    return array.ndim >= 2 and array.dtype in VALUE_DTYPES and (array.dtype.kind == "f" or array.dtype == np.int8)


def _described(kind: str, path: Path, size: int, layers: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    weights, nnz = sum(layer["size"] for layer in layers), sum(layer["nnz"] for layer in layers)
    totals = {"weights": weights, "nnz": nnz, "sparsity": 1 - nnz / weights if weights else None}
    return {"kind": kind, "path": str(path), "bytes": size, **totals, **facts, "layers": layers}


def _inspect_tensors(path: Path) -> dict[str, Any]:
    tensors, metadata = read_tensors(path)
    if is_network(metadata):
        kind, layers = "network", _network_rows(load(path), str(path))
    elif is_masks(metadata):
        kind = "masks"
        layers = [
            layer_row(name, mask.astype(np.int8), stored_bytes=tensors[name].nbytes, stored_as="bits")
            for name, mask in load_masks(path).items()
            if mask.ndim >= 2
        ]
    else:
        kind, layers = "tensors", _network_rows(tensors, str(path))
    return _described(kind, path, path.stat().st_size, layers, tensors=len(tensors), metadata=metadata)


def _network_rows(state: Mapping[str, Array | Compressed], where: str) -> list[dict[str, Any]]:
    rows = []
    for name, entry in state.items():
        if isinstance(entry, Compressed):
            dense = decode(entry, where=f"{where}: {name}")
            rows.append(layer_row(name, dense, stored_bytes=entry.nbytes, stored_as=describe(entry)))
        elif is_layer(entry):
            rows.append(layer_row(name, entry, stored_bytes=entry.nbytes, stored_as=DENSE))
    return rows


def _inspect_artefact(folder: Path) -> dict[str, Any]:
    artefact = Artefact.read(folder)
    manifest = artefact.manifest
    try:
        artefact.verify()
        problem = None
    except ArtefactError as error:
        problem = str(error)
    facts: dict[str, Any] = {
        "stage": manifest.stage,
        "digest": artefact.digest,
        "created": manifest.created,
        "intact": problem is None,
        **({"problem": problem} if problem else {}),
        "config": manifest.config,
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "versions": manifest.versions,
        "metrics": {key: value for key, value in manifest.metrics.items() if key != "layers"},
    }
    if SPEC_FILE in manifest.outputs:
        facts["model"] = ModelSpec.read(artefact.file(SPEC_FILE)).model_dump(mode="json")
    onnx_files = [name for name in sorted(manifest.outputs) if name.endswith(".onnx")]
    if onnx_files:
        facts["onnx"] = {name: _without_layers(_inspect_onnx(artefact.file(name))) for name in onnx_files}
    layers: list[dict[str, Any]] = []
    if WEIGHTS_FILE in manifest.outputs:
        layers = _inspect_tensors(artefact.file(WEIGHTS_FILE))["layers"]
    elif onnx_files:
        # Of the files of one export, the smallest shows best what was made sparse.
        smallest = min(onnx_files, key=lambda name: artefact.file(name).stat().st_size)
        layers = _inspect_onnx(artefact.file(smallest))["layers"]
    size = sum(artefact.file(name).stat().st_size for name in manifest.outputs if (folder / name).is_file())
    return _described("artefact", folder, size, layers, **facts)


def _inspect_run(folder: Path) -> dict[str, Any]:
    parts = {child.name: child for child in sorted(folder.iterdir()) if (child / MANIFEST).is_file()}
    if not parts:
        raise ArtefactError(
            "This folder is neither a run nor the output of a stage: no manifest.json in it or one level below.",
            where=str(folder),
        )
    described = {name: _inspect_artefact(child) for name, child in parts.items()}
    source = next((name for name in BEST_SOURCES if name in described), None)
    return _described(
        "run",
        folder,
        sum(part["bytes"] for part in described.values()),
        described[source]["layers"] if source else [],
        layers_of=source,
        interrupted=sorted(child.name for child in folder.glob("*.partial")),
        stages={name: _without_layers(part) for name, part in described.items()},
    )


def _inspect_onnx(path: Path) -> dict[str, Any]:
    from sparsepipe import inspection_onnx

    facts, weights = inspection_onnx.read(path)
    rows = [
        layer_row(
            weight.name,
            weight.values,
            stored_bytes=weight.stored_bytes,
            stored_as=weight.stored_as,
            inputs_first=weight.inputs_first,
        )
        | {"op": weight.op, "mode": weight.mode}
        for weight in weights
        if is_layer(weight.values)
    ]
    folder = path.parent
    size = path.stat().st_size + sum((folder / name).stat().st_size for name in facts["external_data"])
    return _described("onnx", path, size, rows, **facts)


def _without_layers(described: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key != "layers"}
