"""What a sparse-training method is: a few hooks around the optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pattern import Pattern
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer, Target


class Method:
    """A method of sparse training. It holds options only; what changes is in the `Network` that each hook is given.

    `Sparsifier` calls the hooks without gradient tracking, but for the two losses. Steps count from 1. Every hook but
    `transform_batch`, `batch_loss`, `on_epoch_end` and `epochs_multiplier` works in any loop; these need one that asks.

    Within a step the order is: forward passes with `transform_weight`; at the optimizer's step the chain rule through
    it and the gradient of `extra_loss`; gradients kept for `needs_gradients` and `owned`; the optimizer; the optimizer
    of the method's own variables; inactive weights to zero; `after_step`.
    """

    name: ClassVar[str]
    """As in the registry."""

    local_memory: ClassVar[tuple[str, ...]] = ()
    """Kinds of `network.memory` that are not the same on all processes of a distributed training."""

    epochs_multiplier: float = 1.0
    """How many times longer than the recipe says to train."""

    @property
    def samples_needed(self) -> int:
        """Training batches that `attach` and `finalize` find in `network.samples`."""
        return 0

    @property
    def dense_gradient_every(self) -> int | None:
        """Steps without the dense gradient between two that need it, for FLOPs: 0 if all do, None if none does."""
        return None

    def attach(self, network: Network) -> None:
        """Give the network its layers and first masks."""

    def needs_gradients(self, network: Network, step: int) -> bool:
        """Whether `network.gradients` must hold the dense gradients of `step` in `after_step`."""
        return False

    def needs_local_gradients(self, network: Network) -> bool:
        """Whether `network.local_gradients` must hold what this process alone found; asked once, after `attach`."""
        return False

    def transforms(self, network: Network) -> Collection[str]:
        """Names of the weights that go through `transform_weight` in forward passes; asked once, after `attach`."""
        return ()

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        """The tensor that forward passes of `step` compute with in the place of `weight`, of the same shape.

        It has to be differentiable in `weight` and `network.variables`, and to give the same in every call of one
        step: noise is a function of `network.seed`, the name and the step.
        """
        raise NotImplementedError

    def computed(self, network: Network) -> Mapping[str, Tensor]:
        """Masks of what forward passes compute with, where that is less than `network.masks` keep."""
        return {}

    def extra_loss(self, network: Network, step: int) -> Tensor | None:
        """A loss of weights and variables alone, whose gradient joins that of the batch at the step.

        It is not in the loss that the loop sees and logs.
        """
        return None

    def owned(self, network: Network) -> Collection[str]:
        """Weights that the method itself moves, in `after_step`, by `network.gradients`; the optimizer passes over."""
        return ()

    def lr_scale(self, network: Network, step: int) -> float | None:
        """The learning rate of `step` as a multiple of the optimizer's first one; None leaves what the loop set."""
        return None

    def transform_batch(
        self, network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The batch of `step` to train on in the place of this one; for loops that ask `Sparsifier.transform_batch`."""
        return inputs, labels

    def observed(self, network: Network) -> Collection[str]:
        """Names of the modules whose outputs `batch_loss` is given; asked once, after `attach`."""
        return ()

    def batch_loss(self, network: Network, inputs: Tensor, outputs: Mapping[str, Tensor], step: int) -> Tensor | None:
        """A loss of a batch that joins that of the loop; for loops that ask `Sparsifier.batch_loss`.

        Args:
            network: what is trained.
            inputs: of the forward pass that was just made.
            outputs: of the `observed` modules in that pass.
            step: the step to come.
        """
        return None

    def before_step(self, network: Network, step: int) -> None:
        """Called before optimizer step `step`, with `.grad` as the optimizer will see it; again for each closure.

        What `.grad` holds after the step is the optimizer's matter: some add momentum to it or unscale it in place.
        """

    def after_step(self, network: Network, step: int) -> None:
        """Called after optimizer step `step`, with inactive weights at zero."""

    def on_epoch_end(self, network: Network, epoch: int) -> None:
        """Called at the end of each epoch by loops that have epochs."""

    def finalize(self, network: Network) -> None:
        """Called once when training is over, before the masks are handed out."""

    def masks_final(self, network: Network, step: int) -> bool:
        """Whether after `step` the masks will not change any more and the target sparsity is reached."""
        return True

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        """Figures worth logging that only this method knows; they replace those of the masks of the same name."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The method's options, JSON-able: a checkpoint made with others is refused."""
        return {"method": self.name}


class TargetMethod(Method):
    """A method that aims at a target: sparsity, distribution, pattern and overrides.

    Args:
        sparsity: fraction of zeros over all maskable weights that no override settles.
        distribution: uniform, er, erk or global; or a table from globs to relative densities, the first match wins,
            which are multiplied by one number such that `sparsity` holds: `{"stem": 2, "*": 1}`.
        pattern: unstructured, RxC, N:M, channel or constant-fan-in.
        overrides: tables of `layers` (a glob) with `sparsity`, `pattern` or `dense`; the first match wins.
        first_conv: `dense`, `sparse`, or `auto`: dense with `uniform` alone, as in RigL's experiments.
        last_linear: `dense` or `sparse`. Neither policy holds where an override sets a sparsity.

    Raises:
        RecipeError: an option is out of range or of the wrong type, or contradicts another.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.9,
        distribution: str | Mapping[str, float] = "erk",
        pattern: str | Pattern = "unstructured",
        overrides: Iterable[Mapping[str, Any]] = (),
        first_conv: str = "auto",
        last_linear: str = "sparse",
    ) -> None:
        self.target = Target.of(sparsity, distribution, pattern, overrides, first_conv, last_linear)

    def kept(self, network: Network, progress: float = 1.0) -> dict[str, int]:
        """Groups to keep in each row of each layer now, from the weights as they are now."""
        magnitudes = {}
        if self.target.distribution == "global":
            # Inactive weights score below every active one, so that they never take a place.
            magnitudes = {
                name: torch.where(mask, scores.magnitude(network.weights[name].parameter), -1.0)
                for name, mask in network.masks.items()
            }
        return self.target.kept(network.layers, magnitudes, progress)

    def stays_full(self, network: Network, name: str, kept: int) -> bool:
        """Whether a layer that keeps so many groups in each row needs no mask; the reason is noted.

        Under `global` a layer that is full now may not be so at another choice.
        """
        layer = network.layers[name]
        if kept < layer.groups or (self.target.distribution == "global" and not layer.dense_because):
            return False
        self.note_full(network, name)
        return True

    def note_full(self, network: Network, name: str) -> None:
        """Note that the distribution is why a layer is dense, unless there is another reason."""
        network.masks.reasons.setdefault(name, f"{self.target.distribution} keeps it dense")

    def describe(self) -> dict[str, Any]:
        target = self.target
        overrides = [[entry.layers, entry.sparsity, str(entry.pattern), entry.dense] for entry in target.overrides]
        return {
            **super().describe(),
            "sparsity": target.sparsity,
            "distribution": dict(target.relative_densities) or target.distribution,
            "pattern": str(target.pattern),
            "overrides": overrides,
            "first_conv": target.first_conv,
            "last_linear": target.last_linear,
        }


class SparseFromStart(TargetMethod):
    """A method whose network is sparse from the first step on, with random masks of exact counts.

    Args:
        sparse_init: multiply the first weights of each sparse layer by density^-1/2. Initialisations for the dense
            fan-in make the outputs of a sparse layer too small by that factor (arXiv 2010.03533); networks without
            normalisation feel it. Not for pretrained weights.
        **shared: the options of `TargetMethod`.
    """

    def __init__(self, *, sparse_init: bool = False, **shared: Any) -> None:
        super().__init__(**shared)
        self.sparse_init = options.flag("sparse_init", sparse_init)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "sparse_init": self.sparse_init}

    def first_counts(self, network: Network) -> dict[str, int]:
        """Groups that each row of each layer starts with: the target's, but in methods that shrink."""
        return self.kept(network)

    def attach(self, network: Network) -> None:
        network.plan(self.target)
        masks, first = {}, self.first_counts(network)
        for name, kept in self.kept(network).items():
            if not self.stays_full(network, name, kept):
                masks[name] = _random_mask(network, network.layers[name], first[name])
        network.start(masks)
        if self.sparse_init:
            for name in masks:
                network.weights[name].parameter.mul_((network.masks.nnz_of(name) / network.masks[name].numel()) ** -0.5)


def _random_mask(network: Network, layer: Layer, kept: int) -> torch.Tensor:
    device = network.weights[layer.name].parameter.device
    rows = torch.empty(layer.rows, layer.groups, device=device)
    score = scores.random(rows, network.seed, layer.name, 0)
    counts = torch.full((layer.rows,), kept, device=device)
    return layer.pattern.unfold(top_k(score, counts, torch.ones_like(rows, dtype=torch.bool)), layer.shape)
