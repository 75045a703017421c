"""A multi-layer perceptron for features or small images."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor, nn

from sparsepipe.errors import ModelError


class MLP(nn.Module):
    """`hidden` layers of `width` units with ReLU, then a linear head; images are flattened first."""

    def __init__(self, inputs: int, classes: int, hidden: int, width: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * hidden]
        layers = [nn.Linear(before, after) for before, after in pairwise(sizes)]
        self.hidden = nn.ModuleList(layers)
        self.head = nn.Linear(sizes[-1], classes)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of x, [n, F] or [n, C, H, W]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        logits: Tensor = self.head(x)
        return logits


def mlp(*, input_shape: tuple[int, ...], classes: int, hidden: int = 2, width: int = 256) -> MLP:
    """A perceptron with `hidden` hidden layers of `width` units.

    Raises:
        ModelError: a negative number of layers, or layers without units.
    """
    if hidden < 0 or width < 1:
        raise ModelError(
            f"hidden = {hidden} and width = {width} make no network.",
            where="mlp",
            advice="Use hidden >= 0, width >= 1.",
        )
    return MLP(prod(input_shape), classes, hidden, width)
