"""Other values in the place of weights in forward passes; the parameters keep their names, values and state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.weights import Weight

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
    """While a module of `model` is called, it and what it contains hold transformed weights.

    Gradients of the parameters are those with respect to the transformed weights: what gathers, averages, unscales or
    clips gradients works as ever, and the chain rule is applied where they are complete, at the step. Who calls parts
    of the model by themselves, as a LightningModule calls its network or activation checkpointing calls it again in the
    backward pass, computes with the same weights. Each is transformed once in a call of what contains it.

    Args:
        model: without wrappers, and not compiled.
        weights: those to transform.
        transform: called without gradient tracking.

    Raises:
        ModelError: when somebody pickles the model: it holds other weights than it computes with.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Weight], transform: Transform) -> None:
        self._root, self._weights, self._transform = model, weights, transform
        names = {id(weight.parameter): name for name, weight in weights.items()}
        self._within = {
            module: [names[id(parameter)] for parameter in module.parameters() if id(parameter) in names]
            for module in model.modules()
        }
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in weights}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in names:
                    self._places[names[id(parameter)]].append((module, key))
        self._held: dict[str, list[tuple[Any, Any, nn.Parameter]]] = {}
        """Weights that are transformed now: table, key and parameter of each place."""
        self._calls: list[tuple[nn.Module, list[str]]] = []
        """Calls under way, and the weights that each has transformed."""
        self._hooks = [
            hook
            for module, inside in self._within.items()
            if inside
            for hook in (
                module.register_forward_pre_hook(self._swap),
                module.register_forward_hook(self._restore, always_call=True),
            )
        ]

    def remove(self) -> None:
        """Compute with the parameters again."""
        for hook in self._hooks:
            hook.remove()

    def __deepcopy__(self, memo: Any) -> ForwardWeights:
        return self  # a copy of the model has the same hooks, which leave its modules alone

    def __reduce__(self) -> Any:
        raise ModelError(
            "The model cannot be pickled now: until `freeze`, this method computes with other weights than it holds.",
            where="model",
            advice="Save the state_dict() of the model, the optimizer and the Sparsifier, or the model after freeze().",
        )

    def _swap(self, module: nn.Module, args: Any) -> None:
        if module not in self._within:
            return
        names = [name for name in self._within[module] if name not in self._held]
        self._calls.append((module, names))
        with torch.no_grad():
            values = {name: self._transform(name, self._weights[name].parameter, self._root.training) for name in names}
        replace: Callable[[Tensor, Tensor], Tensor] = _Replace.apply
        for name, value in values.items():
            parameter = self._weights[name].parameter
            value = replace(parameter, value)
            self._held[name] = []
            for owner, key in self._places[name]:
                for table, place in _tables(owner, key, parameter):
                    self._held[name].append((table, place, parameter))
                    table[place] = value

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._calls and self._calls[-1][0] is module:  # the hook before `_swap` may have failed
            for name in self._calls.pop()[1]:
                for table, place, parameter in self._held.pop(name, ()):
                    table[place] = parameter


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a compiled model, whose forward pass may pass over hooks and hold on to its parameters.

    Raises:
        ModelError: it is one.
    """
    if any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in model.modules()):
        raise ModelError(
            "The model is compiled, but this method changes the weights that forward passes compute with.",
            where="model",
            advice="Train it without torch.compile, or choose a method without learned gates or thresholds.",
        )


def _tables(owner: nn.Module, key: str, parameter: nn.Parameter) -> Iterator[tuple[Any, Any]]:
    """Where a module looks up one of its parameters."""
    yield owner._parameters, key
    if isinstance(owner, nn.RNNBase):  # these compute with a list of their own
        for place, each in enumerate(owner._flat_weights):
            if each is parameter:
                yield owner._flat_weights, place
