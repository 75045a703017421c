"""DropGrow: the family of methods that now and then drop some active weights and grow as many inactive ones."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.distribution import allocate
from sparsepipe.sparsity.method import SparseFromStart
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.redistribution import REDISTRIBUTIONS, Turnover
from sparsepipe.sparsity.schedule import DROP_SCHEDULES, Schedule, UpdateSchedule
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer

log = logging.getLogger("sparsepipe")


class DropGrow(SparseFromStart):
    """Every `update_every` steps: drop the active weights of lowest magnitude, grow as many by `grow_score`.

    An update follows the optimizer step and uses the gradient of that same step. What was just dropped may grow again
    at once; it then keeps its value and state. Each layer keeps its number of active weights exactly, or, with
    `redistribution`, all that trade keep their total exactly and each keeps at least one group. Layers trade whose
    density the distribution decides, whose groups hold equally many weights, and whose pattern does not fix the
    number in each row (N:M and constant fan-in do).

    Args:
        update_every: optimizer steps between two updates.
        drop_fraction: share of the active weights dropped in an update: the first value of `drop_schedule`, or a
            callable of the step.
        drop_schedule: cosine or linear (to 0 at the stop), cosine-floor (to 0.005), halved (after three quarters of
            the way), or constant.
        stop_at: fraction of all steps from which on the masks stay as they are.
        exclude_just_dropped: grow what was just dropped only where nothing else is left.
        drop_scope: `layer` drops the share from each layer, `global` the lowest of all layers that trade.
        redistribution: `none`, or what decides how many of the dropped weights each layer gets: `score` (mean grow
            score of its active weights), `magnitude` (their mean magnitude), `nonzeros` (how many survived the drop),
            `global` (the best inactive weights of all layers together).
        **shared: the options of `SparseFromStart`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    grows_by_gradient: ClassVar[bool] = True
    """Whether `grow_score` reads the dense gradient."""

    def __init__(
        self,
        *,
        update_every: int = 100,
        drop_fraction: float | Schedule = 0.3,
        drop_schedule: str = "cosine",
        stop_at: float = 0.75,
        exclude_just_dropped: bool = False,
        drop_scope: str = "layer",
        redistribution: str = "none",
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.update_every = options.count("update_every", update_every)
        self.drop_fraction = drop_fraction
        if not callable(drop_fraction):
            self.drop_fraction = options.number("drop_fraction", drop_fraction, high=1)
        self.drop_schedule = options.choice("drop_schedule", drop_schedule, DROP_SCHEDULES)
        self.stop_at = options.number("stop_at", stop_at, high=1)
        self.exclude_just_dropped = options.flag("exclude_just_dropped", exclude_just_dropped)
        self.drop_scope = options.choice("drop_scope", drop_scope, ("layer", "global"))
        self.redistribution = options.choice("redistribution", redistribution, ("none", *REDISTRIBUTIONS))

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
        traders = self._traders([network.layers[name] for name in network.masks.counters])
        if self.redistribution != "none" and all(len(layers) == 1 for layers in traders):
            log.warning(
                "No two layers can trade weights, so redistribution = '%s' changes nothing: layers trade where the "
                "pattern does not fix the number in each row and groups hold equally many weights.",
                self.redistribution,
            )

    def due(self, network: Network, step: int) -> bool:
        """Whether the masks change after `step`."""
        return self._updates(network).due(step)

    def limits(self, network: Network, step: int) -> Mapping[str, int]:
        """Groups to which each row of a layer is cut before it drops and grows: none, but in methods that shrink."""
        return {}

    def needs_gradients(self, network: Network, step: int) -> bool:
        return self.grows_by_gradient and self.due(network, step)

    def after_step(self, network: Network, step: int) -> None:
        if not self.due(network, step):
            return
        fraction = options.number("drop_fraction", self._drop_fraction(network)(step), high=1)
        layers = [
            network.layers[name]
            for name in network.masks.counters
            if not self.grows_by_gradient or name in network.gradients
        ]
        limits = self.limits(network, step)
        for traders in self._traders(layers):
            self._update(network, traders, fraction, step, limits)
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
            "drop_scope": self.drop_scope,
            "redistribution": self.redistribution,
        }

    def _updates(self, network: Network) -> UpdateSchedule:
        return UpdateSchedule(self.update_every, 1, int(self.stop_at * network.total_steps))

    def _drop_fraction(self, network: Network) -> Schedule:
        if callable(self.drop_fraction):
            return self.drop_fraction
        return DROP_SCHEDULES[self.drop_schedule](self.drop_fraction, self._updates(network).stop)

    def _traders(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """The layers in sets whose members drop together and exchange weights."""
        if self.drop_scope == "layer" and self.redistribution == "none":
            return [[layer] for layer in layers]
        sets: dict[object, list[Layer]] = {}
        for layer in layers:
            trades = layer.density is None and layer.rows == 1
            sets.setdefault(layer.unit if trades else layer.name, []).append(layer)
        return list(sets.values())

    def _update(
        self, network: Network, layers: Sequence[Layer], fraction: float, step: int, limits: Mapping[str, int]
    ) -> None:
        drops = [layer.pattern.scores(self.drop_score(network, layer.name)) for layer in layers]
        before = [layer.pattern.rows(network.masks[layer.name]) for layer in layers]
        active = [
            _cut(score, mask, limits.get(layer.name)) for layer, score, mask in zip(layers, drops, before, strict=True)
        ]
        kept = self._kept(layers, drops, active, fraction)
        if all(torch.equal(old, new) for old, new in zip(before, kept, strict=True)):
            return
        saliences = [score[mask] for score, mask in zip(drops, active, strict=True)]
        del drops  # the scores of all weights would take as much memory as the weights while others grow
        grows = [layer.pattern.scores(self.grow_score(network, layer.name, step)) for layer in layers]
        free = [~mask for mask in (active if self.exclude_just_dropped else kept)]
        turnovers = [Turnover(*each) for each in zip(layers, active, kept, free, saliences, grows, strict=True)]
        for turnover, missing in zip(turnovers, self._missing(turnovers), strict=True):
            grown = _grown(turnover, missing)
            layer = turnover.layer
            network.change(layer.name, layer.pattern.unfold(turnover.kept | grown, layer.shape))

    def _kept(
        self, layers: Sequence[Layer], drops: Sequence[Tensor], active: Sequence[Tensor], fraction: float
    ) -> list[Tensor]:
        """What is left without the lowest share `fraction`, rounded down, of the active groups, whatever their rows."""
        if len(layers) == 1 or self.drop_scope == "layer":
            return [_without_lowest(score, mask, mask, fraction) for score, mask in zip(drops, active, strict=True)]
        # The best group of each layer stays: a layer without any would cut the network in two.
        spared = [top_k(score, mask.any(dim=1).long(), mask) for score, mask in zip(drops, active, strict=True)]
        score, mask, best = (torch.cat(list(each), dim=1) for each in (drops, active, spared))
        kept = _without_lowest(score, mask, mask & ~best, fraction)
        return list(torch.split(kept, [layer.groups for layer in layers], dim=1))

    def _missing(self, turnovers: Sequence[Turnover]) -> list[Tensor]:
        """Number of groups that each row of each layer grows, int64 [R]."""
        dropped = [each.dropped for each in turnovers]
        if len(turnovers) == 1 or self.redistribution == "none":
            return dropped
        kept = [int(each.kept.sum()) for each in turnovers]
        numbers = allocate(
            sum(int(number) for number in dropped),
            REDISTRIBUTIONS[self.redistribution](turnovers),
            [max(1 - number, 0) for number in kept],
            [each.layer.groups - number for each, number in zip(turnovers, kept, strict=True)],
        )
        return [torch.tensor([number], device=each.device) for number, each in zip(numbers, dropped, strict=True)]


class GrowByGradient(DropGrow):
    """What grows has the largest |dL/dw|, the dense gradient of the step of the update."""

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return scores.gradient(network.gradients[name])


class GrowAtRandom(DropGrow):
    """What grows is chosen at random; no dense gradient is needed."""

    grows_by_gradient = False

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return scores.random(network.weights[name].parameter, network.seed, name, step)


def _grown(turnover: Turnover, missing: Tensor) -> Tensor:
    """The free groups of highest score, then, where these are too few, what was just dropped."""
    at_once = torch.minimum(missing, turnover.free.sum(dim=1))
    grown = top_k(turnover.grow_score, at_once, turnover.free)
    if (at_once < missing).any():
        others = ~turnover.kept & ~turnover.free
        grown = grown | top_k(turnover.grow_score, missing - at_once, others)
    return grown


def _cut(score: Tensor, active: Tensor, limit: int | None) -> Tensor:
    """The active groups, or of each row those `limit` of highest score."""
    return active if limit is None else top_k(score, active.sum(dim=1).clamp(max=limit), active)


def _without_lowest(score: Tensor, active: Tensor, candidates: Tensor, fraction: float) -> Tensor:
    """The active groups but for the share `fraction` of them, taken from the candidates of lowest score."""
    number = min(int(int(active.sum()) * fraction), int(candidates.sum()))
    counts = torch.tensor([number], device=active.device)
    return active & ~top_k(score.neg().reshape(1, -1), counts, candidates.reshape(1, -1)).reshape(active.shape)
