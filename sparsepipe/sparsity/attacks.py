"""Adversarial inputs by projected gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.sparsity.modes import evaluating


@dataclass(frozen=True)
class InputSpace:
    """How the inputs of a network were made: `(value - mean) / std` of values in [low, high].

    `mean` and `std` have one number for each channel (dimension 1), or one for all. Attacks count in values.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    low: float = -math.inf
    high: float = math.inf

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest input, of a shape that broadcasts with the batch `like`."""
        mean, std = self._broadcast(self.mean, like), self.unit(like)
        return (self.low - mean) / std, (self.high - mean) / std

    def unit(self, like: Tensor) -> Tensor:
        """What one unit of a value divides by to be an input, broadcast like `bounds`."""
        return self._broadcast(self.std, like)

    @staticmethod
    def _broadcast(numbers: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, -1, *[1] * (like.ndim - 2))


def pgd(
    model: nn.Module | Sequence[nn.Module],
    inputs: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    space: InputSpace,
    random_start: bool = True,
) -> Tensor:
    """Inputs within `epsilon` (l-infinity) of these for which the loss is high (arXiv 1706.06083).

    `x <- clip(x + step_size * sign(d CE(model(x), y) / dx))`, clipped to the ball and to the range of inputs. A model
    is in evaluation mode meanwhile, so that batch statistics do not move. No parameter's `.grad` is touched. The random
    start draws from torch's global generator of the inputs' device.

    Args:
        model: gives logits [n, classes]. Several are attacked together, by the sum of their losses.
        inputs: [n, ...], floating point.
        labels: [n], int64.
        epsilon: radius, in values of `space`.
        step_size: of each step, in the same.
        steps: gradient steps.
        space: from values to inputs.
        random_start: begin at a uniformly random point of the ball instead of at its centre.
    """
    unit = space.unit(inputs)
    low, high = space.bounds(inputs)
    radius, stride = epsilon / unit, step_size / unit
    least, most = torch.maximum(inputs - radius, low), torch.minimum(inputs + radius, high)
    models = [model] if isinstance(model, nn.Module) else list(model)
    found = inputs.detach()
    if random_start:
        found = found + (2 * torch.rand_like(found) - 1) * radius
    with ExitStack() as stack, torch.enable_grad():
        for each in models:
            stack.enter_context(evaluating(each))
        for _ in range(steps):
            found = torch.minimum(torch.maximum(found, least), most).detach().requires_grad_()
            # The sum, so that the size of a sample's gradient does not depend on the others.
            losses = [cross_entropy(each(found), labels, reduction="sum") for each in models]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), [found])
            found = found.detach() + stride * gradient.sign()
    return torch.minimum(torch.maximum(found, least), most).detach()
