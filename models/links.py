"""Link predictors: is there an edge between two nodes? They take the features of `edgelist:FILE`."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional

from sparsepipe.errors import ModelError
from sparsepipe.models.mlp import MLP


class Scorer(MLP):
    """One hidden layer, and an output for each class but the first, whose logit is 0.

    Of two classes that is one output s, and the cross-entropy of the logits (0, s) is the binary one of sigmoid(s).
    """

    def __init__(self, inputs: int, classes: int, width: int) -> None:
        super().__init__(inputs, classes - 1, 1, width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of features [n, F]."""
        return functional.pad(super().forward(x), (1, 0))


class Encoder(nn.Module):
    """A graph convolution and a linear layer for each node, and a scorer of the product of both nodes' results.

    The graph itself is in the features: of each node they hold its own vector and those that were spread over one and
    more hops (`sparsepipe.data.embedding.propagated`), and a linear layer on these is a convolution over all the hops
    (TAGConv, arXiv 1710.10370). The product makes the score the same whichever node comes first.
    """

    def __init__(self, inputs: int, classes: int, width: int, hidden: int) -> None:
        super().__init__()
        self.convolution = nn.Linear(inputs // 2, width)
        self.project = nn.Linear(width, width)
        self.scorer = Scorer(width, classes, hidden)
        for layer in (self.convolution, self.project):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of the features of two nodes side by side, [n, 2 F]."""
        nodes = x.reshape(-1, 2, self.convolution.in_features)
        first, second = self.project(self.convolution(nodes).relu()).unbind(1)
        logits: Tensor = self.scorer(first * second)
        return logits


def link_mlp(*, input_shape: tuple[int, ...], classes: int, width: int = 128) -> Scorer:
    """A perceptron with one hidden layer that scores the features of a pair.

    Raises:
        ModelError: a layer without units.
    """
    _check_widths("link-mlp", width)
    return Scorer(prod(input_shape), classes, width)


def link_gnn(*, input_shape: tuple[int, ...], classes: int, width: int = 64, hidden: int = 128) -> Encoder:
    """A graph convolution that encodes nodes, `width` units, and a scorer of pairs, `hidden` units.

    Raises:
        ModelError: a layer without units, or samples that are not two nodes' features side by side.
    """
    _check_widths("link-gnn", width, hidden)
    inputs = prod(input_shape)
    if inputs % 2:
        raise ModelError(
            f"This network takes the features of two nodes side by side, but a sample has {inputs} values.",
            where="link-gnn",
            advice='Use a dataset edgelist:FILE with features = "ends".',
        )
    return Encoder(inputs, classes, width, hidden)


def _check_widths(name: str, *widths: int) -> None:
    if min(widths) < 1:
        raise ModelError(f"A layer of {min(widths)} units makes no network.", where=name, advice="Use 1 or more.")
