"""GaP: scheduled grow-and-prune (arXiv 2106.09857)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.method import SparseFromStart
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import prune_layer


class GaP(SparseFromStart):
    """Start sparse at random, let one part of the network after the other grow dense, train it and prune it again.

    The sparse layers are cut into `partitions` contiguous parts. Turn t of `rounds` * `partitions` turns prunes what is
    dense by magnitude, layer by layer, makes part t mod `partitions` dense, its new weights at zero, and trains. At the
    end all parts are pruned and fine-tuned with fixed masks.

    `parallel` is P-GaP: the parts of a round grow in copies of the network that all start from the same weights;
    the round's result takes each part from its copy, and the mean of the copies where no part is concerned. The copies
    are trained one after another here, so a round costs as many steps as a cyclic one.

    Args:
        partitions: number of parts; at most one for each sparse layer.
        rounds: how often each part grows.
        finetune: share of the training after the last pruning.
        parallel: P-GaP instead of C-GaP.
        restart: each turn begins with a fresh optimizer, and with the optimizer's first learning rate, which then falls
            along a cosine; the loop's schedule is passed over. Without it the loop's schedule and state go on.
        **shared: the options of `SparseFromStart`; the paper uses `uniform`.

    Raises:
        RecipeError: an option is out of range or of the wrong type, the distribution is `global`, which has no number
            of weights for one layer, or, in `attach`, the training has fewer steps before fine-tuning than turns.
    """

    name = "gap"

    def __init__(
        self,
        *,
        partitions: int = 4,
        rounds: int = 5,
        finetune: float = 0.25,
        parallel: bool = False,
        restart: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.partitions = options.count("partitions", partitions)
        self.rounds = options.count("rounds", rounds)
        self.finetune = options.number("finetune", finetune, high=1, below=True)
        self.parallel = options.flag("parallel", parallel)
        self.restart = options.flag("restart", restart)
        if self.target.distribution == "global":
            raise RecipeError("'gap' prunes layer by layer: 'distribution' cannot be global.", where="distribution")

    def attach(self, network: Network) -> None:
        super().attach(network)
        starts = self.starts(network)
        if len(set(starts)) < len(starts):
            raise RecipeError(
                f"'gap' takes {len(starts) - 1} turns, but there are only {starts[-1]} steps before fine-tuning.",
                where="rounds",
                advice="Train longer, or lower 'rounds', 'partitions' or 'finetune'.",
            )
        self._grow(network, 0)

    def parts(self, network: Network) -> list[list[str]]:
        """Names of the layers of each part."""
        names, number = list(network.masks.counters), min(self.partitions, max(len(network.masks.counters), 1))
        cuts = [round(index * len(names) / number) for index in range(number + 1)]
        return [names[start:stop] for start, stop in pairwise(cuts)]

    def starts(self, network: Network) -> list[int]:
        """Steps done when each turn begins, and, last, the fine-tuning."""
        turns = self.rounds * len(self.parts(network))
        stop = max((1 - self.finetune) * network.total_steps, 1)
        return [round(turn * stop / turns) for turn in range(turns)] + [round(stop)]

    def lr_scale(self, network: Network, step: int) -> float | None:
        if not self.restart:
            return None
        starts = [*self.starts(network), network.total_steps]
        begin = max(start for start in starts if start < step)
        length = min((start for start in starts if start >= step), default=step) - begin
        return 0.5 * (1 + math.cos(math.pi * (step - 1 - begin) / max(length, 1)))

    def after_step(self, network: Network, step: int) -> None:
        starts = self.starts(network)
        if step not in starts:
            return
        turn = starts.index(step)
        if self.parallel:
            self._collect(network, turn - 1)
        kept = self.kept(network)
        for name in network.masks.counters:
            prune_layer(network, network.layers[name], kept[name])
        if turn < len(starts) - 1:
            self._grow(network, turn)
        network.masks.count()
        if self.restart:
            network.reset_optimizer()

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self.starts(network)[-1]

    def describe(self) -> dict[str, Any]:
        own = ("partitions", "rounds", "finetune", "parallel", "restart")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}

    def _grow(self, network: Network, turn: int) -> None:
        parts = self.parts(network)
        if self.parallel and turn % len(parts) == 0:
            network.memory["round"] = network.copy_of_model()
            network.memory["result"] = {
                key: torch.zeros_like(value)
                for key, value in network.memory["round"].items()
                if value.is_floating_point()
            }
        for name in parts[turn % len(parts)]:
            network.grow_dense(name)

    def _collect(self, network: Network, turn: int) -> None:
        """Keep what the copy of this turn is for; end the round, or go back to its beginning for the next copy."""
        parts, state = self.parts(network), network.model_tensors()
        start, result = network.memory["round"], network.memory["result"]
        # Not by name: the state dict has one for each place of a shared weight.
        owner = {network.tensors[name].data_ptr(): index for index, part in enumerate(parts) for name in part}
        for name, value in result.items():
            part = owner.get(state[name].data_ptr())
            if part is None:
                value.add_(state[name], alpha=1 / len(parts))
            elif part == turn % len(parts):
                value.copy_(state[name])
        for name in network.masks.counters:  # the weights to come may be anywhere
            network.grow_dense(name)
        last = turn % len(parts) == len(parts) - 1
        for name, value in state.items():
            value.copy_(result[name] if last and name in result else start[name])
