"""Training steps to compare: dense, sparse by a `Sparsifier`, and sparse in ways that were rejected; and their memory.

The rejected ones are here for the comparison alone. They are what is usually written: masks that are applied one
tensor at a time, by multiplication into new tensors, in hooks of each tensor or to all of them after each step.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsepipe.errors import RecipeError
from sparsepipe.models import registry
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training import optimizers
from sparsepipe.training.device import threads

STEPS = 1_000_000
"""Of a training that never comes to its end."""
NEVER = STEPS - 1
"""As `update_every`: no update comes."""
STEPS_OF_A_CALL = {"cpu": 1, "cuda": 10}
"""A device that works by itself is waited for after some steps, as a training loop hardly ever does."""


Masking = Callable[..., Any]
Install = Callable[[nn.Module, Optimizer, Mapping[str, Tensor], Callable[[Masking], Masking]], None]


@contextmanager
def ready(device: str) -> Iterator[None]:
    """One CPU thread while the block runs.

    Raises:
        RecipeError: there is no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("There is no CUDA device here, or this PyTorch was built without CUDA.", where="--device")
    with threads(1):
        yield


class Steps:
    """A network in training on one batch; a call trains a few steps and waits for the device.

    Args:
        network: a name of `sparsepipe.models`, in its published size.
        batch: samples.
        optimizer: sgd or adamw, as recipes have them.
        device: cpu or cuda.
    """

    def __init__(self, network: str, batch: int, optimizer: str, device: str) -> None:
        torch.manual_seed(0)
        info = registry.MODELS[network]
        self.model = registry.create(network, input_shape=info.input_shape, classes=info.classes).to(device)
        self.optimizer = optimizers.create(
            optimizer,
            self.model,
            lr=1e-3,
            weight_decay=5e-4,
            momentum=0.9,
            nesterov=True,
            betas=(0.9, 0.999),
            decay_norms=False,
        )
        self.steps = STEPS_OF_A_CALL[device]
        self.masking: list[int] = []
        """Nanoseconds of CPU time that each step spent on masks."""
        self._inputs = torch.randn(batch, *info.input_shape, device=device)
        self._labels = torch.randint(info.classes, (batch,), device=device)

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.masking.append(0)
            self.optimizer.zero_grad()
            loss: Any = functional.cross_entropy(self.model(self._inputs), self._labels)
            loss.backward()
            self.optimizer.step()
        if self._inputs.is_cuda:
            torch.cuda.synchronize()


class SparseSteps(Steps):
    """The same with DST-EE.

    Args:
        sparsity: fraction of zeros.
        update_every: steps from one mask update to the next; 1 makes every step an update.
        **setting: the arguments of `Steps`.
    """

    def __init__(self, sparsity: float, update_every: int, **setting: Any) -> None:
        super().__init__(**setting)
        self._register(self._begin)
        method = DSTEE(sparsity=sparsity, update_every=update_every, stop_at=1.0)
        self.sparsifier = Sparsifier(self.model, self.optimizer, method, total_steps=STEPS)
        self._register(self._end)

    @property
    def weights(self) -> int:
        """Number of weights that may be masked."""
        return self.sparsifier.mask_set.size

    @property
    def mask_bytes(self) -> int:
        """What masks and counters hold."""
        masks = self.sparsifier.mask_set
        return sum(tensor.untyped_storage().nbytes() for tensor in (*masks.values(), *masks.counters.values()))

    def _register(self, hook: Callable[..., None]) -> None:
        self.optimizer.register_step_pre_hook(hook)
        self.optimizer.register_step_post_hook(hook)

    def _begin(self, *arguments: Any) -> None:
        self.masking[-1] -= time.thread_time_ns()

    def _end(self, *arguments: Any) -> None:
        self.masking[-1] += time.thread_time_ns()


class RejectedSteps(Steps):
    """The same with fixed masks that a rejected implementation applies; it never updates them, in its favour.

    Args:
        install: makes it work for a model, an optimizer and masks by the names of parameters; each of its functions
            that do the work goes through the decorator that it gets.
        sparsity: fraction of zeros.
        **setting: the arguments of `Steps`.
    """

    def __init__(self, install: Install, sparsity: float, **setting: Any) -> None:
        super().__init__(**setting)
        method = Static(sparsity=sparsity)
        unused = torch.optim.SGD(self.model.parameters())
        masks = Sparsifier(self.model, unused, method, total_steps=STEPS).mask_set
        install(self.model, self.optimizer, {name: masks[name] for name in masks.counters}, self._timed)

    def _timed(self, function: Masking) -> Masking:
        def timed(*arguments: Any) -> Any:
            before = time.thread_time_ns()
            result = function(*arguments)
            self.masking[-1] += time.thread_time_ns() - before
            return result

        return timed


def full_masking(
    model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor], timed: Callable[[Masking], Masking]
) -> None:
    """All gradients and weights times masks in bytes, into new tensors, at each step: jaxpruner, written in PyTorch.

    jaxpruner multiplies all parameters after each step, and the gradients with its option `is_sparse_gradients`.
    """
    pairs = [(model.get_parameter(name), mask.to(torch.uint8)) for name, mask in masks.items()]

    def mask_gradients(*arguments: Any) -> None:
        for weight, mask in pairs:
            assert weight.grad is not None
            weight.grad = weight.grad * mask

    @torch.no_grad()
    def mask_weights(*arguments: Any) -> None:
        for weight, mask in pairs:
            weight.data = weight * mask

    optimizer.register_step_pre_hook(timed(mask_gradients))
    optimizer.register_step_post_hook(timed(mask_weights))


def tensor_hooks(
    model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor], timed: Callable[[Masking], Masking]
) -> None:
    """A hook of each module multiplies its weight by a float mask before the forward pass, and one its gradient."""
    for name, mask in masks.items():
        owner = name.rpartition(".")[0]
        weight: Any = model.get_parameter(name)
        factor = mask.to(torch.float32)

        @torch.no_grad()
        def mask_weight(*arguments: Any, weight: Tensor = weight, factor: Tensor = factor) -> None:
            weight.data = weight * factor

        def mask_gradient(gradient: Tensor, factor: Tensor = factor) -> Tensor:
            return gradient * factor

        model.get_submodule(owner).register_forward_pre_hook(timed(mask_weight))
        weight.register_hook(timed(mask_gradient))


REJECTED: Mapping[str, Install] = {
    "full masking": full_masking,
    "tensor hooks": tensor_hooks,
}


def peak_bytes(steps: Steps) -> int:
    """The most memory that the tensors of one call take at any moment, beside those that were there before it.

    On the CPU these are the tensors that operations return; what an operation takes for itself is not seen.
    """
    if next(steps.model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps()
        return int(torch.cuda.max_memory_allocated() - before)
    with _Allocations() as allocations:
        steps()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, from when they are returned until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in {storage._cdata: storage for storage in _storages(result)}.values():
            if storage._cdata not in given:  # else it is a view, or was written in place
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _free(self, size: int) -> None:
        self._live -= size


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
