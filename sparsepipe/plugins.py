"""User code named as `module:function`: the way to bring one's own model or dataset."""

from __future__ import annotations

import sys
import traceback
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
        SparsepipeError: of class `error`, if the module or the function cannot be found, or the module's code fails.
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
    except SparsepipeError:
        raise
    except (Exception, SystemExit) as problem:  # the user's code may raise anything
        raise error(f"The module '{module_name}' failed with {failure(problem)}.", where=name) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise error(f"The module '{module_name}' has no function '{function_name}'.", where=name)
    return function  # type: ignore[no-any-return]


def failure(problem: BaseException) -> str:
    """What the user's own code raised, in one line: type, text, and the line of code that raised it."""
    text = " ".join(str(problem).split())
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(problem, SyntaxError):  # its text says where; the frames are those of the import
        place = ""
    return f"{type(problem).__name__}{f': {text}' if text else ''}{place}"
