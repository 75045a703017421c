"""Sparsifier: sparse training in any loop. The only place with optimizer hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from sparsepipe.errors import ModelError, RecipeError
from sparsepipe.sparsity import gradients, options
from sparsepipe.sparsity import state as saved
from sparsepipe.sparsity.forward import ForwardWeights, refuse_compiled
from sparsepipe.sparsity.history import MaskHistory
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.modifiers.combined import Combined, Modifier
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.observation import Observer
from sparsepipe.sparsity.optimizer import let_hooks_run, with_inner, within_step, without_wrapper
from sparsepipe.sparsity.replicas import Replicas, refuse_sharded
from sparsepipe.sparsity.samples import Loss, Samples
from sparsepipe.sparsity.scaling import refuse_scaled
from sparsepipe.sparsity.target import Layer
from sparsepipe.sparsity.weights import maskable, same_weights, unwrapped

log = logging.getLogger("sparsepipe")


class Sparsifier:
    """Keeps the weights of `model` sparse while `optimizer` trains them; the training loop stays as it is.

    After every optimizer step all inactive weights are exactly zero, for any optimizer, and the method may have
    changed the masks. Gradients that were accumulated, averaged over ranks, clipped or unscaled are used as they
    arrive at the step, which is where they are complete; a step that a `GradScaler` skips counts for nothing.

    Methods that learn gates or thresholds compute with other weights than the parameters hold until `freeze`: the state
    dict of the model alone is not the network that they train, and the model must not be compiled.

    Weights have one Sparsifier: another one for the same optimizer takes the place of an earlier one of any of them.

    Args:
        model: the module whose `named_parameters()` name the masks, or what `torch.compile`, DDP or Fabric made of it.
        optimizer: any `torch.optim.Optimizer`; weights that it does not train are left as they are.
        method: for example `DSTEE(sparsity=0.95)`.
        total_steps: optimizer steps of the whole training; the schedules span them. A multiple of the number of
            trainings that a modifier makes of one.
        seed: of everything random in the masks.
        process_group: the processes of `torch.distributed` that train this network together; all, if it is None. They
            get the model and the seed of the first of them, and from then on choose the same masks.
        check_every: mask updates between two comparisons of the masks over the processes; the first update is always
            compared. Single processes compare nothing.
        samples: training batches for methods that score weights (snip, grasp, synflow) or look at the Hessian; all are
            used, and they are kept until `freeze`.
        loss: of outputs and labels, for these methods and for modifiers that compute one themselves.
        modifiers: what else changes the training, for example `[Adversarial(epsilon=0.1)]`; in this order.
        state: go on from this `state_dict()`, with a model and an optimizer that are loaded already.

    Raises:
        ArtefactError: `state` is of another model or of other options, or the model is not loaded.
        ModelError: nothing can be masked, `optimizer` is none of torch's or its steps cannot call hooks, the parameters
            are sharded (FSDP), or the model is compiled and the method changes forward passes. During training: the
            processes have different masks.
        RecipeError: `method` or a modifier is none, the target cannot be reached, or an override matches no layer.
    """

    _at_work: ClassVar[WeakSet[Sparsifier]] = WeakSet()

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        total_steps: int,
        seed: int = 0,
        process_group: distributed.ProcessGroup | None = None,
        check_every: int = 10,
        state: Mapping[str, Any] | None = None,
        samples: Iterable[tuple[Tensor, Tensor]] = (),
        loss: Loss = cross_entropy,
        modifiers: Sequence[Modifier] = (),
    ) -> None:
        optimizer = without_wrapper(optimizer)
        self._optimizers = with_inner(optimizer)
        for each in self._optimizers:
            let_hooks_run(each)
        if not isinstance(method, Method):
            raise RecipeError(
                f"A Sparsifier needs a method, not {method!r}.",
                where="method",
                advice="Give it one with its options: DSTEE(sparsity=0.9).",
            )
        self.method = method
        self._combined = Combined(method, modifiers)
        self.step = 0
        """Optimizer steps taken so far."""
        refuse_sharded(model)
        self._model = unwrapped(model)
        self._groups, self._untrained = len(optimizer.param_groups), _untrained(optimizer)
        weights = maskable(self._model, optimizer)
        self._replicas = Replicas(process_group)
        self._check_every = options.count("check_every", check_every)
        with torch.no_grad():
            seed = self._replicas.share(self._model, seed)
        self._total_steps = options.count("total_steps", total_steps)
        stages = self._combined.stages
        if self._total_steps % stages:
            raise RecipeError(
                f"'total_steps' must be a multiple of {stages}, for {stages} trainings one after another; not "
                f"{self._total_steps}.",
                where="modifiers",
            )
        self._network = Network(self._model, weights, optimizer, self._total_steps // stages, seed)
        self._network.loss, self._network.processes = loss, self._replicas.count
        if batches := list(samples):
            self._network.samples = Samples(self._model, batches, loss, self._replicas.average)
        self._hooks: list[Any] = []
        self._loop_lrs: list[Any] = []
        self._skipped = False
        self._stepping = False
        self._inner_steps = 0
        self._frozen = False
        self._prepared = False
        self._expected_nonzero: dict[str, int] = {}
        with torch.no_grad(), self._network.preserved(after=state is not None):
            self._combined.begin(self._network)
            self._transformed = tuple(self._combined.transforms(self._network))
            if self._transformed:
                refuse_compiled(model)
            self._observer = Observer(self._model, self._combined.observed(self._network))
        with torch.no_grad():
            if state is not None:
                self.load_state_dict(state)
                saved.check_weights_are_loaded(self._network)
            self._replicas.compare(self._network, self.step)
        self._local_hooks = self._keep_local_gradients() if self._combined.needs_local_gradients(self._network) else []
        self._forward = self._forward_weights() if self._transformed else None
        self._take_place()
        # A compiled `optimizer.step` leaves its graph for them: traced, they would be compiled anew at every step.
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        # Loops of sharpness-aware optimizers call methods that step the one inside alone.
        for each in self._optimizers:
            self._hooks += [each.register_step_pre_hook(before), each.register_step_post_hook(after)]

    @property
    def mask_set(self) -> MaskSet:
        return self._network.masks

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool tensor, True where the weight is active. It changes in place; do not write to it."""
        return self._network.masks

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The method's plan for each weight: its pattern, and why it stays dense where it does."""
        return self._network.layers

    @property
    def left_out(self) -> Mapping[str, str]:
        """Names of weights that could have masks but have none, and why."""
        return self._network.left_out

    @property
    def masks_final(self) -> bool:
        """Whether the masks will not change any more and the target sparsity is reached."""
        ended = self._frozen and self.step >= self._total_steps
        return ended or self._final(self._combined, self.step)

    def masks_final_after(self, step: int) -> bool:
        """Whether the masks will be final once `step` steps are taken; False where the method cannot tell."""
        return self._final(self.method, step)

    @property
    def history(self) -> MaskHistory | None:
        """What happened to the masks since `watch`."""
        return self._network.history

    def watch(self, film: str | None = None) -> MaskHistory:
        """Follow the masks from now on: churn, survival ages, gradients of inactive weights, frames of one mask.

        It costs 2 bytes for each active weight. The state carries it on: who is watched already, or was when the state
        was saved that this Sparsifier goes on from, keeps that history.

        Args:
            film: name of the layer to keep frames of; by default one of the sparse layers with most active weights.

        Raises:
            ModelError: there is no layer of the name `film`.
        """
        history = self._network.history
        if history is None or not (film is None or (history.film is not None and history.film.layer == film)):
            history = self._network.history = MaskHistory(self.mask_set, self.step, film)
        return history

    @property
    def snapshots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Earlier states of the model that the method kept as a second result: kind -> state dict."""
        return self._network.snapshots

    def lr_scale(self, step: int) -> float | None:
        """The learning rate of `step` as a multiple of the optimizer's first one; None where the loop decides.

        The Sparsifier sets it for the step and puts the loop's back; loops may log it. Steps beyond the whole training
        have that of its last one.
        """
        return self._combined.lr_scale(self._network, self._within_stage(min(step, self._total_steps)))

    def transform_batch(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For methods and modifiers that train on other batches than they get: call it before each forward pass."""
        return self._combined.transform_batch(self._network, self._model, inputs, labels, self._next_step)

    def batch_loss(self, inputs: Tensor) -> Tensor | float:
        """For modifiers with a loss of their own: call it after each forward pass, and add it to the loop's loss.

        Args:
            inputs: of that pass.
        """
        loss = self._combined.batch_loss(self._network, inputs, self._observer.outputs, self._next_step)
        return 0.0 if loss is None else loss

    def on_epoch_end(self, epoch: int) -> None:
        """For loops that have epochs: call it after each (`epoch` from 0)."""
        with torch.no_grad():
            self._combined.on_epoch_end(self._network, epoch)

    def metrics(self) -> dict[str, Any]:
        """Sparsity, exploration rate, drop fraction and the density of each layer, as they are now."""
        with torch.no_grad():
            own = self._combined.metrics(self._network, self._within_stage(self.step))
        return {
            "sparsity": self.mask_set.sparsity,
            "exploration_rate": self.mask_set.exploration_rate(),
            "drop_fraction": 0.0,
            "density": self.mask_set.densities(),
            **own,
        }

    def follow(self, average: nn.Module) -> None:
        """Keep another copy of the model as sparse as the model: an exponential moving average of its weights.

        What is inactive becomes zero in the copy now and whenever the masks change, so that an average never holds
        anything of a dropped weight, and averaging zeros gives zeros in between. A grown weight starts at zero there
        as in the model. Save and load the average itself as without a Sparsifier.

        Args:
            average: `torch.optim.swa_utils.AveragedModel(model)`, a deep copy, or the like; on any device.

        Raises:
            ModelError: it lacks one of the masked weights, or the method computes with other weights than these.
        """
        if self._combined.stages > 1:
            raise ModelError(
                f"An average over {self._combined.stages} trainings, one after another, is one of different networks.",
                where="follow",
                advice="Train without an average of the weights (train.ema = 0).",
            )
        if self.method.transforms(self._network):
            raise ModelError(
                f"The method {self.method.name} computes with other weights than the model holds, so an average of "
                "what the model holds is not an average of the network.",
                where="follow",
                advice="Train without an average of the weights (train.ema = 0).",
            )
        with torch.no_grad():
            self._network.follow(same_weights(average, self._network.weights))

    def prepare_gradients(self) -> None:
        """Take the dense gradients now, and leave those of active weights only: call it before clipping gradients.

        Without it clipping works on the dense gradient, whose norm is mostly that of inactive weights, and the
        absolute bonus of DST-EE is compared with clipped gradients. It belongs between `backward` (with a `GradScaler`,
        `unscale_`) and the clipping, in every step. Without `unscale_` the step is an error, if it is one whose
        gradients the method uses.
        """
        self._take_gradients(scale=None)
        self._prepared = True

    def freeze(self) -> MaskSet:
        """End sparse training: let the method finish, zero inactive weights, leave the optimizer, return the masks."""
        with torch.no_grad():
            if not self._frozen:
                self._combined.finalize(self._network)
                self._network.samples = None
                self._frozen = True
            self._network.mask_weights()
            self._network.mask_copies()
        self._leave()
        if self.step == 0:
            log.warning("Fixed the masks before the optimizer that they belong to took any step.")
        elif not self.masks_final and self.step < self._total_steps:
            steps, sparsity = f"{self.step} of {self._total_steps}", f"{self.mask_set.sparsity:.2%}"
            log.warning(
                "Fixed the masks after step %s, before %s is done: %s sparse.", steps, self.method.name, sparsity
            )
        return self.mask_set

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit, beside the states of model and optimizer: tensors and plain values.

        Masks are bits, counters int16. Load it into a Sparsifier made with the same method for the same model.
        """
        return saved.of(self._network, self._combined, self.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Load the model and the optimizer after making the Sparsifier, not before.

        Where they are loaded first, give the state to the constructor instead.

        Raises:
            ArtefactError: the state is of another model or of other options; the message names the first difference.
        """
        saved.refuse_other(state, self._network, self._combined)
        saved.restore(state, self._network)
        self.step = int(state["step"])
        self._network.stage = self._stage_of(self.step + 1)
        self._expected_nonzero = dict(state["nonzero"])

    def local_state(self) -> dict[str, Any]:
        """What this process alone remembers, where several train together: beside `state_dict`, which all share."""
        return saved.local(self._network, self._combined.local_kinds)

    def load_local_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `local_state()` of the process of the same number, after `load_state_dict`."""
        saved.restore_memory(state, self._network)

    def _keep_local_gradients(self) -> list[Any]:
        """Follow the gradients of the weights as they leave the backward pass, before processes average them."""
        found = self._network.local_gradients

        def keep(name: str, gradient: Tensor) -> None:
            found[name] = found[name] + gradient if name in found else gradient.detach().clone()

        return [
            tensor.register_hook(partial(keep, name))  # type: ignore[no-untyped-call]
            for name, tensor in self._network.tensors.items()
            if tensor.requires_grad
        ]

    @property
    def _next_step(self) -> int:
        """The optimizer step to come, as methods count it."""
        return self._within_stage(self.step + 1)

    def _stage_of(self, step: int) -> int:
        """The stage that an optimizer step belongs to."""
        return min(max(step - 1, 0) // self._network.total_steps, self._combined.stages - 1)

    def _within_stage(self, step: int) -> int:
        return step - self._stage_of(step) * self._network.total_steps

    def _final(self, method: Method, step: int) -> bool:
        last = self._stage_of(step) == self._combined.stages - 1
        return last and method.masks_final(self._network, self._within_stage(step))

    def _end_step(self) -> None:
        """Go on to the next stage, where this step was the last of one."""
        if self._stage_of(self.step + 1) == self._network.stage:
            return
        self._combined.next_stage(self._network)
        if self.history is not None:
            self._network.history = MaskHistory(self.mask_set, self.step)

    def _forward_weights(self) -> ForwardWeights:
        network = self._network

        def transform(name: str, weight: Tensor, training: bool) -> Tensor:
            return self._combined.transform_weight(network, name, weight, self._next_step, training)

        return ForwardWeights(self._model, {name: network.weights[name] for name in self._transformed}, transform)

    def _take_place(self) -> None:
        """Two masks of one weight would leave what both keep: fewer weights than either says."""
        network = self._network
        for other in list(self._at_work):
            theirs = {id(other._network.weights[name].parameter) for name in other._network.layers}
            if other._network.optimizer is network.optimizer and any(
                id(network.weights[name].parameter) in theirs for name in network.layers
            ):
                other._leave()
                log.warning("Another Sparsifier of the same weights ends after its step %d.", other.step)
        self._at_work.add(self)

    def _warn_of_added(self, optimizer: Optimizer) -> None:
        self._groups, self._untrained = len(optimizer.param_groups), _untrained(optimizer)
        known = {*self._network.weights, *self._network.left_out}
        added = [name for name in maskable(self._model, optimizer) if name not in known]
        if added:
            log.warning(
                "%s: trained only since the Sparsifier was made, so dense and not counted. For a sparse one, make "
                "another Sparsifier once all are in the optimizer and none is frozen; it takes the place of this one.",
                ", ".join(map(repr, added)),
            )

    def _leave(self) -> None:
        self._at_work.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._observer.remove()
        for hook in self._local_hooks:
            hook.remove()
        if self._forward is not None:
            self._forward.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._stepping and within_step(self._optimizers):
            self._inner_steps += 1
            return None
        self._stepping, self._inner_steps = True, 0
        if len(optimizer.param_groups) != self._groups or any(each.requires_grad for each in self._untrained):
            self._warn_of_added(optimizer)
        self._put_lr_back(optimizer)  # a step that failed did not
        self._set_lr(optimizer)
        # args[0] is the optimizer itself; a closure computes the gradients only inside the step.
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._around(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._around(optimizer, args[1]), *args[2:]), kwargs
        # GradScaler leaves unscaling and skipping to optimizers that can do both themselves (fused ones).
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        self._skipped = found_inf is not None and bool(found_inf)
        if self._prepared:
            refuse_scaled(self._network, scale)
        elif not self._skipped:
            self._take_gradients(scale)
        if not self._skipped:
            self._call_before_step()
        self._take_owned(scale)
        return None

    def _around(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def masked_closure() -> Any:
            # An optimizer that calls it several times moves the weights in between.
            with torch.no_grad():
                self._network.mask_weights()
            self._prepared = False
            self._network.local_gradients.clear()
            try:
                loss = closure()
            except BaseException:
                self._put_lr_back(optimizer)
                raise
            if not self._prepared:
                self._take_gradients(scale=None)
            self._call_before_step()
            self._take_owned(scale=None)
            return loss

        return masked_closure

    def _set_lr(self, optimizer: Optimizer) -> None:
        scale = self.lr_scale(self.step + 1)
        if scale is not None:
            self._loop_lrs = [group.get("lr") for group in optimizer.param_groups]
            for group, base in zip(optimizer.param_groups, self._network.base_lrs, strict=False):
                lr = group.get("lr")
                group["lr"] = torch.full_like(lr, base * scale) if isinstance(lr, Tensor) else base * scale

    def _put_lr_back(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._loop_lrs, strict=False):
            group["lr"] = lr
        self._loop_lrs = []

    @torch.no_grad()
    def _take_gradients(self, scale: Tensor | None) -> None:
        """Keep the dense gradients if this step's update needs them, then mask those that the optimizer will see."""
        if self._expected_nonzero:
            saved.check_weights_were_loaded_last(self._network, self._expected_nonzero)
            self._expected_nonzero = {}
        network = self._network
        network.gradients.clear()
        gradients.complete(self._combined, network, self._transformed, self._next_step, scale)
        if self._combined.needs_gradients(network, self._next_step):
            for name in network.masks.counters:
                gradient = network.weights[name].parameter.grad
                if gradient is not None:
                    network.gradients[name] = gradient.clone() if scale is None else gradient / scale
        network.mask_gradients()

    @torch.no_grad()
    def _call_before_step(self) -> None:
        self._combined.before_step(self._network, self._next_step)

    @torch.no_grad()
    def _take_owned(self, scale: Tensor | None) -> None:
        """Keep the gradients of weights that the method moves, clipped or not, from the optimizer."""
        for name in self._combined.owned(self._network):
            parameter = self._network.weights[name].parameter
            if parameter.grad is not None:
                self._network.gradients[name] = parameter.grad if scale is None else parameter.grad / scale
                parameter.grad = None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inner_steps:
            self._inner_steps -= 1
            return
        self._stepping = self._prepared = False
        if not self._skipped:
            self.step += 1
            if self.history is not None:
                self.history.end_step(self._combined.computed(self._network))
            self._network.step_own()
            self._network.mask_weights()
            rounds = self.mask_set.rounds
            self._combined.after_step(self._network, self._within_stage(self.step))
            if self.mask_set.rounds > rounds:
                if self.history is not None:
                    self.history.end_round(self.step, self._network.gradients)
                if rounds % self._check_every == 0:
                    self._replicas.compare(self._network, self.step)
            self._end_step()
        self._put_lr_back(optimizer)
        self._network.gradients.clear()
        self._network.local_gradients.clear()


def _untrained(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"] if not each.requires_grad]
