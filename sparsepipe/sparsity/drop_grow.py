"""DropGrow: the family of methods that now and then drop some active weights and grow as many inactive ones."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.method import SparseFromStart
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pattern import Pattern
from sparsepipe.sparsity.schedule import DROP_SCHEDULES, Schedule, UpdateSchedule
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer

log = logging.getLogger("sparsepipe")


class DropGrow(SparseFromStart):
    """Every `update_every` steps: drop the active weights of lowest magnitude, grow as many by `grow_score`.

    An update follows the optimizer step and uses the gradient of that same step. Each layer keeps its number of
    active weights exactly. What was just dropped may grow again at once; it then keeps its value and state.

    Args:
        update_every: optimizer steps between two updates.
        drop_fraction: share of the active weights dropped in an update: the first value of `drop_schedule`, or a
            callable of the step.
        drop_schedule: cosine or linear (to 0 at the stop), or constant.
        stop_at: fraction of all steps from which on the masks stay as they are.
        exclude_just_dropped: grow what was just dropped only where nothing else is left.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    grows_by_gradient: ClassVar[bool] = True
    """Whether `grow_score` reads the dense gradient."""

    def __init__(
        self,
        *,
        sparsity: float = 0.9,
        distribution: str = "erk",
        pattern: str | Pattern = "unstructured",
        update_every: int = 100,
        drop_fraction: float | Schedule = 0.3,
        drop_schedule: str = "cosine",
        stop_at: float = 0.75,
        exclude_just_dropped: bool = False,
        overrides: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(sparsity=sparsity, distribution=distribution, pattern=pattern, overrides=overrides)
        self.update_every = options.count("update_every", update_every)
        self.drop_fraction = drop_fraction
        if not callable(drop_fraction):
            self.drop_fraction = options.number("drop_fraction", drop_fraction, high=1)
        self.drop_schedule = options.choice("drop_schedule", drop_schedule, DROP_SCHEDULES)
        self.stop_at = options.number("stop_at", stop_at, high=1)
        self.exclude_just_dropped = options.flag("exclude_just_dropped", exclude_just_dropped)

    @abstractmethod
    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        """Elementwise scores of the weight `name`; the inactive weights of highest score grow."""

    def drop_score(self, network: Network, name: str) -> Tensor:
        """Elementwise scores of the weight `name`; the active weights of lowest score are dropped."""
        return scores.magnitude(network.weights[name].parameter)

    @property
    def dense_gradient_every(self) -> int | None:
        return self.update_every if self.grows_by_gradient else None

    def attach(self, network: Network) -> None:
        super().attach(network)
        if not self._updates(network).last:
            log.warning(
                "%s never updates the masks: update_every is %d, but updates stop at step %d of %d.",
                self.name,
                self.update_every,
                self._updates(network).stop,
                network.total_steps,
            )

    def needs_gradients(self, network: Network, step: int) -> bool:
        return self.grows_by_gradient and self._updates(network).due(step)

    def after_step(self, network: Network, step: int) -> None:
        if not self._updates(network).due(step):
            return
        fraction = options.number("drop_fraction", self._drop_fraction(network)(step), high=1)
        for name in network.masks.counters:
            if not self.grows_by_gradient or name in network.gradients:
                self._update(network, network.layers[name], fraction, step)
        network.masks.count()

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._updates(network).last

    def metrics(self, network: Network, step: int) -> dict[str, float]:
        active = step < self._updates(network).stop
        return {"drop_fraction": self._drop_fraction(network)(step) if active else 0.0}

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "update_every": self.update_every,
            "drop_fraction": "callable" if callable(self.drop_fraction) else self.drop_fraction,
            "drop_schedule": self.drop_schedule,
            "stop_at": self.stop_at,
            "exclude_just_dropped": self.exclude_just_dropped,
        }

    def _updates(self, network: Network) -> UpdateSchedule:
        return UpdateSchedule(self.update_every, 1, int(self.stop_at * network.total_steps))

    def _drop_fraction(self, network: Network) -> Schedule:
        if callable(self.drop_fraction):
            return self.drop_fraction
        return DROP_SCHEDULES[self.drop_schedule](self.drop_fraction, self._updates(network).stop)

    def _update(self, network: Network, layer: Layer, fraction: float, step: int) -> None:
        active = layer.pattern.rows(network.masks[layer.name])
        kept = active & ~self._dropped(network, layer, active, fraction)
        missing = active.sum(dim=1) - kept.sum(dim=1)
        if not missing.any():
            return
        score = layer.pattern.scores(self.grow_score(network, layer.name, step))
        candidates = ~active if self.exclude_just_dropped else ~kept
        at_once = torch.minimum(missing, candidates.sum(dim=1))
        grown = top_k(score, at_once, candidates)
        if (at_once < missing).any():
            grown |= top_k(score, missing - at_once, active & ~kept)
        network.change(layer.name, layer.pattern.unfold(kept | grown, layer.shape))

    def _dropped(self, network: Network, layer: Layer, active: Tensor, fraction: float) -> Tensor:
        """The lowest share `fraction`, rounded down, of the layer's active groups, in whichever rows they are."""
        number = torch.tensor([int(int(active.sum()) * fraction)], device=active.device)
        score = layer.pattern.scores(self.drop_score(network, layer.name)).neg().reshape(1, -1)
        return top_k(score, number, active.reshape(1, -1)).reshape(active.shape)
