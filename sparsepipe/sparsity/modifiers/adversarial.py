"""Adversarial fine-tuning: the end of a training on adversarial inputs, at a learning rate of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sparsepipe.sparsity import options
from sparsepipe.sparsity.attacks import InputSpace, pgd
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.network import Network


class Adversarial(Modifier):
    """Train on PGD inputs after a natural training ("adversarial fine-tuning", arXiv 2012.13628).

    From `begin` on, every batch is replaced by one that `pgd` made of it against the network as it is then, and the
    learning rate has a slow start and a fast decay. With f in [0, 1] the share of these steps that are done:

        lr(f) = first + (peak - first) * f / peak_at              for f < peak_at
        lr(f) = peak * (last / peak)^((f - peak_at) / (1 - peak_at))   after it

    Of the schedule the paper's abstract gives the form; the numbers are this project's. The loss is the cross-entropy
    of the adversarial inputs alone. The accuracy that is logged for training is that on them. Masks stay the method's
    own; methods that change them late should be done before `begin`.

    Weights are selected from the last epoch: validation on natural samples would choose the least robust ones.

    Args:
        epsilon: radius of the ball (l-infinity), in units of the values before normalisation: pixels are in [0, 1].
        step_size: of the attack; None is 2.5 * epsilon / steps.
        steps: of the attack.
        begin: share of the training that is natural.
        peak: highest learning rate, as a multiple of the optimizer's first one.
        first: learning rate at the start, as such a multiple.
        last: learning rate at the end, as such a multiple.
        peak_at: where the highest one is, as a share of the adversarial steps.
        schedule: false leaves the learning rate to the loop.
        inputs: from values to inputs. The stage `train` fills it in.

    Raises:
        RecipeError: an option is out of range.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(
        self,
        *,
        epsilon: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 7,
        begin: float = 0.8,
        peak: float = 0.5,
        first: float = 0.005,
        last: float = 0.0005,
        peak_at: float = 0.5,
        schedule: bool = True,
        inputs: InputSpace | None = None,
    ) -> None:
        self.epsilon = options.positive("epsilon", epsilon)
        self.steps = options.count("steps", steps)
        self.step_size = 2.5 * epsilon / steps if step_size is None else options.positive("step_size", step_size)
        self.begin = options.number("begin", begin, high=1, below=True)
        self.peak = options.positive("peak", peak)
        self.first = options.number("first", first, high=self.peak)
        self.last = options.number("last", options.positive("last", last), high=self.peak)
        self.peak_at = options.number("peak_at", peak_at, high=1, below=True)
        self.schedule = options.flag("schedule", schedule)
        self.inputs = inputs or InputSpace()

    def natural_steps(self, network: Network) -> int:
        """Optimizer steps before the first adversarial one."""
        return min(round(self.begin * network.total_steps), network.total_steps - 1)

    def lr_scale(self, network: Network, step: int) -> float | None:
        natural = self.natural_steps(network)
        if not self.schedule or step <= natural:
            return None
        done = (step - natural - 1) / max(1, network.total_steps - natural - 1)
        if done < self.peak_at:
            return self.first + (self.peak - self.first) * done / self.peak_at
        return float(self.peak * (self.last / self.peak) ** ((done - self.peak_at) / (1 - self.peak_at)))

    def transform_batch(
        self, network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        if step <= self.natural_steps(network):
            return inputs, labels
        attacked = pgd(
            model,
            inputs,
            labels,
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            space=self.inputs,
        )
        return attacked, labels

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= network.total_steps

    def describe(self) -> dict[str, Any]:
        own = ("epsilon", "step_size", "steps", "begin", "peak", "first", "last", "peak_at", "schedule")
        return {key: getattr(self, key) for key in own}
