"""A method together with modifiers: one set of hooks for the Sparsifier."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.network import Network


class Modifier(Method):
    """What changes training without choosing masks: a method's hooks, called beside those of the method.

    It keeps what it remembers in `network.memory`, under kinds that begin with its name.
    """

    def check_fit(self, network: Network, method: Method) -> None:
        """Asked once all are attached.

        Raises:
            RecipeError: it cannot be combined with what this method does.
        """

    stages: int = 1
    """Trainings of the method from its start to its end, one after another. The steps that all hooks are given, and
    `network.total_steps`, are those of one of them; `network.stage` tells which. In each the
    masks, the optimizer and all that is remembered begin anew, but for `network.snapshots` and the memory of modifiers
    that repeat the method."""

    def begin_stage(self, network: Network) -> None:
        """Called before the method is attached, in each stage; what the weights are now is what it trains."""

    def end_stage(self, network: Network) -> None:
        """Called after `finalize` at the end of each stage but the last."""


class Combined(Method):
    """Calls the hooks of a method and of modifiers in one order, so that the Sparsifier sees one method.

    Batches pass through the modifiers in their order, then through the method. Weights do the same: a modifier shifts
    the parameter, and the method makes of it what its forward pass computes with. Of learning rates the first one that
    is set holds: modifiers, the method, then modifiers that repeat it. Everything else is called for the method first.

    Args:
        method: chooses the masks.
        modifiers: in the order of their names in the recipe.

    Raises:
        RecipeError: one of them is none, or is there twice.
    """

    def __init__(self, method: Method, modifiers: Sequence[Modifier]) -> None:
        for modifier in modifiers:
            if not isinstance(modifier, Modifier):
                raise RecipeError(f"{modifier!r} is no modifier.", where="modifiers", advice="Give Adversarial(...).")
        names = [modifier.name for modifier in modifiers]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"The modifier '{name}' is there twice.", where="modifiers")
        self._method = method
        self._modifiers = tuple(modifiers)
        self._all: tuple[Method, ...] = (method, *modifiers)
        self.stages = math.prod(modifier.stages for modifier in modifiers)
        self.local_kinds = {kind for each in self._all for kind in each.local_memory}

    def begin(self, network: Network) -> None:
        """Begin the present stage."""
        for modifier in self._modifiers:
            modifier.begin_stage(network)
        self.attach(network)

    def next_stage(self, network: Network) -> None:
        """End the present stage, and begin the next."""
        self.finalize(network)
        network.mask_weights()
        for modifier in self._modifiers:
            modifier.end_stage(network)
        network.stage += 1
        network.seed += 1
        network.restart(kept=tuple(modifier.name for modifier in self._modifiers if modifier.stages > 1))
        self.begin(network)
        network.reset_optimizer()

    def attach(self, network: Network) -> None:
        for each in self._all:
            each.attach(network)
        for modifier in self._modifiers:
            modifier.check_fit(network, self._method)

    def needs_gradients(self, network: Network, step: int) -> bool:
        return any(each.needs_gradients(network, step) for each in self._all)

    def needs_local_gradients(self, network: Network) -> bool:
        return any(each.needs_local_gradients(network) for each in self._all)

    def transforms(self, network: Network) -> Collection[str]:
        return list(dict.fromkeys(chain.from_iterable(each.transforms(network) for each in self._all)))

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        for each in (*self._modifiers, self._method):
            if name in each.transforms(network):
                weight = each.transform_weight(network, name, weight, step, training)
        return weight

    def computed(self, network: Network) -> Mapping[str, Tensor]:
        return self._method.computed(network)

    def extra_loss(self, network: Network, step: int) -> Tensor | None:
        return _sum(each.extra_loss(network, step) for each in self._all)

    def observed(self, network: Network) -> Collection[str]:
        return list(dict.fromkeys(chain.from_iterable(each.observed(network) for each in self._all)))

    def batch_loss(self, network: Network, inputs: Tensor, outputs: Mapping[str, Tensor], step: int) -> Tensor | None:
        return _sum(each.batch_loss(network, inputs, outputs, step) for each in self._all)

    def owned(self, network: Network) -> Collection[str]:
        return list(dict.fromkeys(chain.from_iterable(each.owned(network) for each in self._all)))

    def lr_scale(self, network: Network, step: int) -> float | None:
        repeating = [modifier for modifier in self._modifiers if modifier.stages > 1]
        others = [modifier for modifier in self._modifiers if modifier.stages == 1]
        scales = (each.lr_scale(network, step) for each in (*others, self._method, *repeating))
        return next((scale for scale in scales if scale is not None), None)

    def transform_batch(
        self, network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        for each in (*self._modifiers, self._method):
            inputs, labels = each.transform_batch(network, model, inputs, labels, step)
        return inputs, labels

    def before_step(self, network: Network, step: int) -> None:
        for each in self._all:
            each.before_step(network, step)

    def after_step(self, network: Network, step: int) -> None:
        for each in self._all:
            each.after_step(network, step)

    def on_epoch_end(self, network: Network, epoch: int) -> None:
        for each in self._all:
            each.on_epoch_end(network, epoch)

    def finalize(self, network: Network) -> None:
        for each in self._all:
            each.finalize(network)

    def masks_final(self, network: Network, step: int) -> bool:
        return all(each.masks_final(network, step) for each in self._all)

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for each in self._all:
            found |= each.metrics(network, step)
        return found

    def describe(self) -> dict[str, Any]:
        options = {modifier.name: modifier.describe() for modifier in self._modifiers}
        return {**self._method.describe(), **({"modifiers": options} if options else {})}


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    found = [loss for loss in losses if loss is not None]
    return sum(found[1:], found[0]) if found else None
