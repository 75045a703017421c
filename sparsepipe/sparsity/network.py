"""A network in sparse training: its maskable weights, their masks and their optimizer state, changed together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.history import MaskHistory
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.optimizer import is_preconditioner, renew, states, tensors_in
from sparsepipe.sparsity.samples import Loss, Samples
from sparsepipe.sparsity.target import Layer, Target
from sparsepipe.sparsity.weights import Weight

# Integers of the same width as the floats: 0 * x is +0 for any bits, also those of NaN, infinity and negative numbers.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

PIECE = 2**18
"""Elements that are masked at a time."""


@dataclass
class Network:
    """What a method works on. Methods keep no state of their own: all of it is here."""

    model: nn.Module
    weights: dict[str, Weight]
    optimizer: Optimizer
    total_steps: int
    """Of one stage: of the whole training, unless a modifier repeats it."""
    seed: int
    stage: int = 0
    """Trainings of the method that are over."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Weights that no method may mask, and why."""
    masks: MaskSet = field(init=False)
    base_lrs: list[float] = field(init=False)
    """Of the optimizer's groups, before any schedule."""
    loss: Loss = cross_entropy
    """Of outputs and labels, for what computes one itself."""
    samples: Samples | None = None
    """Training batches and their loss, where the method asked for them."""
    layers: dict[str, Layer] = field(default_factory=dict)
    """The method's plan for each weight."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Dense gradients of the current step, where the method asked for them."""
    local_gradients: dict[str, Tensor] = field(default_factory=dict)
    """Dense gradients of this process's own batches since the last step, where the method asked for them; multiplied
    with the scale of the loss, if there is one."""
    processes: int = 1
    """That train this network together."""
    averages: dict[str, Tensor] = field(default_factory=dict)
    """Running averages of dense gradients, for methods that keep them; saved and restored with the rest."""
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Whatever else a method remembers, as kind -> name -> tensor; saved and restored with the rest."""
    variables: dict[str, nn.Parameter] = field(default_factory=dict)
    """Trainable tensors of the method itself, which the model does not hold: gates, thresholds."""
    own_optimizer: Optimizer | None = None
    """Trains the variables, right after each step of `optimizer`."""
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Earlier states of the whole model that are a result of the training, too: kind -> its state dict."""
    copies: list[dict[str, Tensor]] = field(default_factory=list)
    """The same weights in other models, as averages of this one, which are kept as sparse."""
    history: MaskHistory | None = None
    """What happened to the masks, where somebody wants to know."""
    _revived: dict[str, tuple[dict[str, Tensor], nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masks = MaskSet.dense(self.tensors)
        groups = self.optimizer.param_groups
        self.base_lrs = [float(group.get("initial_lr", group.get("lr", 0))) for group in groups]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: weight.parameter for name, weight in self.weights.items()}

    @contextmanager
    def preserved(self, *, after: bool) -> Iterator[None]:
        """Put the weights and their optimizer state back to what they are now if the block fails, or `after` it."""
        tensors = [tensor for parameter in self.tensors.values() for tensor in (parameter, *self._state(parameter))]
        kept = [tensor.clone() for tensor in tensors]
        done = False
        try:
            yield
            done = True
        finally:
            if after or not done:
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value)

    def plan(self, target: Target) -> None:
        """Lay out the layers, and say why those that stay dense do.

        Raises:
            RecipeError: an override or an entry of the distribution matches no weight.
        """
        self.layers = target.plan(self.weights)
        self.masks.reasons = {name: layer.dense_because for name, layer in self.layers.items() if layer.dense_because}

    def start(self, masks: Mapping[str, Tensor]) -> None:
        """Begin sparse: `masks` are the first of these weights; state that an optimizer already has is cut to them."""
        self.masks.start(self.tensors, masks)
        for name, mask in masks.items():
            self._zero(name, weight=~mask, state=~mask)

    def change(self, name: str, mask: Tensor) -> None:
        """Give a weight another mask.

        What was dropped or grown gets weight zero, also in the copies, and zero in every floating-point state tensor
        of the weight's shape, however deep in the optimizer's state; everything else keeps both. State that all
        elements share, as the step count of Adam, goes on.

        Raises:
            ModelError: the optimizer keeps a preconditioner of the weight's shape.
        """
        if self.history is not None:
            self.history.change(name, mask, self.gradients.get(name))
        changed = self.masks[name] ^ mask
        self.masks.change(self.weights[name].parameter, name, mask)
        self._zero(name, weight=changed, state=changed)

    def leave_out(self, names: Collection[str], reason: str) -> None:
        """Keep weights from the method, before it is attached.

        Raises:
            ModelError: none is left.
        """
        self.left_out |= {name: reason for name in self.weights if name in names}
        self.weights = {name: weight for name, weight in self.weights.items() if name not in names}
        if not self.weights:
            raise ModelError(f"There is no weight to mask but {', '.join(map(repr, self.left_out))}: {reason}.")
        self.masks = MaskSet.dense(self.tensors)

    def restart(self, kept: tuple[str, ...]) -> None:
        """Be as before any method was attached: no masks, nothing remembered.

        Args:
            kept: how the kinds of `memory` begin that stay.
        """
        for name in list(self.masks.counters):
            self.masks.make_dense(self.weights[name].parameter, name)
        self.masks.rounds = 0
        self.masks.reasons.clear()
        for table in (self.layers, self.gradients, self.averages, self.variables):
            table.clear()
        self.memory = {kind: tensors for kind, tensors in self.memory.items() if kind.startswith(kept)}
        self.own_optimizer = None

    def snapshot(self, kind: str) -> None:
        """Keep the model as it is now."""
        self.snapshots[kind] = self.copy_of_model()

    def model_tensors(self) -> dict[str, Tensor]:
        """The model's state dict as it is now, without what modules keep in it that is no tensor."""
        return {key: value for key, value in self.model.state_dict().items() if isinstance(value, Tensor)}

    def copy_of_model(self) -> dict[str, Tensor]:
        """A copy of `model_tensors`."""
        return {key: value.clone() for key, value in self.model_tensors().items()}

    def revived(self, kind: str) -> nn.Module:
        """The model as it was at a snapshot, in evaluation mode: a copy that is made once, and not to be changed.

        Raises:
            ModelError: the model cannot be copied.
        """
        state, model = self._revived.get(kind, (None, None))
        if model is None or state is not self.snapshots[kind]:
            try:
                model = deepcopy(self.model)
            except Exception as error:  # the user's code may raise anything
                raise ModelError(f"The model cannot be copied ({type(error).__name__}: {error}).") from error
            model.load_state_dict(self.snapshots[kind], strict=False)
            self._revived[kind] = self.snapshots[kind], model.eval().requires_grad_(False)
        return model

    def reset_optimizer(self) -> None:
        """Let the optimizer begin anew with the weights as they are: no momentum, moments or step counts."""
        renew(self.optimizer)

    def step_own(self) -> None:
        """Step the method's own optimizer; groups with a `relative_lr` follow the first group of the other one."""
        if self.own_optimizer is not None:
            for group in self.own_optimizer.param_groups:
                if "relative_lr" in group:
                    group["lr"] = group["relative_lr"] * float(self.optimizer.param_groups[0]["lr"])
            self.own_optimizer.step()

    def grow_dense(self, name: str) -> None:
        """Make every weight of a masked layer active; those that were not start at zero."""
        self.change(name, torch.ones_like(self.masks[name]))

    def lr(self, name: str) -> float:
        """The optimizer's present learning rate for a weight."""
        parameter = self.weights[name].parameter
        for group in self.optimizer.param_groups:
            if any(each is parameter for each in group["params"]):
                return float(group["lr"])
        raise KeyError(name)

    def mask_gradients(self) -> None:
        """Zero the gradients of inactive weights, so that no optimizer gathers state for them."""
        found = [(self.weights[name].parameter.grad, self.masks[name]) for name in self.masks.counters]
        _mask((gradient, mask) for gradient, mask in found if gradient is not None)

    def mask_weights(self) -> None:
        """Zero the inactive weights: exactly +0, whatever an optimizer did to them."""
        _mask((self.weights[name].parameter, self.masks[name]) for name in self.masks.counters)

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these copies of the weights as sparse as the weights."""
        self.copies.append(dict(tensors))
        for name in self.masks.counters:
            tensors[name].masked_fill_(~self.masks[name].to(tensors[name].device), 0)

    def mask_copies(self) -> None:
        """Zero what is inactive in the copies, as `mask_weights` does in the weights."""
        for copy in self.copies:
            _mask((copy[name], self.masks[name].to(copy[name].device)) for name in self.masks.counters)

    def _zero(self, name: str, *, weight: Tensor, state: Tensor) -> None:
        parameter = self.weights[name].parameter
        parameter.masked_fill_(weight, 0)
        for copy in self.copies:
            copy[name].masked_fill_(weight.to(copy[name].device), 0)
        for value in self._state(parameter):
            # In integers an optimizer keeps codes, of which 0 need not stand for zero.
            if value.shape == parameter.shape and value.is_floating_point():
                if is_preconditioner(value):
                    raise ModelError(
                        f"The optimizer keeps a matrix over the rows or columns of '{name}', which has the weight's "
                        "own shape, so that no part of it can be told to belong to a weight that is dropped or grown.",
                        where="optimizer",
                        advice="Keep square layers dense with an override, or train with an optimizer whose state has "
                        "an entry for each weight, as SGD and Adam.",
                    )
                value.masked_fill_(state, 0)

    def _state(self, parameter: Tensor) -> Iterator[Tensor]:
        for state in states(self.optimizer):
            if parameter in state:
                yield from tensors_in(state[parameter])


def _mask(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply tensors by their masks in place, all at once; several times faster than in floating point."""
    tensors: list[Tensor] = []
    masks: list[Tensor] = []
    for tensor, mask in pairs:
        # On a CPU torch first copies a mask as integers: in pieces the copy stays in the cache, and takes no memory.
        rows = max(PIECE * len(tensor) // tensor.numel(), 1) if tensor.is_cpu else len(tensor)
        tensors += torch.split(tensor.view(_INTEGERS[tensor.dtype.itemsize]), rows)
        masks += torch.split(mask, rows)
    if tensors:
        torch._foreach_mul_(tensors, masks)
