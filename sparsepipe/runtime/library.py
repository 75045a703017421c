"""Where the library of native kernels is, and whether this onnxruntime takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sparsepipe

FILE_NAMES = {"darwin": "libsparsepipe_ops.dylib", "win32": "sparsepipe_ops.dll"}
DEFAULT_FILE_NAME = "libsparsepipe_ops.so"


def library_path() -> str | None:
    """The kernel library inside the installed package; None when it was not built.

    It is a string because `onnxruntime.SessionOptions.register_custom_ops_library` takes nothing else.
    """
    name = FILE_NAMES.get(sys.platform, DEFAULT_FILE_NAME)
    # An editable installation may spread the package over two folders: the sources and what was built.
    return next((str(path) for root in sparsepipe.__path__ if (path := Path(root) / "native" / name).is_file()), None)


def status() -> dict[str, Any]:
    """Whether the kernel library can be used here.

    Returns:
        `path` (None when it was not built), `loadable`, `reason` (None when it loads) and the `onnxruntime` version.
    """
    try:
        import onnxruntime
    except ImportError as error:
        missing = f"onnxruntime cannot be imported: {error}"
        return {"path": None, "loadable": False, "reason": missing, "onnxruntime": None}
    path = library_path()
    reason = _why_not(path)
    return {
        "path": path,
        "loadable": reason is None,
        "reason": reason,
        "onnxruntime": onnxruntime.__version__,
    }


def _why_not(path: str | None) -> str | None:
    if path is None:
        return "it was not built; exported files run on the standard kernels of onnxruntime"
    import onnxruntime

    try:
        onnxruntime.SessionOptions().register_custom_ops_library(path)
    except Exception as error:  # onnxruntime's errors have no common base class
        return " ".join(str(error).split())
    return None
