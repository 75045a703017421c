"""Lottery tickets: iterative magnitude pruning with rewinding (arXiv 1803.03635, 1912.05671)."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

from sparsepipe.sparsity import options
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import MagnitudePruning


class Lottery(MagnitudePruning):
    """Train, prune by magnitude, put what is kept back to its value at an early step, and train again.

    Each of `rounds` rounds leaves the same share of the weights that it found, (1 - sparsity)^(1 / rounds); after the
    last one the ticket is trained to the end. Round one begins at step 0 and the others at the step that they rewind
    to; all end at the same step of their schedule, so that the whole training of T steps has rounds of
    T / (1 + rounds (1 - rewind_to)) steps, the first with its `rewind_to` and the others without. Rewinding puts the
    whole model back, also what is not masked and batch statistics. The optimizer starts anew; the order of the data
    goes on. The dense network at the end of round one is kept as a twin.

    Args:
        rounds: prunings; 1 is one-shot.
        rewind_to: the step to go back to, as a share of one round; 0 goes back to the first weights.
        restart: each round follows the cosine of a whole training from its point on, from the optimizer's first
            learning rate; the loop's schedule is passed over. Without it the loop's schedule goes on over all rounds.
        epochs_multiplier: how many times longer to train than the recipe says, for rounds that are whole trainings.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "lottery"

    def __init__(
        self,
        *,
        rounds: int = 3,
        rewind_to: float = 0.05,
        restart: bool = True,
        epochs_multiplier: float = 1.0,
        distribution: Any = "global",
        **shared: Any,
    ) -> None:
        super().__init__(distribution=distribution, **shared)
        self.rounds = options.count("rounds", rounds)
        self.rewind_to = options.number("rewind_to", rewind_to, high=1, below=True)
        self.restart = options.flag("restart", restart)
        self.epochs_multiplier = options.positive("epochs_multiplier", epochs_multiplier)

    def attach(self, network: Network) -> None:
        super().attach(network)
        if self._rewind_step(network) == 0:
            self._remember(network)

    def prunings(self, total_steps: int) -> list[int]:
        """Steps done at each pruning."""
        length = total_steps / (1 + self.rounds * (1 - self.rewind_to))
        again = (1 - self.rewind_to) * length
        return [max(round(length + index * again), index + 1) for index in range(self.rounds)]

    def lr_scale(self, network: Network, step: int) -> float | None:
        if not self.restart:
            return None
        prunings, early = self.prunings(network.total_steps), self._rewind_step(network)
        index = bisect_left(prunings, step)  # rounds that are over before this step
        begin = prunings[index - 1] - early if index else 0
        end = prunings[index] if index < self.rounds else network.total_steps
        return 0.5 * (1 + math.cos(math.pi * (step - 1 - begin) / max(end - begin, 1)))

    def after_step(self, network: Network, step: int) -> None:
        prunings = self.prunings(network.total_steps)
        if step == self._rewind_step(network):
            self._remember(network)
        if step not in prunings:
            return
        number = prunings.index(step) + 1
        if number == 1:
            network.snapshot("dense")
        self.prune(network, self._progress(number))
        for name, value in network.model_tensors().items():
            if name in network.memory["rewind"]:
                value.copy_(network.memory["rewind"][name])
        network.mask_weights()
        network.reset_optimizer()

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self.prunings(network.total_steps)[-1]

    def describe(self) -> dict[str, Any]:
        own = ("rounds", "rewind_to", "restart", "epochs_multiplier")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}

    def _progress(self, number: int) -> float:
        """How far the masks are between dense (0) and the target (1) after so many prunings."""
        sparsity = self.target.sparsity
        if number == self.rounds or sparsity == 0:
            return 1.0
        return (1 - math.pow(1 - sparsity, number / self.rounds)) / sparsity

    def _rewind_step(self, network: Network) -> int:
        return min(
            round(self.rewind_to * network.total_steps / (1 + self.rounds * (1 - self.rewind_to))),
            self.prunings(network.total_steps)[0] - 1,
        )

    def _remember(self, network: Network) -> None:
        network.memory["rewind"] = network.copy_of_model()
