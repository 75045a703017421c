"""Read an ONNX file that someone else wrote, and trust nothing in it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, SparseTensorProto, TensorProto, ValueInfoProto, helper, numpy_helper

from sparsepipe.errors import GraphError, NotOnnxError, first_line
from sparsepipe.graph.index import NUMBERS, all_nodes, copy, graphs, is_standard, opset
from sparsepipe.graph.restore import Compact, restore

OLDEST_OPSET = 7
"""onnxruntime promises to run operators from this version on."""
NEWEST_OPSET = onnx.defs.onnx_opset_version()
LIMIT_BYTES = 2**31 - 1
"""Largest protobuf message, so the largest single ONNX file."""
SMALLER = "Store weights as float16 or int8, or split the network into several files."


def load(path: Path) -> ModelProto:
    """Read an ONNX file whole and make its weights ordinary ones.

    External data is read in, sparse tensors become dense ones, and the operators of a universal file standard ones.

    Args:
        path: the file; external data is read from its folder only.

    Raises:
        GraphError: there is no such file, it is not ONNX or cut off, its opset or the data type of a tensor is not
            supported, its external data is missing, cut off, outside of the folder or too large, onnx.checker refuses
            it, or an operator of the domain `sparsepipe` is malformed.
    """
    return load_with_rows(path)[0]


def load_with_rows(path: Path) -> tuple[ModelProto, list[Compact]]:
    """As `load`, with a row for each weight that the operators of a universal file hold."""
    model = _parse(path)
    _check_opset(model, path)
    _check_types(model, path)
    model.graph.name = model.graph.name or path.stem  # onnx.checker wants one
    _read_external(model, path)
    _check_lengths(model, path)
    _densify(model, path)
    _complete_outputs(model)
    check(model, where=str(path))
    rows = restore(model, where=str(path), limit=LIMIT_BYTES)
    if rows:
        check(model, where=str(path))
    return model, rows


def check(model: ModelProto, *, where: str, full: bool = False) -> None:
    """Run onnx.checker.

    Args:
        model: the model.
        where: what to call it in the error.
        full: infer the types and shapes of all tensors, too; no model with sparse initializers passes that.

    Raises:
        GraphError: the checker refuses the model.
    """
    if any(_vague_outputs(model)):  # onnxruntime does not mind, and knows operators that onnx cannot infer
        model = copy(model)
        for value in _vague_outputs(model):
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model, full_check=full)
    except Exception as error:  # checker, inference and protobuf errors have no common base class
        raise GraphError(f"The model is not valid ONNX: {first_line(error)}.", where=where) from error


def check_made(model: ModelProto, source: ModelProto, *, where: str) -> None:
    """Run the full `check` on what was made of `source`, as far as `source` passes it.

    A size that a file records wrongly is none to onnxruntime, which warns and goes on.

    Raises:
        GraphError: the checker refuses the model.
    """
    try:
        check(model, where=where, full=True)
    except GraphError:
        try:
            check(source, where=where, full=True)
        except GraphError:
            check(model, where=where)
        else:
            raise


def too_large(where: str, advice: str = SMALLER) -> GraphError:
    """The error for a model over the limit of one ONNX file."""
    return GraphError("The model has more than 2 GB; one ONNX file cannot hold that.", where=where, advice=advice)


def _parse(path: Path) -> ModelProto:
    if not path.is_file():
        raise GraphError("There is no such ONNX file.", where=str(path))
    if path.stat().st_size > LIMIT_BYTES:
        raise too_large(str(path))
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise NotOnnxError(str(path)) from error
    # Any short file of the right form decodes; what makes it a model is a version and a graph.
    if model.ir_version < 1 or not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise NotOnnxError(str(path))
    return model


def _check_opset(model: ModelProto, path: Path) -> None:
    version = opset(model)
    if version == 0:
        raise GraphError("The file does not say which ONNX opset it uses.", where=str(path))
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise GraphError(
            f"The file uses ONNX opset {version}; opsets {OLDEST_OPSET} to {NEWEST_OPSET} can be read.",
            where=str(path),
            advice="Export it with another opset"
            + (", or install a newer onnx package." if version > NEWEST_OPSET else "."),
        )


def _check_types(model: ModelProto, path: Path) -> None:
    """Refuse types of value that the onnx package does not know: onnx.checker lets them pass."""
    known = helper.get_all_tensor_dtypes()
    for tensor in _tensors(model):
        if tensor.data_type not in known:
            raise GraphError(
                f"The tensor '{tensor.name}' has a data type that is unknown, {tensor.data_type}.",
                where=str(path),
                advice="The file is damaged, or newer than the installed onnx package: export it again, or install a "
                "newer onnx.",
            )


def _check_lengths(model: ModelProto, path: Path) -> None:
    """Refuse bytes that are more or fewer than those of a tensor's shape: onnx.checker lets more of them pass."""
    for tensor in _tensors(model):
        if tensor.HasField("raw_data") and len(tensor.raw_data) != _bytes(tensor):
            raise GraphError(
                f"It has {len(tensor.raw_data)} bytes, not the {_bytes(tensor)} of its shape {list(tensor.dims)}.",
                where=f"{path}, tensor '{tensor.name}'",
                advice="The file is damaged: export it again.",
            )


