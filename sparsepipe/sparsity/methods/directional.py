"""Directional pruning by generalised regularised dual averaging, gRDA (arXiv 2006.09358), and its group form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.curvature import hessian_times, joined, lanczos, separated
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.modes import evaluating
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.proximal import group_soft_threshold, soft_threshold
from sparsepipe.sparsity.weights import Weight


class Directional(Emergent):
    """Plain SGD on a hidden copy of the weights, which are its soft thresholds.

        v <- v - lr g
        t <- t + c lr^(mu + 1/2) (n^mu - (n - 1)^mu)     c lr^(mu + 1/2) n^mu for a constant lr
        w  = sign(v) max(|v| - t, 0)

    v is not thresholded, so weights come back. It prunes in the flat directions around where SGD goes, without leaving
    its valley. The learning rate is the loop's, and one that suits SGD without momentum; the optimizer's momentum and
    weight decay act on other parameters alone. The sparsity cannot be set: it grows with `c` and `mu`.

    With `project` the flat directions are found explicitly instead: training is plain SGD, w = v, and `freeze` moves
    w by the perturbation d that shrinks it by the last t, but for the part of d along the eigenvectors V of the
    Hessian's largest eigenvalues (arXiv 2107.05328): w <- w + d - V V^T d. So that what d makes zero stays zero, the
    other weights K alone take the correction, the smallest one that leaves nothing along V:

        w_K <- w_K + d_K - V_K (V_K^T V_K)^+ V^T d

    Args:
        mu: in (0.5, 1) for the theory to hold.
        c: strength; tune it by a few epochs. 0 is plain SGD.
        project: number of eigenvectors; 0 for gRDA. For small networks: Lanczos' method needs a product with the
            Hessian of `batches` for each of up to 3 times as many vectors of the network's size, which it keeps.
        batches: training batches of which the Hessian is; in one's own loop, `Sparsifier(..., samples=...)` gives them.
        **shared: the options of `Emergent`.

    Raises:
        RecipeError: an option is out of range or of the wrong type. When the Sparsifier is made: it got no samples.
    """

    name = "directional"

    def __init__(self, *, mu: float = 0.51, c: float = 5e-3, project: int = 0, batches: int = 8, **shared: Any) -> None:
        super().__init__(**shared)
        self.mu = options.number("mu", mu, high=1)
        self.c = options.number("c", c)
        self.project = options.count("project", project) if project else 0
        self.batches = options.count("batches", batches)

    @property
    def samples_needed(self) -> int:
        return self.batches if self.project else 0

    def attach(self, network: Network) -> None:
        super().attach(network)
        if self.project and network.samples is None:
            raise RecipeError(
                f"The method '{self.name}' finds flat directions by the Hessian of some training batches.",
                where="samples",
                advice="Give them to the Sparsifier: samples=[(inputs, labels), ...], or set project = 0.",
            )
        weights = {name: network.weights[name].parameter for name in self.sparse_layers(network)}
        network.memory["hidden"] = {name: weight.detach().clone() for name, weight in weights.items()}
        network.memory["threshold"] = {f"{name} threshold": torch.zeros((), dtype=torch.float64) for name in weights}

    def owned(self, network: Network) -> Collection[str]:
        return self.sparse_layers(network)

    def after_step(self, network: Network, step: int) -> None:
        for name, hidden in network.memory["hidden"].items():
            if name in network.gradients:
                lr = network.lr(name)
                threshold = network.memory["threshold"][f"{name} threshold"]
                hidden.sub_(network.gradients[name], alpha=lr)
                threshold.add_(self.c * lr ** (self.mu + 0.5) * (step**self.mu - (step - 1) ** self.mu))
                moved = hidden if self.project else self.shrunk(network.weights[name], hidden, float(threshold))
                network.weights[name].parameter.copy_(moved)

    def finalize(self, network: Network) -> None:
        if self.project and network.memory["hidden"]:
            self._shrink_in_flat_directions(network)
        super().finalize(network)

    def shrunk(self, weight: Weight, hidden: Tensor, threshold: float) -> Tensor:
        """What belongs in a weight, of its hidden copy."""
        return soft_threshold(hidden, threshold)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **{key: getattr(self, key) for key in ("mu", "c", "project", "batches")}}

    def _shrink_in_flat_directions(self, network: Network) -> None:
        hidden, thresholds = network.memory["hidden"], network.memory["threshold"]
        weights = [network.weights[name].parameter for name in hidden]
        shrunk = [
            self.shrunk(network.weights[name], value, float(thresholds[f"{name} threshold"]))
            for name, value in hidden.items()
        ]
        before, target = joined(weights), joined(shrunk)
        steep = self._steepest(network, weights)
        kept = target != 0
        free = steep[:, kept]
        target[kept] -= free.T @ torch.linalg.pinv(free @ free.T) @ (steep @ (target - before))
        for weight, value in zip(weights, separated(target, weights), strict=True):
            weight.copy_(value)

    def _steepest(self, network: Network, weights: Sequence[Tensor]) -> Tensor:
        """The eigenvectors of the largest eigenvalues of the Hessian, float64 [project, n]."""
        samples = network.samples
        assert samples is not None

        def product(vector: Tensor) -> Tensor:
            found = hessian_times(samples.losses(), weights, separated(vector, weights))
            samples.average(found)
            return joined(found)

        start = [scores.random(value, network.seed, name, 0) - 0.5 for name, value in network.memory["hidden"].items()]
        with evaluating(samples.model), samples.scoring():
            _, vectors = lanczos(product, joined(start), max(3 * self.project, self.project + 10))
        return vectors[-self.project :]


class StructuredDirectional(Directional):
    """The same for whole output channels: w_g = v_g max(0, 1 - t sqrt(|g|) / ||v_g||), g the weights of one.

    The group form of gRDA, in the sense of structured directional pruning (arXiv 2107.05328), whose own solver it does
    not claim to be.

    Args:
        last_linear: `dense` by default, as the rows of the last layer are the classes.
        **shared: the options of `Directional`.
    """

    name = "structured-directional"

    def __init__(self, *, last_linear: str = "dense", **shared: Any) -> None:
        super().__init__(last_linear=last_linear, **shared)

    def shrunk(self, weight: Weight, hidden: Tensor, threshold: float) -> Tensor:
        rows = hidden.transpose(0, weight.output_axis)
        return group_soft_threshold(rows, threshold).transpose(0, weight.output_axis)
