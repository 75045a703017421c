"""onnxruntime sessions with the kernel library registered, and their errors as one paragraph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.errors import GraphError
from sparsepipe.runtime.library import library_path

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]


def session(
    path: str | Path | bytes, *, threads: int = 1, library: bool = True, **options: Any
) -> onnxruntime.InferenceSession:
    """Open an ONNX model on the CPU, with the kernel library registered.

    Args:
        path: the file, or a whole serialised model (which cannot refer to external data).
        threads: threads of one operator, the caller's included; 0 leaves the number to onnxruntime.
        library: whether to register the kernel library, where it was built.
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
    _set(settings, {"intra_op_num_threads": threads, **options})
    try:
        if library and (kernels := library_path()) is not None:
            settings.register_custom_ops_library(kernels)
        model = str(file) if file else path
        return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise GraphError(f"onnxruntime cannot load it: {one_line(error)}", where=where) from error


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


def one_line(error: BaseException) -> str:
    """The message of an error as one sentence, without line breaks."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text or type(error).__name__}."
