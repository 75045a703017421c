"""The last step before a model is written: metadata, the size limit, the checker."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto

from sparsepipe.graph.load import LIMIT_BYTES, SMALLER, check, check_made, too_large

WRITING = f"Write the portable target alone if that is small enough. {SMALLER}"


def stamp(model: ModelProto, properties: Mapping[str, str]) -> None:
    """Set entries of the model's metadata, in place; entries under other keys stay."""
    kept = {entry.key: entry.value for entry in model.metadata_props} | dict(properties)
    del model.metadata_props[:]
    for key, value in kept.items():
        model.metadata_props.add(key=key, value=value)


def serialise(model: ModelProto, *, where: str, source: ModelProto | None = None, limit: int = LIMIT_BYTES) -> bytes:
    """The model as the bytes of its file, checked by onnx.checker.

    Args:
        model: the model.
        where: what to call it in an error.
        source: what it was made of. If that passes the full check, with inference of all types and shapes, the model
            must, too; no model with sparse initializers can.
        limit: most bytes that it may have.

    Raises:
        GraphError: it has more than 2 GB, or is not valid ONNX.
    """
    try:
        data: bytes = model.SerializeToString()
    except Exception as error:  # protobuf refuses a message of more than 2 GB by ValueError or its own EncodeError
        raise too_large(where, WRITING) from error
    if len(data) > limit:
        raise too_large(where, WRITING)
    if source is None or model.graph.sparse_initializer:
        check(model, where=where)
    else:
        check_made(model, source, where=where)
    return data
