"""Train a network sparse from scratch, freeze it, and deploy it as ONNX.

The names below load on first use, so that importing `sparsepipe` needs no torch and takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Sparsifier": "sparsepipe.sparsity.sparsifier",
    "MaskSet": "sparsepipe.sparsity.masks",
    "Unstructured": "sparsepipe.sparsity.pattern",
    "Block": "sparsepipe.sparsity.pattern",
    "NM": "sparsepipe.sparsity.pattern",
    "ConstantFanIn": "sparsepipe.sparsity.pattern",
    "Channel": "sparsepipe.sparsity.pattern",
    "DSTEE": "sparsepipe.sparsity.methods.dst_ee",
    "RigL": "sparsepipe.sparsity.methods.rigl",
    "SET": "sparsepipe.sparsity.methods.set",
    "SNFS": "sparsepipe.sparsity.methods.snfs",
    "DSR": "sparsepipe.sparsity.methods.dsr",
    "MEST": "sparsepipe.sparsity.methods.mest",
    "RigLITOP": "sparsepipe.sparsity.methods.rigl_itop",
    "SETITOP": "sparsepipe.sparsity.methods.set_itop",
    "DeepR": "sparsepipe.sparsity.methods.deepr",
    "SRigL": "sparsepipe.sparsity.methods.srigl",
    "TopKAST": "sparsepipe.sparsity.methods.top_kast",
    "SNIP": "sparsepipe.sparsity.methods.snip",
    "GraSP": "sparsepipe.sparsity.methods.grasp",
    "SynFlow": "sparsepipe.sparsity.methods.synflow",
    "GraNet": "sparsepipe.sparsity.methods.granet",
    "Random": "sparsepipe.sparsity.methods.random",
    "ERKStatic": "sparsepipe.sparsity.methods.erk_static",
    "Static": "sparsepipe.sparsity.methods.static",
    "GMP": "sparsepipe.sparsity.methods.gmp",
    "MagnitudeOneShot": "sparsepipe.sparsity.methods.magnitude_oneshot",
    "Lottery": "sparsepipe.sparsity.methods.lottery",
    "ACDC": "sparsepipe.sparsity.methods.acdc",
    "GaP": "sparsepipe.sparsity.methods.gap",
    "AutoSparse": "sparsepipe.sparsity.methods.autosparse",
    "AutoSparseTopK": "sparsepipe.sparsity.methods.autosparse",
    "STR": "sparsepipe.sparsity.methods.autosparse",
    "L0Constrained": "sparsepipe.sparsity.methods.l0_constrained",
    "XRDA": "sparsepipe.sparsity.methods.xrda",
    "Directional": "sparsepipe.sparsity.methods.directional",
    "StructuredDirectional": "sparsepipe.sparsity.methods.directional",
    "Dense": "sparsepipe.sparsity.methods.dense",
    "export_onnx": "sparsepipe.stages.export",
    "SparsepipeError": "sparsepipe.errors",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("sparsepipe")
    if name not in _HOME:
        raise AttributeError(f"module 'sparsepipe' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
