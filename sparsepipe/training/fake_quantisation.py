"""Quantisation-aware training: passes through the network round as its int8 form will.

Weights are rounded to int8, symmetric for each output channel, with the scale max |w| / 127. Folding a batch
normalisation multiplies a channel by a number, and its scale by the same, so that rounding before or after the folding
gives the same bytes. Activations are rounded to uint8 with a zero point, by one range for each tensor, which follows
the extremes of the batches. Gradients pass straight through roundings, and not where a value was clipped (Jacob et al.,
arXiv 1712.05877, section 3). Biases, which become int32, are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_LIMIT, ACTIVATION_LIMIT = 127, 255
FOLLOW = 0.01
"""Weight of a new batch in the range of a tensor, as of torch's MovingAverageMinMaxObserver."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BUFFER = "_activation_ranges"


@dataclass(frozen=True)
class Points:
    """Where to round.

    Attributes:
        inputs: path of a layer -> name of the tensor that goes into it. Its weight is rounded, too.
        outputs: call of a module -> name of the tensor that it gives: its path, with `@n` behind it from its second
            call in one pass on; the network itself has the path "".
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


class FakeQuantisation:
    """Rounds in the passes through a network while it is `active`.

    Args:
        network: on its device. Its parameters keep their values; a buffer that is not in its state dict is added, so
            that the processes of a distributed training share the ranges as they share batch statistics.
        points: where.
        start: the optimizer step after which it is active in training.
    """

    def __init__(self, network: nn.Module, points: Points, start: int) -> None:
        self.start = start
        self.active = False
        self._names = sorted({*points.inputs.values(), *points.outputs.values()})
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._network = network
        device = next(network.parameters()).device
        network.register_buffer(BUFFER, torch.full((len(self._names), 2), torch.nan, device=device), persistent=False)
        self._calls: dict[str, int] = {}
        network.register_forward_pre_hook(self._new_pass)
        modules = dict(network.named_modules())
        given = set(points.outputs.values())
        for path, tensor in points.inputs.items():
            # What the module before it gives is rounded there already.
            self._round_layer(modules[path], None if tensor in given else tensor)
        for path in {call.partition("@")[0] for call in points.outputs}:
            self._round_output(modules[path], path, points.outputs)

    @property
    def observed(self) -> Tensor:
        """Smallest and largest value [tensors, 2]; NaN of what no pass in training has met."""
        found = getattr(self._network, BUFFER)
        assert isinstance(found, Tensor)
        return found

    @observed.setter
    def observed(self, values: Tensor) -> None:
        self.observed.copy_(values)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tensor -> smallest and largest value, of all that were met."""
        rows = zip(self._names, self.observed.tolist(), strict=True)
        return {name: (low, high) for name, (low, high) in rows if low <= high}

    def _new_pass(self, module: nn.Module, args: Any) -> None:
        self._calls.clear()

    def _round_layer(self, layer: nn.Module, tensor: str | None) -> None:
        swapped: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.active:
                return None
            table: dict[str, Any] = module._parameters
            swapped.append(table["weight"])
            table["weight"] = rounded_weight(table["weight"])
            if tensor is None or not args:
                return None
            return (self._rounded(tensor, args[0], module.training), *args[1:])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if swapped:
                table: dict[str, Any] = module._parameters
                table["weight"] = swapped.pop()

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, always_call=True)

    def _round_output(self, module: nn.Module, path: str, outputs: Mapping[str, str]) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            number = self._calls.get(path, 0)
            self._calls[path] = number + 1
            tensor = outputs.get(f"{path}@{number}" if number else path)
            if not self.active or tensor is None or not isinstance(output, Tensor):
                return None
            return self._rounded(tensor, output, module.training)

        module.register_forward_hook(after)

    def _rounded(self, tensor: str, values: Tensor, training: bool) -> Tensor:
        limits = self.observed[self._rows[tensor]]
        if training:
            with torch.no_grad():
                new = torch.stack(torch.aminmax(values.detach())).float()
                limits.copy_(torch.where(limits.isnan(), new, limits.lerp(new, FOLLOW)))
        elif bool(limits.isnan().any()):  # of what training has not met nothing is known
            return values
        return rounded_activation(values, limits)


def rounded_weight(weight: Tensor) -> Tensor:
    """`weight` [outputs, ...] in the nearest multiples of max |w| / 127 of its output channel; zeros stay zero."""
    with torch.no_grad():
        largest = weight.detach().abs().flatten(1).amax(1)
        scale = torch.where(largest > 0, largest / WEIGHT_LIMIT, 1.0)
        zero_points = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_points, 0, -WEIGHT_LIMIT, WEIGHT_LIMIT)


def rounded_activation(values: Tensor, limits: Tensor) -> Tensor:
    """`values` in 256 steps over a range, which is widened to hold 0, and clipped to it.

    Args:
        values: any shape.
        limits: smallest and largest value [2].
    """
    with torch.no_grad():
        low, high = limits[0].clamp(max=0), limits[1].clamp(min=0)
        scale = (high - low) / ACTIVATION_LIMIT
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = (-low / scale).round().clamp(0, ACTIVATION_LIMIT).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, ACTIVATION_LIMIT)


def calls_of(names: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Of the names of tensors, those that are results of modules, as `Points.outputs` has them."""
    known = set(paths)
    return {name: name for name in names if name.partition("@")[0] in known}
