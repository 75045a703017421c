"""What modules inside a model put out, without a change to the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from sparsepipe.errors import ModelError


class Observer:
    """Keeps the outputs of some modules of a model in its last forward pass, with their graphs.

    Args:
        model: whose submodules are named.
        names: of modules, as in `model.named_modules()`.

    Raises:
        ModelError: there is no such module. In a forward pass: its output is no tensor.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                raise ModelError(
                    f"The model has no part '{name}'.",
                    where="model",
                    advice=f"Parts: {', '.join(filter(None, modules))}.",
                )
        self._hooks = [modules[name].register_forward_hook(self._keep(name, modules[name])) for name in names]

    def _keep(self, name: str, watched: nn.Module) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if module is not watched:  # a copy of the model has the same hooks
                return
            if not isinstance(output, Tensor):
                raise ModelError(f"'{name}' gives a {type(output).__name__}, not one tensor.", where="model")
            self.outputs[name] = output

        return keep

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
