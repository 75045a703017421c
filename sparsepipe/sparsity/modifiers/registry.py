"""Modifiers by name. Importing this module loads no modifier and no torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsepipe.errors import RecipeError

if TYPE_CHECKING:
    from sparsepipe.sparsity.attacks import InputSpace
    from sparsepipe.sparsity.modifiers.combined import Modifier


@dataclass(frozen=True)
class ModifierInfo:
    """What can be said of a modifier without loading it."""

    name: str
    home: str
    """`module:class`."""
    summary: str
    source: str


MODIFIERS: dict[str, ModifierInfo] = {
    info.name: info
    for info in (
        ModifierInfo(
            "adversarial",
            "sparsepipe.sparsity.modifiers.adversarial:Adversarial",
            "the end of the training on PGD inputs, with a slow start and a fast decay of the learning rate",
            "arXiv 2012.13628",
        ),
        ModifierInfo(
            "bort",
            "sparsepipe.sparsity.modifiers.bort:Bort",
            "branches behind one stem, trained one after another, of orthogonal features; the last one is served",
            "arXiv 2208.08083",
        ),
        ModifierInfo(
            "extrapolation",
            "sparsepipe.sparsity.modifiers.extrapolation:Extrapolation",
            "gradients at a point ahead of the weights, by the last gradient (past) or the present one (current)",
            "arXiv 2006.05720",
        ),
    )
}

_INPUTS = "inputs"


def create(name: str, options: Mapping[str, Any] | None = None, *, inputs: InputSpace | None = None) -> Modifier:
    """Make a modifier from its name and options.

    Args:
        name: one of `MODIFIERS`.
        options: its own.
        inputs: how the inputs of the network were made, for modifiers that need it.

    Raises:
        RecipeError: unknown name or option, or a value that is not allowed.
    """
    if name not in MODIFIERS:
        raise RecipeError(
            f"There is no modifier '{name}'.", where="modifiers", advice=f"Modifiers: {', '.join(MODIFIERS)}."
        )
    module, _, attribute = MODIFIERS[name].home.partition(":")
    made = getattr(import_module(module), attribute)
    taken = list(inspect.signature(made).parameters)
    own = [key for key in taken if key != _INPUTS]
    for key in options or {}:
        if key not in own:
            raise RecipeError(
                f"The modifier '{name}' takes no option '{key}'.",
                where="modifiers",
                advice=f"Its options: {', '.join(own)}.",
            )
    modifier: Modifier = made(**(options or {}), **({_INPUTS: inputs} if _INPUTS in taken else {}))
    return modifier
