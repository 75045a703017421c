"""DST-EE: dynamic sparse training with an exploitation-exploration trade-off (arXiv 2211.16667)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsepipe.sparsity import options, schedule, scores
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.network import Network

SCORES = ("magnitude", "signed")
C_SCHEDULES = ("constant", "cosine", "stepped")


class DSTEE(DropGrow):
    """Grow by |gradient| + c ln(t) / (N + eps), N the number of rounds in which a weight was active.

    The bonus is absolute: it must be of the size of the gradients to matter. Layers' mean |gradient| of 0.005-0.03
    are common, so c = 1e-5 hardly explores, 1e-3 balances and 1e-2 explores; a loss multiplied by k needs c times k.

    Args:
        c: weight of exploration; 0 makes the method equal to RigL bit for bit.
        eps: positive remainder; a small one puts never-active weights before all others.
        relative_c: take `c` in units of the layer's mean |gradient| at the update, so that neither the scale of the
            loss nor that of a layer matters; an extension, not in the paper.
        score: `magnitude`, the paper's |gradient| + bonus, or `signed`, |gradient + bonus|, which the first author's
            code computes: there the bonus counts against weights of negative gradient.
        c_schedule: `constant`, `cosine` (c/2 (1 + cos(pi t/stop)), 0 at the last update) or `stepped` (times `c_factor`
            after each `c_decay_every` steps). The decays are in the author's code, not in the paper.
        c_factor: see `c_schedule`.
        c_decay_every: see `c_schedule`; in optimizer steps.
        **shared: the options of `DropGrow`; `exclude_just_dropped` is false in the author's code, as here.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "dst-ee"

    def __init__(
        self,
        *,
        c: float = 1e-3,
        eps: float = 1.0,
        relative_c: bool = False,
        score: str = "magnitude",
        c_schedule: str = "constant",
        c_factor: float = 0.9,
        c_decay_every: int = 1000,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.c = options.number("c", c)
        self.eps = options.positive("eps", eps)
        self.relative_c = options.flag("relative_c", relative_c)
        self.score = options.choice("score", score, SCORES)
        self.c_schedule = options.choice("c_schedule", c_schedule, C_SCHEDULES)
        self.c_factor = options.number("c_factor", c_factor, high=1)
        self.c_decay_every = options.count("c_decay_every", c_decay_every)

    def describe(self) -> dict[str, Any]:
        own = ("c", "eps", "relative_c", "score", "c_schedule", "c_factor", "c_decay_every")
        return {**super().describe(), **{option: getattr(self, option) for option in own}}

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        return {**super().metrics(network, step), "c": self._c(network, step)}

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        gradient, c = network.gradients[name], self._c(network, step)
        if self.relative_c:
            c *= float(scores.gradient(gradient).mean())
        return scores.acquisition(
            gradient, network.masks.counters[name], step, c, self.eps, signed=self.score == "signed"
        )

    def _c(self, network: Network, step: int) -> float:
        if self.c_schedule == "cosine":
            return schedule.cosine(self.c, self._updates(network).stop)(step)
        if self.c_schedule == "stepped":
            return schedule.stepped(self.c, self.c_decay_every, self.c_factor)(step)
        return self.c
