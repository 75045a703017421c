"""What a Sparsifier needs of an optimizer: hooks that run once in each step, and all state, whoever keeps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sparsepipe.errors import ModelError

_HOOKED_STEP = Optimizer.profile_hook_step(Optimizer.step).__code__
"""Of the function that torch puts around the `step` of each class of optimizers: it calls the hooks."""


def without_wrapper(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of Fabric, Accelerate and the like, which show its state as theirs.

    An optimizer that keeps another one and state of its own, as Lookahead its slow weights, is none of these.

    Raises:
        ModelError: there is none.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        if isinstance(optimizer, Optimizer) and getattr(optimizer, "state", None) is not getattr(inner, "state", None):
            break
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ModelError(f"A Sparsifier needs a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    return optimizer


def let_hooks_run(optimizer: Optimizer) -> None:
    """Make each step call the hooks, where a subclass never called `Optimizer.__init__`, which sees to that.

    Raises:
        ModelError: something holds the `step` that calls none already, as a learning-rate schedule does.
    """
    kind = type(optimizer)
    hooked = getattr(kind.step, "hooked", False)
    if hooked and "_optimizer_step_post_hooks" in vars(optimizer):
        return
    if not hooked and "step" in vars(optimizer):
        raise ModelError(
            f"The step of this {kind.__name__} calls no hooks, and something has replaced it already.",
            where="optimizer",
            advice="Make the Sparsifier right after the optimizer, before a learning-rate schedule for it.",
        )
    # What torch itself does for optimizers that come out of a pickle, where `__init__` is not called either.
    Optimizer.__setstate__(optimizer, {"defaults": getattr(optimizer, "defaults", {})})


def within_step(optimizers: Sequence[Optimizer]) -> bool:
    """Whether a step of one of these is calling the present one: its base class's, or of one that it keeps."""
    frame, steps = sys._getframe(), 0
    while frame.f_back is not None and steps < 2:
        frame = frame.f_back
        steps += frame.f_code is _HOOKED_STEP and any(frame.f_locals.get("self") is each for each in optimizers)
    return steps == 2


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, and those that it keeps: Lookahead, sharpness-aware ones, ZeRO."""
    found = [optimizer]
    for each in found:
        found.extend(inner for inner in _inside(vars(each)) if not any(inner is known for known in found))
    return found


def states(optimizer: Optimizer) -> list[Mapping[Tensor, Any]]:
    """Parameter -> state, of the optimizer and of those that it keeps."""
    return [each.state for each in with_inner(optimizer)]


def is_preconditioner(value: Tensor) -> bool:
    """Whether state of the shape of a square weight is a matrix over its rows or columns, as of Shampoo and SOAP.

    These are symmetric with a positive diagonal, and not constant; what has an entry for each weight is both only by
    chance, or where it never changed.
    """
    if value.ndim != 2 or value.shape[0] != value.shape[1] or not bool((value.diagonal() > 0).all()):
        return False
    # One row and column say so of most, without copies of the whole matrix: they are a part of what is compared below.
    if 2**0.5 * float((value[0] - value[:, 0]).norm()) > 1e-3 * float(value.norm()):
        return False
    others = value - value.diagonal().diag()
    constant = bool((value == value[0, 0]).all())
    return bool(others.any()) and not constant and bool((others - others.T).norm() <= 1e-3 * others.norm())


def renew(optimizer: Optimizer) -> None:
    """Make all state what it is in an optimizer that was just built.

    That is none, for most: they make their state at the next step. What an optimizer keeps beside the state of another
    one are copies of the weights, as the slow weights of Lookahead, and become the weights as they are now.
    """
    found = with_inner(optimizer)
    for each in found:
        if not any(_inside(vars(each))):
            fresh = _fresh_state(each)
            each.state.clear()
            each.state.update(fresh)
        elif not any(each.state is other.state for other in found if other is not each):
            for parameter, state in each.state.items():
                for value in tensors_in(state):
                    if value.shape == parameter.shape and value.is_floating_point():
                        value.copy_(parameter)


def _fresh_state(optimizer: Optimizer) -> Mapping[Tensor, Any]:
    """What the constructor puts into the state, as that of Adagrad does."""
    try:
        return type(optimizer)([{**group} for group in optimizer.param_groups], **optimizer.defaults).state
    except Exception:  # one of another library may ask for anything
        return {}


def tensors_in(state: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def _inside(value: Any) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, Optimizer | list | tuple):
                yield from _inside(each)
