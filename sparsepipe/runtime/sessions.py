"""onnxruntime sessions with the kernel library registered, and their errors as one paragraph."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.errors import GraphError, NotOnnxError, one_line
from sparsepipe.runtime.library import library_path

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto

Array = NDArray[Any]

log = logging.getLogger("sparsepipe")

PROVIDERS = ["CPUExecutionProvider"]
_IR_TOO_NEW = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_NO_MODEL = re.compile(r"INVALID_PROTOBUF|No graph was found in the protobuf")
_SHARED_WEIGHT = "Attempt to replace the existing tensor"
"""How onnxruntime 1.31 fails where several nodes share an int8 weight, and int8 shall be exact."""
EXACT_INT8 = "session.x64quantprecision"
"""An entry of a session's configuration: "1" where onnxruntime's int8 operators are exact on any processor."""
_EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


def session(
    path: str | Path | bytes, *, threads: int = 1, library: bool = True, exact_int8: bool = True, **options: Any
) -> onnxruntime.InferenceSession:
    """Open an ONNX model on the CPU, with the kernel library registered.

    A version of the file format (IR version) that is newer than onnxruntime reads is read as the newest that it reads:
    the onnx package writes it before there is an onnxruntime for it, mostly without using what is new in it.

    Args:
        path: the file, or a whole serialised model (which cannot refer to external data).
        threads: threads of one operator, the caller's included; 0 leaves the number to onnxruntime.
        library: whether to register the kernel library, where it was built.
        exact_int8: whether onnxruntime's own int8 operators add exactly on x86 processors without VNNI, where its
            faster way saturates with weights of more than 7 bits. It has no exact way for convolutions of int8
            activations. The kernel library is exact either way.
        options: further attributes of `onnxruntime.SessionOptions`, by name.

    Raises:
        GraphError: the file is missing, is no valid model, or needs something that this onnxruntime does not have; or
            an option does not exist or does not take the value.
    """
    import onnxruntime

    file = None if isinstance(path, bytes) else Path(path)
    where = file.name if file else "model"
    if file and not file.is_file():
        raise GraphError("There is no such ONNX file.", where=str(file))
    settings = onnxruntime.SessionOptions()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # errors come as exceptions; onnxruntime would print them as well
    if exact_int8:
        settings.add_session_config_entry(EXACT_INT8, "1")
    _set(settings, {"intra_op_num_threads": threads, **options})
    try:
        if library and (kernels := library_path()) is not None:
            settings.register_custom_ops_library(kernels)
        try:
            return _open(path if isinstance(path, bytes) else str(path), settings)
        except Exception as error:
            too_new = _IR_TOO_NEW.search(str(error))
            if too_new is None:
                raise
            log.warning(
                "%s: its IR version %s is newer than this onnxruntime reads; it was rewritten in memory as %s "
                "(`sparsepipe export` does so for good).",
                where,
                *too_new.groups(),
            )
            if file:
                settings.add_session_config_entry(_EXTERNAL_DATA_FOLDER, str(file.absolute().parent))
            model = _parse(path)
            model.ir_version = int(too_new[2])
            return _open(model.SerializeToString(), settings)
    except Exception as error:  # onnxruntime's errors have no common base class
        if _NO_MODEL.search(str(error)):
            raise NotOnnxError(where) from error
        raise GraphError(f"onnxruntime cannot load it: {one_line(error)}", where=where) from error


def _open(model: str | bytes, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session; not an exact one where onnxruntime 1.31 has none: of convolutions of int8 activations."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoSuchKernel

    try:
        return onnxruntime.InferenceSession(model, settings, providers=PROVIDERS)
    except NoSuchKernel:
        settings.add_session_config_entry(EXACT_INT8, "0")
    except Fail as error:
        if _SHARED_WEIGHT not in str(error):
            raise
        from sparsepipe.runtime.unshared import unshare

        if isinstance(model, str):
            settings.add_session_config_entry(_EXTERNAL_DATA_FOLDER, str(Path(model).absolute().parent))
        model = unshare(_parse(model)).SerializeToString()
    return onnxruntime.InferenceSession(model, settings, providers=PROVIDERS)


def _parse(model: str | Path | bytes) -> ModelProto:
    """A model from its file or its serialised form; its external data stays where it is."""
    import onnx

    result: ModelProto = onnx.ModelProto.FromString(model if isinstance(model, bytes) else Path(model).read_bytes())
    return result


def _set(settings: onnxruntime.SessionOptions, options: Mapping[str, Any]) -> None:
    allowed = sorted(name for name, kind in vars(type(settings)).items() if isinstance(kind, property))
    for name, value in options.items():
        if name not in allowed:
            raise GraphError(
                f"onnxruntime.SessionOptions has no attribute '{name}'.",
                where="session",
                advice=f"It has {', '.join(allowed)}.",
            )
        try:
            setattr(settings, name, value)
        except TypeError as error:
            raise GraphError(f"The option '{name}' cannot be {value!r}.", where="session") from error


def run(model: onnxruntime.InferenceSession, inputs: Mapping[str, Array], *, where: str = "model") -> list[Array]:
    """One call: input name -> array, to the list of outputs.

    Raises:
        GraphError: an input is missing or has the wrong type or shape, or an operator fails.
    """
    try:
        return [np.asarray(output) for output in model.run(None, dict(inputs))]
    except Exception as error:  # onnxruntime's errors have no common base class
        raise GraphError(f"onnxruntime cannot run it: {one_line(error)}", where=where) from error


def predict(model: onnxruntime.InferenceSession, batches: Iterable[Array]) -> Iterator[Array]:
    """The first output for each batch of a network with one input.

    Raises:
        GraphError: the network has several inputs, or a batch does not fit.
    """
    names = [node.name for node in model.get_inputs()]
    if len(names) != 1:
        raise GraphError(f"The network has {len(names)} inputs ({', '.join(names)}); one was expected.")
    for batch in batches:
        yield run(model, {names[0]: batch})[0]
