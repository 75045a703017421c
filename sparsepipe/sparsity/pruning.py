"""Magnitude pruning of a network that starts dense."""

from __future__ import annotations

from sparsepipe.sparsity import scores
from sparsepipe.sparsity.method import TargetMethod
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer


class MagnitudePruning(TargetMethod):
    """A method that removes the active weights of lowest magnitude, layer by layer, and never brings one back."""

    def attach(self, network: Network) -> None:
        network.plan(self.target)
        self.kept(network)  # a target out of reach is an error here, not in the middle of training

    def prune(self, network: Network, progress: float = 1.0) -> None:
        """Prune to where the masks belong at `progress` between dense (0) and the target (1)."""
        for name, kept in self.kept(network, progress).items():
            layer = network.layers[name]
            if kept < layer.groups:
                prune_layer(network, layer, kept)
            elif progress == 1:
                self.note_full(network, name)
        network.masks.count()


def cut_to_target(method: TargetMethod, network: Network) -> None:
    """Prune by magnitude what is left above the target, where there is any.

    The step of the last pruning never came if a `GradScaler` skipped one and the schedule goes on to the very end.
    """
    kept = method.kept(network)
    if network.masks.nnz > sum(groups * network.layers[name].unit for name, groups in kept.items()):
        for name in network.masks:
            if kept[name] < network.layers[name].groups:
                prune_layer(network, network.layers[name], kept[name])
        network.masks.count()


def prune_layer(network: Network, layer: Layer, kept: int) -> None:
    """Keep the `kept` active groups of highest magnitude in each row of a layer."""
    active = layer.pattern.rows(network.masks[layer.name])
    score = layer.pattern.scores(scores.magnitude(network.weights[layer.name].parameter))
    counts = active.sum(dim=1).clamp(max=kept)
    network.change(layer.name, layer.pattern.unfold(top_k(score, counts, active), layer.shape))