def _bytes(tensor: TensorProto) -> int:
    """What its shape and type take; types of less than a byte are packed."""
    bits = re.search(r"\d+", helper.tensor_dtype_to_np_dtype(tensor.data_type).name)  # float32, int4, float8_e5m2
    count: int = math.prod(tensor.dims)
    return -(-count * (int(bits[0]) if bits else 8) // 8)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model, wherever it is stored."""
    for graph in graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for found in (found for node in all_nodes(model) for found in node.attribute):
        if found.ref_attr_name:  # in a function: the node that calls it holds the tensor
            continue
        if found.type == AttributeProto.TENSOR:
            yield found.t
        elif found.type == AttributeProto.SPARSE_TENSOR:
            yield from (found.sparse_tensor.values, found.sparse_tensor.indices)
        yield from found.tensors


def _complete_outputs(model: ModelProto) -> None:
    """Infer the shapes of outputs that do not say theirs, where onnx knows the operators before them."""
    if not any(_vague_outputs(model)):
        return
    with contextlib.suppress(Exception):  # what is wrong with the model is for the checker to say
        inferred = {value.name: value.type for value in onnx.shape_inference.infer_shapes(model).graph.output}
        for value in _vague_outputs(model):
            value.type.CopyFrom(inferred[value.name])


def _vague_outputs(model: ModelProto) -> Iterator[ValueInfoProto]:
    for value in model.graph.output:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            yield value


def _read_external(model: ModelProto, path: Path) -> None:
    pieces = [
        (tensor, *_external_piece(tensor, path))
        for tensor in _tensors(model)
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    total = path.stat().st_size + sum(length for _, _, _, length in pieces)
    if total > LIMIT_BYTES:
        raise too_large(str(path))
    for tensor, file, offset, length in pieces:
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT


def _external_piece(tensor: TensorProto, path: Path) -> tuple[Path, int, int]:
    """File, offset and length in bytes of a tensor's external data, checked."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get("location", "")
    where = f"{path}, tensor '{tensor.name}'"
    folder = path.parent.resolve()
    pure = PurePosixPath(name)
    file = (folder / pure).resolve()
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or not file.is_relative_to(folder):
        raise GraphError(
            f"The external data '{name}' leads out of the file's folder.",
            where=where,
            advice="Such a file is not read, because it could take in any file of this machine.",
        )
    if not file.is_file():
        raise GraphError(
            f"The external data file '{name}' is missing.", where=where, advice="Copy it beside the ONNX file."
        )
    size = file.stat().st_size
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", "0")) or _bytes(tensor)
    except ValueError as error:
        raise GraphError("The offset or length of its external data is not a number.", where=where) from error
    if offset < 0 or length < 0 or offset + length > size:
        raise GraphError(
            f"The external data '{name}' is cut off: bytes {offset} to {offset + length} of {size} are needed.",
            where=where,
            advice="Copy the file again.",
        )
    return file, offset, length


def _densify(model: ModelProto, path: Path) -> None:
    """Turn what holds a tensor in another form into tensors: sparse ones, and plain numbers in Constant nodes."""
    numbers = [
        found
        for node in all_nodes(model)
        if is_standard(node, "Constant")
        for found in node.attribute
        if found.name != "value" and not found.ref_attr_name
    ]
    held = [found for found in numbers if found.name == "sparse_value"]
    initializers = [sparse for graph in graphs(model) for sparse in graph.sparse_initializer]
    # A few bytes can stand for a tensor of any size, so the sum is known before the first one is made.
    if sum(_dense_bytes(sparse) for sparse in [*initializers, *(found.sparse_tensor for found in held)]) > LIMIT_BYTES:
        raise GraphError(
            "Its sparse tensors have more than 2 GB when they are dense; one ONNX file cannot hold that.",
            where=str(path),
        )
    for graph in graphs(model):
        graph.initializer.extend(_dense(sparse, path) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
    for found in held:
        dense = _dense(found.sparse_tensor, path)
        found.Clear()
        found.name, found.type = "value", AttributeProto.TENSOR
        found.t.CopyFrom(dense)
    for found in numbers:
        if found.name in NUMBERS:
            value = np.array(helper.get_attribute_value(found), NUMBERS[found.name])
            found.Clear()
            found.name, found.type = "value", AttributeProto.TENSOR
            found.t.CopyFrom(numpy_helper.from_array(value))


def _dense_bytes(sparse: SparseTensorProto) -> int:
    # Negative sizes are found to be malformed later; here they must not make the sum smaller.
    size: int = math.prod(sparse.dims)
    return abs(size) * helper.tensor_dtype_to_np_dtype(sparse.values.data_type).itemsize


def _dense(sparse: SparseTensorProto, path: Path) -> TensorProto:
    name = sparse.values.name
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        shape = tuple(sparse.dims)
        size = math.prod(shape)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape) if indices.size else indices.reshape(-1)
        if indices.size and not 0 <= indices.min() <= indices.max() < size:
            raise ValueError("an index is out of range")
        dense = np.zeros(size, values.dtype)
        dense[indices] = values
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise GraphError(f"The sparse tensor '{name}' is malformed: {first_line(error)}.", where=str(path)) from error
    return numpy_helper.from_array(dense.reshape(shape), name)
