"""AC/DC: alternating compressed and decompressed training (arXiv 2106.12379), with its longer recipe (2308.02060)."""

from __future__ import annotations

from typing import Any

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import MagnitudePruning


class ACDC(MagnitudePruning):
    """Train dense and sparse by turns; the last turn is sparse, and the dense network before it is kept as a twin.

    A sparse phase begins with the largest magnitudes at that moment, M = top-k |w|, and trains w * M. A dense phase
    lifts the masks; pruned weights come back at zero. With the defaults and 100 epochs the sparse phases begin after
    epochs 10, 20, ..., 70 and 85, the dense ones after 15, 25, ..., 75.

    A longer training is what sparse networks profit from most (arXiv 2308.02060): `epochs_multiplier` lengthens it
    and keeps the length of a phase, so that there are more of them. `sparsepipe train` trains that many more epochs; in
    your own loop give `total_steps` that many times larger.

    Args:
        warmup: share of the training that is dense at first.
        phase: length of a phase, as a share of the training that the recipe asks for, before the multiplier.
        final_dense: share of the training in the last dense phase.
        final_sparse: share of the training in the last sparse phase.
        epochs_multiplier: how many times longer to train.
        reset_optimizer: a fresh optimizer, without momentum and moments, whenever a dense phase begins.
        **shared: the options of `TargetMethod`; the paper's distribution is `global`, or `uniform`.

    Raises:
        RecipeError: an option is out of range or of the wrong type, or the phases leave no room for one another.
    """

    name = "acdc"

    def __init__(
        self,
        *,
        warmup: float = 0.1,
        phase: float = 0.05,
        final_dense: float = 0.1,
        final_sparse: float = 0.15,
        epochs_multiplier: float = 1.0,
        reset_optimizer: bool = True,
        distribution: Any = "global",
        **shared: Any,
    ) -> None:
        super().__init__(distribution=distribution, **shared)
        self.warmup = options.number("warmup", warmup, high=1, below=True)
        self.phase = options.positive("phase", phase)
        self.final_dense = options.number("final_dense", final_dense, high=1, below=True)
        self.final_sparse = options.positive("final_sparse", final_sparse)
        self.epochs_multiplier = options.positive("epochs_multiplier", epochs_multiplier)
        self.reset_optimizer = options.flag("reset_optimizer", reset_optimizer)
        if self.warmup + self.final_dense + self.final_sparse > 1:
            raise RecipeError("'warmup', 'final_dense' and 'final_sparse' add up to more than the whole training.")

    def phases(self, total_steps: int) -> list[tuple[int, bool]]:
        """(steps done when it begins, whether it is sparse) for each phase after the first dense one."""
        begin = round(self.warmup * total_steps)
        last = max(round((1 - self.final_sparse) * total_steps), 1)
        dense = round((1 - self.final_sparse - self.final_dense) * total_steps)
        length = max(round(self.phase / self.epochs_multiplier * total_steps), 1)
        turns = [(start, index % 2 == 0) for index, start in enumerate(range(max(begin, 1), dense, length))]
        if turns and turns[-1][1]:
            turns.append((dense, False))
        return [*turns, (last, True)]

    def after_step(self, network: Network, step: int) -> None:
        phases = self.phases(network.total_steps)
        for start, sparse in phases:
            if start != step:
                continue
            if sparse:
                if start == phases[-1][0]:
                    network.snapshot("dense")
                self.prune(network)
            else:
                for name in network.masks.counters:
                    network.grow_dense(name)
                network.masks.count()
                if self.reset_optimizer:
                    network.reset_optimizer()

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self.phases(network.total_steps)[-1][0]

    def describe(self) -> dict[str, Any]:
        own = ("warmup", "phase", "final_dense", "final_sparse", "epochs_multiplier", "reset_optimizer")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}
