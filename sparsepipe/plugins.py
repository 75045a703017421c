"""User code named as `module:function`: the way to bring one's own model or dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sparsepipe.errors import SparsepipeError


def is_plugin(name: str) -> bool:
    """Whether `name` has the form `module:function` (dotted Python names on both sides)."""
    module, separator, function = name.partition(":")
    return bool(separator) and all(part.isidentifier() for part in [*module.split("."), function])


def load_plugin(name: str, error: type[SparsepipeError]) -> Callable[..., Any]:
    """Import `module:function`; modules in the current folder are found too.

    This runs the module's code: call it only with a name that the user gave, never with one read from an artefact.

    Args:
        name: `module:function`.
        error: the class of error to raise.

    Raises:
        SparsepipeError: of class `error`, if the module or the function cannot be found.
    """
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")
    try:
        module = import_module(module_name)
    except ImportError as problem:
        raise error(
            f"The module '{module_name}' cannot be imported: {problem}.",
            where=name,
            advice="Run the command from the folder that holds it, or install it.",
        ) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise error(f"The module '{module_name}' has no function '{function_name}'.", where=name)
    return function  # type: ignore[no-any-return]
