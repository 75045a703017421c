"""Other values in the place of weights in forward passes; the parameters keep their names, values and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.weights import Weight, unwrapped

Transform = Callable[[str, Tensor, bool], Tensor]
"""(name, weight, whether the model is in training mode) -> the tensor to compute with."""


class _Replace(torch.autograd.Function):
    """Forward: the value. Backward: its gradient, handed to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ForwardWeights:
    """While `model` is called, its modules hold transformed weights.

    Gradients of the parameters are those with respect to the transformed weights: what gathers, averages, unscales or
    clips gradients works as ever, and the chain rule is applied where they are complete, at the step. The weights are
    transformed once in each call of the whole model, so parts of it that are called by themselves, as activation
    checkpointing does in the backward pass, compute with the parameters as they are.

    Args:
        model: as the user trains it.
        weights: those to transform.
        transform: called without gradient tracking.

    Raises:
        ModelError: the model is compiled.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Weight], transform: Transform) -> None:
        root = unwrapped(model)
        modules = [*model.modules()]
        if any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in modules):
            raise ModelError(
                "The model is compiled, but this method changes the weights that forward passes compute with.",
                where="model",
                advice="Train it without torch.compile, or choose a method without learned gates or thresholds.",
            )
        names = {id(weight.parameter): name for name, weight in weights.items()}
        places = [
            (module, key, names[id(parameter)])
            for module in root.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        recurrent = [module for module in root.modules() if isinstance(module, nn.RNNBase)]
        swapped: list[tuple[Any, str, Any]] = []

        # Plain functions, because a copy of the model shares them, and they leave copies alone.
        def swap(module: nn.Module, args: Any) -> None:
            if module is not root or swapped:
                return
            with torch.no_grad():
                values = {name: transform(name, weight.parameter, root.training) for name, weight in weights.items()}
            replace: Callable[[Tensor, Tensor], Tensor] = _Replace.apply
            values = {name: replace(weights[name].parameter, value) for name, value in values.items()}
            for owner, key, name in places:
                table: dict[str, Any] = owner._parameters
                swapped.append((table, key, table[key]))
                table[key] = values[name]
            for owner in recurrent:  # these compute with a list of their own
                swapped.append((owner.__dict__, "_flat_weights", owner._flat_weights))
                own = [each if each is None else names.get(id(each)) for each in owner._flat_weights]
                pairs = zip(own, owner._flat_weights, strict=True)
                owner.__dict__["_flat_weights"] = [each if name is None else values[name] for name, each in pairs]

        def restore(module: nn.Module, args: Any, output: Any) -> None:
            if module is root:
                for table, key, value in swapped:
                    table[key] = value
                swapped.clear()

        self._hooks = [
            root.register_forward_pre_hook(swap),
            root.register_forward_hook(restore, always_call=True),
        ]

    def remove(self) -> None:
        """Compute with the parameters again."""
        for hook in self._hooks:
            hook.remove()
