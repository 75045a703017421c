"""What happened to the masks: churn, survival ages, gradients of inactive weights, and a film of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.masks import COUNTER_LIMIT, MaskSet, pack_mask

MAX_FRAMES = 12
"""Frames of a film; once there are more, every other one is left out."""


FILMED_SIZE = 2**20
"""Weights of the largest layer that is filmed unasked, so that the frames take at most 2 MB."""


@dataclass
class Film:
    """The mask of one layer after some of the updates: the first, then every `stride`-th, so that few are kept."""

    layer: str
    shape: tuple[int, ...]
    stride: int = 1
    rounds: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    """Each frame as `MaskSet.pack` writes it."""

    def add(self, mask: Tensor, number: int, step: int) -> None:
        """Keep the mask after update `number` (0: before the first), if its turn has come."""
        if number % self.stride:
            return
        self._keep(mask, number, step)
        if len(self.rounds) > MAX_FRAMES:
            self.stride *= 2
            kept = [at for at, number in enumerate(self.rounds) if number % self.stride == 0]
            self.rounds, self.steps = [self.rounds[at] for at in kept], [self.steps[at] for at in kept]
            self.bits = [self.bits[at] for at in kept]

    def finish(self, mask: Tensor, number: int, step: int) -> None:
        """Keep the last mask of all, unless it is there."""
        if self.rounds[-1] != number:
            self._keep(mask, number, step)

    def _keep(self, mask: Tensor, number: int, step: int) -> None:
        self.rounds.append(number)
        self.steps.append(step)
        self.bits.append(torch.from_numpy(pack_mask(mask)))


class MaskHistory:
    """Follows the masks through their updates; `Sparsifier.watch` makes one.

    It holds the update in which each active weight was last grown (int16 for each active weight: at a density of
    0.1, 0.2 bytes for each weight; int32 after 32,767 updates) and at most `MAX_FRAMES` masks of one layer as bits.

    Args:
        masks: followed from now on; what is active now counts as grown in update 0.
        step: optimizer steps so far.
        film: layer to keep frames of; by default the sparse layer with most active weights, of those that are not
            larger than `FILMED_SIZE`.

    Raises:
        ModelError: there is no layer of the name `film`.
    """

    def __init__(self, masks: MaskSet, step: int = 0, film: str | None = None) -> None:
        if film is not None and film not in masks:
            raise ModelError(f"There is no mask of '{film}'.", where="film", advice=f"Layers: {', '.join(masks)}.")
        self.masks = masks
        self._start = self._step = step
        self._first = masks.rounds
        self._born: dict[str, Tensor] = {}
        """Update in which each active weight was last grown, in C order; none for a layer where nothing ever grew."""
        self._round: dict[str, Tensor] = {}
        """Weights that the update under way drops, grows, and that were active before it."""
        self._totals: dict[str, Tensor] = {}
        """The same, summed over the updates since the figures were last taken."""
        self._updates = 0
        self._weight_steps: dict[str, Tensor | int] = {}
        """Active weights of each layer, summed over the steps since the figures were last taken that are settled."""
        self._settled = 0
        self._unsettled = 0
        """Steps after them, in which the masks were as they are now."""
        self._passed_over: dict[str, Tensor] = {}
        """Weights that the masks kept and forward passes left out, summed over the steps since, where there are any."""
        self._gradients: dict[str, Tensor] = {}
        self.film: Film | None = None
        if film is not None or masks.counters:
            self._start_film(film or self._choice(), masks)

    @property
    def updates(self) -> int:
        """Mask updates so far."""
        return self.masks.rounds - self._first

    def change(self, name: str, mask: Tensor, gradient: Tensor | None) -> None:
        """Note that the mask of `name` is about to become `mask`; `gradient` is the dense one, where it is known."""
        before = self.masks[name]
        if gradient is not None:
            self._gradients[name] = _of_inactive(gradient, before)
        grown = mask & ~before
        self._round[name] = torch.stack([each.count_nonzero() for each in (before & ~mask, grown, before)])
        if name in self._born or grown.any():
            now = self.updates + 1
            born = torch.zeros_like(mask, dtype=torch.int16 if now <= COUNTER_LIMIT else torch.int32)
            if name in self._born:
                born.masked_scatter_(before, self._born[name].to(born.dtype))
            born.masked_fill_(grown, now)
            self._born[name] = born.masked_select(mask)

    def end_step(self, computed: Mapping[str, Tensor]) -> None:
        """Note that an optimizer step was taken; before `end_round`, if masks are updated after it.

        Args:
            computed: masks of what its forward passes computed with, where that is less than the masks keep.
        """
        self._unsettled += 1
        for name, mask in computed.items():
            number = self.masks[name].count_nonzero() - mask.count_nonzero()
            self._passed_over[name] = self._passed_over[name] + number if name in self._passed_over else number

    def end_round(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Note that the update after optimizer step `step` is complete."""
        self._updates += 1
        self._step = step
        for name in self.masks.counters:
            if name not in self._round:  # the update left it as it is
                active = self.masks[name].count_nonzero()
                self._round[name] = torch.stack([torch.zeros_like(active), torch.zeros_like(active), active])
                if name in gradients:
                    self._gradients[name] = _of_inactive(gradients[name], self.masks[name])
            before = self._totals.get(name)
            self._totals[name] = self._round[name] if before is None else before + self._round[name]
        self._settle({name: counts[2] for name, counts in self._round.items()})
        self._round.clear()
        if self.film is None and self.masks.counters:
            layer = self._choice()
            self._start_film(layer, {layer: torch.ones_like(self.masks[layer])})  # it was dense until now
        if self.film is not None:
            self.film.add(self.masks[self.film.layer], self.updates, step)

    def take(self) -> dict[str, Any]:
        """Figures of the updates since this was last called, and of the masks as they are now; JSON-able.

        Returns:
            `mask_updates`, how many there were; for each layer that is not dense `dropped` and `grown` (weights that
            an update dropped or grew, in the mean over these updates, as a share of those active before it; what it
            drops and grows again at once is neither), `exploration` (ITOP rate, arXiv 2102.02887: weights active at
            any time / weights), `age_median` and `age_p90` (updates since an active weight was last grown: the
            smallest age that half, or nine tenths, of them do not exceed), and, where the method uses the dense
            gradient, `inactive_gradient_norm` (L2) and `inactive_gradient_mean` (mean absolute value) over the
            weights that were inactive in the last update. `churn` is `dropped` of all these layers together, None
            where there was no update, and `age` holds `median` and `p90` over all of them. `mean_density` is the share
            of weights that forward passes computed with, in the mean over the optimizer steps since.
        """
        totals = {name: counts.tolist() for name, counts in self._totals.items()}
        gradients = {name: values.tolist() for name, values in self._gradients.items()}
        ages = {name: self.ages(name) for name in self.masks.counters}
        all_ages = [sum(each) for each in zip(*ages.values(), strict=True)]
        active = sum(before for _, _, before in totals.values())
        self._settle({name: self.masks.nnz_of(name) for name in self.masks.counters})
        dense = {name: self.masks[name].numel() * self._settled for name in self._passed_over}
        figures: dict[str, Any] = {
            "mask_updates": self._updates,
            "churn": sum(dropped for dropped, _, _ in totals.values()) / active if active else None,
            "age": {"median": quantile(all_ages, 0.5), "p90": quantile(all_ages, 0.9)} if ages else {},
            "dropped": {name: dropped / before for name, (dropped, _, before) in totals.items() if before},
            "grown": {name: grown / before for name, (_, grown, before) in totals.items() if before},
            "exploration": {
                name: int(self.masks.ever_active(name).count_nonzero()) / self.masks[name].numel() for name in ages
            },
            "mean_density": {
                name: int(count - self._passed_over.get(name, 0)) / (self._settled * self.masks[name].numel())
                for name, count in {**dense, **self._weight_steps}.items()
                if self._settled
            },
            "age_median": {name: quantile(counts, 0.5) for name, counts in ages.items()},
            "age_p90": {name: quantile(counts, 0.9) for name, counts in ages.items()},
        }
        for position, key in enumerate(("inactive_gradient_norm", "inactive_gradient_mean")):
            known = {name: values[position] for name, values in gradients.items()}
            figures[key] = {name: value if isfinite(value) else None for name, value in known.items()}
        self._totals, self._gradients, self._updates = {}, {}, 0
        self._weight_steps, self._settled, self._passed_over = {}, 0, {}
        return figures

    def ages(self, name: str) -> list[int]:
        """Number of active weights of a layer by their age: at index a, those last grown a updates ago."""
        now = self.updates
        if name not in self._born:
            return [0] * now + [self.masks.nnz_of(name)]
        counts: list[int] = torch.bincount(now - self._born[name].long(), minlength=now + 1).tolist()
        return counts

    def finish(self) -> Film | None:
        """The film, ending with the mask as it is now; None where nothing was ever sparse."""
        if self.film is not None:
            self.film.finish(self.masks[self.film.layer], self.updates, self._step)
        return self.film

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "step": self._step,
            "first": self._first,
            "updates": self._updates,
            "unsettled": self._unsettled,
            "settled": self._settled,
            "weight_steps": dict(self._weight_steps),
            "born": dict(self._born),
            "totals": dict(self._totals),
            "gradients": dict(self._gradients),
            "film": deepcopy(vars(self.film)) if self.film is not None else None,
            **({"passed_over": dict(self._passed_over)} if self._passed_over else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, once the masks themselves are loaded."""
        self._start, self._step, self._first = state["start"], state["step"], state["first"]
        self._updates, self._unsettled, self._settled = state["updates"], state["unsettled"], state["settled"]
        self._weight_steps = {
            name: count.to(self.masks[name].device) if isinstance(count, Tensor) else count
            for name, count in state["weight_steps"].items()
        }
        self._born, self._totals, self._gradients, self._passed_over = (
            {name: values.to(self.masks[name].device) for name, values in state.get(key, {}).items()}
            for key in ("born", "totals", "gradients", "passed_over")
        )
        self.film = None if state["film"] is None else Film(**deepcopy(state["film"]))

    def _settle(self, active: Mapping[str, Tensor | int]) -> None:
        """Count the steps since the masks last changed, in which so many weights of each sparse layer were active."""
        for name, count in active.items():
            earlier = self._weight_steps.get(name, self.masks[name].numel() * self._settled)  # dense until now
            self._weight_steps[name] = earlier + count * self._unsettled
        self._settled, self._unsettled = self._settled + self._unsettled, 0

    def _choice(self) -> str:
        """Of the sparse layers of up to FILMED_SIZE weights the one with most active ones, or the smallest of all."""
        sizes = {name: self.masks[name].numel() for name in self.masks.counters}
        small = [name for name, size in sizes.items() if size <= FILMED_SIZE]
        return max(small, key=self.masks.nnz_of) if small else min(sizes, key=lambda name: sizes[name])

    def _start_film(self, layer: str, masks: Mapping[str, Tensor]) -> None:
        self.film = Film(layer, tuple(masks[layer].shape))
        self.film.add(masks[layer], 0, self._start)


def quantile(counts: Sequence[int], share: float) -> int:
    """The smallest age that at least `share` of the weights do not exceed; `counts` as from `MaskHistory.ages`."""
    wanted, found = share * sum(counts), 0
    for age, count in enumerate(counts):
        found += count
        if found >= wanted:
            return age
    return len(counts) - 1


def _of_inactive(gradient: Tensor, mask: Tensor) -> Tensor:
    """L2 norm and mean absolute value of the gradient where the mask is off, float32 [2]."""
    inactive = gradient.float().masked_fill(mask, 0)
    number = mask.numel() - mask.count_nonzero()
    return torch.stack([torch.linalg.vector_norm(inactive), inactive.abs().sum() / number.clamp(min=1)])
