"""The state of a Sparsifier: what it holds, how a network takes it over, and which states are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from sparsepipe.errors import ArtefactError
from sparsepipe.sparsity.history import MaskHistory
from sparsepipe.sparsity.masks import unpack_mask
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.network import Network

KEYS = (
    *("step", "total_steps", "rounds", "seed", "method", "shapes"),
    *("masks", "counters", "averages", "reasons", "nonzero"),
    *("memory", "variables", "own_optimizer", "base_lrs", "snapshots"),
)
"""What every state holds."""


def of(network: Network, method: Method, step: int) -> dict[str, Any]:
    """Tensors and plain values: masks are bits, counters int16. They are copies."""
    masks, own = network.masks, network.own_optimizer
    return {
        "step": step,
        "total_steps": network.total_steps,
        "rounds": masks.rounds,
        "seed": network.seed,
        "method": method.describe(),
        "shapes": {name: list(shape) for name, shape in masks.shapes().items()},
        "masks": masks.pack(),
        "counters": {name: counter.clone() for name, counter in masks.counters.items()},
        "averages": {name: average.clone() for name, average in network.averages.items()},
        "memory": {kind: _copies(tensors) for kind, tensors in network.memory.items()},
        "variables": _copies(network.variables),
        "own_optimizer": None if own is None else deepcopy(own.state_dict()),
        "base_lrs": list(network.base_lrs),
        "snapshots": {kind: _copies(tensors) for kind, tensors in network.snapshots.items()},
        "reasons": dict(masks.reasons),
        "nonzero": {name: int(network.tensors[name].count_nonzero()) for name in masks.counters},
        "history": None if network.history is None else network.history.state_dict(),
    }


def restore(state: Mapping[str, Any], network: Network) -> None:
    """Give the network the masks, counters and averages of a state that `refuse_other` let pass."""
    tensors, masks = network.tensors, network.masks
    for name in masks.counters.keys() - state["counters"].keys():
        masks.make_dense(tensors[name], name)
    for name, counter in state["counters"].items():
        weight, mask = tensors[name], unpack_mask(name, state["masks"][name], tuple(state["shapes"][name]))
        masks.change(weight, name, mask.to(weight.device))
        masks.counters[name].copy_(counter)
    network.averages = {
        name: torch.empty_like(tensors[name], dtype=average.dtype).copy_(average)
        for name, average in state["averages"].items()
    }
    _restore_own(state, network)
    masks.reasons = dict(state["reasons"])
    masks.rounds = int(state["rounds"])
    network.seed = int(state["seed"])
    history = state.get("history")
    if network.history is not None or history is not None:
        network.history = MaskHistory(masks, int(state["step"]))
        if history is not None:
            network.history.load_state_dict(history)


@torch.no_grad()
def _restore_own(state: Mapping[str, Any], network: Network) -> None:
    """What the method keeps beside masks and averages."""
    device = next(iter(network.tensors.values())).device
    network.memory.clear()
    restore_memory(state["memory"], network)
    for name, value in state["variables"].items():
        network.variables[name].copy_(value)
    if network.own_optimizer is not None:
        network.own_optimizer.load_state_dict(state["own_optimizer"])
    network.snapshots = {
        kind: {name: value.to(device, copy=True) for name, value in tensors.items()}
        for kind, tensors in state["snapshots"].items()
    }
    network.base_lrs = [float(lr) for lr in state["base_lrs"]]


def local(network: Network, kinds: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Copies of the kinds of memory that are this process's own."""
    return {kind: _copies(network.memory[kind]) for kind in kinds if kind in network.memory}


@torch.no_grad()
def restore_memory(state: Mapping[str, Mapping[str, Tensor]], network: Network) -> None:
    """Let the network remember these kinds, in the place of what it had of them."""
    weights = network.tensors
    device = next(iter(weights.values())).device
    for kind, tensors in state.items():
        network.memory[kind] = {
            # A tensor of a weight's shape gets its layout, so that sums come out in the same order as before.
            name: torch.empty_like(weights[name], dtype=value.dtype).copy_(value)
            if name in weights and weights[name].shape == value.shape
            else value.to(device, copy=True)
            for name, value in tensors.items()
        }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def refuse_other(state: Mapping[str, Any], network: Network, method: Method) -> None:
    """Refuse what is no state, or that of another model, method or length of training.

    Raises:
        ArtefactError: the message names the first difference.
    """
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ArtefactError(
            f"It is not the state of a Sparsifier: there is no {', '.join(map(repr, missing))}.",
            where="sparsifier state",
            advice="Give what Sparsifier.state_dict() returned; model and optimizer have states of their own.",
        )
    shapes = {name: list(shape) for name, shape in network.masks.shapes().items()}
    for what, ours, theirs in (
        ("option", method.describe(), state["method"]),
        ("shape of", shapes, state["shapes"]),
    ):
        for key in [*theirs, *ours]:
            if ours.get(key) != theirs.get(key):
                raise ArtefactError(
                    f"The checkpoint was made with another {what} '{key}': "
                    f"{theirs.get(key, 'none')} there, {ours.get(key, 'none')} here.",
                    where="sparsifier state",
                    advice="Resume with the model and the recipe that the checkpoint was made with.",
                )
    if state["total_steps"] != network.total_steps:
        raise ArtefactError(
            f"The checkpoint was made with another 'total_steps': {state['total_steps']} there, "
            f"{network.total_steps} here. All schedules span these steps.",
            where="sparsifier state",
            advice=f"Make the Sparsifier with total_steps={state['total_steps']}. To go on with other schedules on "
            "purpose, put the new number into state['total_steps'].",
        )


def check_weights_were_loaded_last(network: Network, expected: Mapping[str, int]) -> None:
    """Making a Sparsifier cuts the weights to its first masks, so weights loaded before that are spoilt.

    Args:
        network: with the masks of a state.
        expected: number of nonzero weights of each layer when the state was taken.

    Raises:
        ArtefactError: fewer than half of them are there.
    """
    for name, count in expected.items():
        found = int((network.tensors[name] * network.masks[name]).count_nonzero())
        if found < count // 2:
            raise ArtefactError(
                f"Only {found} of {count} weights are left in '{name}': the model was loaded too early.",
                where="sparsifier state",
                advice="Make the Sparsifier first, then load the model, the optimizer and the Sparsifier.",
            )


def check_weights_are_loaded(network: Network) -> None:
    """Weights that were saved with the state are zero wherever its masks are.

    Raises:
        ArtefactError: some are not.
    """
    for name in network.masks.counters:
        found = int((network.tensors[name] * ~network.masks[name]).count_nonzero())
        if found:
            raise ArtefactError(
                f"{found} weights of '{name}' are not zero although the state says that they are inactive.",
                where="sparsifier state",
                advice="Load model and optimizer from the same checkpoint as the state, before making the "
                "Sparsifier with it.",
            )
