"""Reading the pickles of the CIFAR archives without running anything that they name.

A pickle calls whatever it names. Here it finds the few names that such an archive holds, bound to stand-ins that only
note what they are given; numpy's own unpickling, which trusts its input, is not reached.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.errors import DataError


def read_pickle(data: bytes, where: str) -> dict[str, Any]:
    """The dict that `data` holds, its arrays as numpy arrays. Strings of Python 2 are read as latin-1.

    Raises:
        DataError: the pickle names anything but numeric numpy arrays, is damaged, or holds no dict.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(value, dict):
            raise DataError(f"The file holds a {type(value).__name__}, not a dict.", where=where)
        return {str(key): _settle(item) for key, item in value.items()}
    except _RefusedError as error:
        raise DataError(
            f"The file asks for '{error}', which a CIFAR archive has no use for. It was refused and nothing was run.",
            where=where,
            advice="Do not trust this file; download the official archive.",
        ) from error
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise almost any kind
        raise DataError(
            f"The file is not a valid pickle: {type(error).__name__}: {error}.",
            where=where,
            advice="It may be truncated: download the archive again.",
        ) from error


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _StandIn:
    """A name that the pickle can find. It may call it and set its state, as of an instance; no more."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_StandIn):
    """`numpy.dtype(code, ...)` with the state (version, byte order, ...)."""

    def resolve(self) -> np.dtype[Any]:
        code, order = str(self.arguments[0]), str(self.state[1]) if self.state else "|"
        if not re.fullmatch(r"[iu][1248]", code) or order not in ("<", ">", "|", "="):
            raise _RefusedError(f"numpy.dtype {code}")
        return np.dtype(order + code)


class _Array(_StandIn):
    """`_reconstruct(ndarray, ...)` with the state (version, shape, dtype, fortran order, bytes)."""

    def resolve(self) -> NDArray[Any]:
        _, shape, dtype, fortran, raw = self.state
        return _array(raw, dtype, shape, "F" if fortran else "C")


class _Buffer(_StandIn):
    """`_frombuffer(bytes, dtype, shape, order)`."""

    def resolve(self) -> NDArray[Any]:
        raw, dtype, shape, order = self.arguments
        return _array(raw, dtype, shape, order)


class _Latin1(_StandIn):
    """`_codecs.encode(text, "latin1")`: how Python 3 writes bytes in an old protocol."""

    def resolve(self) -> bytes:
        text, encoding = self.arguments
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError(f"_codecs.encode to {encoding}")
        return str(text).encode("latin1")


ADMITTED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "ndarray"): _StandIn,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _settle(item: Any) -> Any:
    """`item` with stand-ins, at its top, replaced by what they stand for."""
    return item.resolve() if isinstance(item, _Array | _Buffer) else item


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if isinstance(raw, _Latin1):
        raw = raw.resolve()
    elif isinstance(raw, str):  # bytes written by Python 2
        raw = raw.encode("latin1")
    return np.frombuffer(raw, dtype.resolve()).reshape(shape, order=order)
