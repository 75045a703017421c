"""A network in sparse training: its maskable weights, their masks and their optimizer state, changed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.target import Layer
from sparsepipe.sparsity.weights import Weight

# Integers of the same width as the floats: 0 * x is +0 for any bits, also those of NaN, infinity and negative numbers.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Network:
    """What a method works on. Methods keep no state of their own: all of it is here."""

    weights: dict[str, Weight]
    optimizer: Optimizer
    total_steps: int
    seed: int
    masks: MaskSet = field(init=False)
    layers: dict[str, Layer] = field(default_factory=dict)
    """The method's plan for each weight."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Dense gradients of the current step, where the method asked for them."""

    def __post_init__(self) -> None:
        self.masks = MaskSet.dense(self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: weight.parameter for name, weight in self.weights.items()}

    def start(self, masks: Mapping[str, Tensor]) -> None:
        """Begin sparse: `masks` are the first of these weights; state that an optimizer already has is cut to them."""
        self.masks.start(self.tensors, masks)
        for name, mask in masks.items():
            self._zero(name, weight=~mask, state=~mask)

    def change(self, name: str, mask: Tensor) -> None:
        """Give a weight another mask.

        What was dropped or grown gets weight zero, and zero in every state tensor of the weight's shape; everything
        else keeps both. State that all elements share, as the step count of Adam, goes on.
        """
        changed = self.masks[name] ^ mask
        self.masks.change(self.weights[name].parameter, name, mask)
        self._zero(name, weight=changed, state=changed)

    def mask_gradients(self) -> None:
        """Zero the gradients of inactive weights, so that no optimizer gathers state for them."""
        found = [(self.weights[name].parameter.grad, self.masks[name]) for name in self.masks.counters]
        _mask((gradient, mask) for gradient, mask in found if gradient is not None)

    def mask_weights(self) -> None:
        """Zero the inactive weights: exactly +0, whatever an optimizer did to them."""
        _mask((self.weights[name].parameter, self.masks[name]) for name in self.masks.counters)

    def _zero(self, name: str, *, weight: Tensor, state: Tensor) -> None:
        parameter = self.weights[name].parameter
        parameter.masked_fill_(weight, 0)
        if parameter in self.optimizer.state:
            for value in self.optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(state, 0)


def _mask(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply tensors by their masks in place, all at once; several times faster than in floating point."""
    listed = list(pairs)
    if listed:
        integers = [tensor.view(_INTEGERS[tensor.dtype.itemsize]) for tensor, _ in listed]
        torch._foreach_mul_(integers, [mask for _, mask in listed])
