"""BORT: branches of one network, trained one after another, whose features are orthogonal (arXiv 2208.08083)."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsepipe.errors import ModelError, RecipeError
from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.observation import Observer

log = logging.getLogger("sparsepipe")

BRANCH = "branch-"
"""How the kinds of snapshots begin that hold the branches which are not served; the number follows."""
FIRST = "bort first"
"""The kind of memory that holds the weights of before the training."""


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine between the features of two networks for the same batch: one number, in [0, 1].

    Both are taken behind a ReLU and flattened over the whole batch. Without the ReLU a loss drives the cosine to -1,
    features of opposite sign that say the same, and not to 0.
    """
    left, right = (features.float().relu().flatten() for features in (one, other))
    lengths: Tensor = left.norm() * right.norm()
    return torch.dot(left, right) / lengths.clamp(min=torch.finfo(torch.float32).tiny)


class Bort(Modifier):
    """Branch after branch, each with features orthogonal to those of the branches before it.

        L_b = L(f_b) + beta / b sum over i < b of cos(F_b, F_i)        b = 0, 1, ..., branches - 1

    F_i are the features that branch i has for the batch, behind a ReLU. The branches share a stem, which the first one
    trains. Each branch is a whole training of the method, with masks of its own, and is never changed afterwards. The
    stem stays dense and is not counted, because every branch would need another mask of it. The loop's loss is that of
    the paper where the batches are adversarial: `adversarial,bort` with `begin = 0` and `schedule = false` of
    `adversarial`.

    The network that is served is the last branch, alone; the others are kept as the snapshots `branch-0`, `branch-1`,
    ... Each of them begins with the first weights, shuffled within each tensor, which are as random as these were. Of
    its robustness only what an attack on the served branch leaves is a figure (white-box), and an attack on all
    branches together: what an attack on another branch leaves is higher, and says nothing.

    Args:
        branches: of the same size each.
        beta: weight of the orthogonality loss.
        stem: globs of the parts of the network that all branches share; by default all before the second layer with a
            weight that can be masked.
        features: the part whose output is F; by default the largest that begins with the second such layer.
        restart: each branch follows a cosine from the optimizer's first learning rate on; the loop's schedule is passed
            over. Without it the loop's schedule goes on over all branches.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
        ModelError: when the Sparsifier is made: there is no second layer, or no such part.
    """

    name: ClassVar[str] = "bort"

    def __init__(
        self,
        *,
        branches: int = 4,
        beta: float = 5.0,
        stem: Sequence[str] = (),
        features: str = "",
        restart: bool = True,
    ) -> None:
        self.stages = options.count("branches", branches)
        self.beta = options.number("beta", beta)
        if isinstance(stem, str) or not all(isinstance(glob, str) for glob in stem):
            raise RecipeError(f"'stem' must be a list of globs, not {stem!r}.", where="modifiers")
        self.stem = tuple(stem)
        self.features = features
        self.restart = options.flag("restart", restart)

    def describe(self) -> dict[str, Any]:
        own = {"beta": self.beta, "stem": list(self.stem), "features": self.features, "restart": self.restart}
        return {"branches": self.stages, **own}

    def begin_stage(self, network: Network) -> None:
        if network.stage == 0:
            network.memory[FIRST] = network.copy_of_model()
            shared = self._shared(network)
            stem = [name for name in network.weights if name in shared]
            network.leave_out(stem, "all branches share it")
            log.info("The branches share %s, which stays dense.", ", ".join(map(repr, stem)) or "no layer")
            return
        state, shared = network.model_tensors(), self._shared(network)
        common = {state[key].data_ptr() for key in shared}
        for key, first in network.memory[FIRST].items():
            if state[key].data_ptr() in common:
                continue
            if first.is_floating_point():
                order = scores.random(first.flatten(), network.seed, f"{self.name}/{key}", network.stage).argsort()
                first = first.flatten()[order].reshape(first.shape)
            state[key].copy_(first)

    def end_stage(self, network: Network) -> None:
        network.snapshot(_kind(network.stage))

    def lr_scale(self, network: Network, step: int) -> float | None:
        return (1 + math.cos(math.pi * (step - 1) / network.total_steps)) / 2 if self.restart else None

    def observed(self, network: Network) -> Collection[str]:
        return [self._features(network)]

    def batch_loss(self, network: Network, inputs: Tensor, outputs: Mapping[str, Tensor], step: int) -> Tensor | None:
        if network.stage == 0 or self.beta == 0:
            return None
        part = self._features(network)
        cosines = []
        for branch in range(network.stage):
            model = network.revived(_kind(branch))
            observer = Observer(model, [part])
            with torch.no_grad():
                model(inputs)
            observer.remove()
            cosines.append(cosine(outputs[part], observer.outputs[part]))
        return self.beta * torch.stack(cosines).mean()

    def after_step(self, network: Network, step: int) -> None:
        if network.stage:  # the stem as the first branch left it, whatever the optimizer made of it
            state, first = network.model_tensors(), network.snapshots[_kind(0)]
            for key in self._shared(network):
                state[key].copy_(first[key])

    def _shared(self, network: Network) -> list[str]:
        """What of the model's state belongs to the stem."""
        keys = list(network.model_tensors())
        if not self.stem:
            stem = _before_the_second(network)
            return [key for key in keys if key.rpartition(".")[0] in stem]
        for glob in self.stem:
            if not any(_within(key, glob) for key in keys):
                raise ModelError(f"'{glob}' matches no part of the model.", where="modifiers.bort.stem")
        return [key for key in keys if any(_within(key, glob) for glob in self.stem)]

    def _features(self, network: Network) -> str:
        if self.features:
            return self.features
        stem, second = _before_the_second(network), _layers(network)[1]
        path = second.split(".")
        outer = (".".join(path[:depth]) for depth in range(1, len(path) + 1))
        return next(part for part in outer if not any(each.startswith(f"{part}.") for each in stem))


def _kind(branch: int) -> str:
    return f"{BRANCH}{branch}"


def _within(key: str, glob: str) -> bool:
    return fnmatchcase(key, glob) or fnmatchcase(key, f"{glob}.*")


def _layers(network: Network) -> list[str]:
    """The modules with weights that can be masked, in the order of the model's definition.

    Raises:
        ModelError: there are fewer than two.
    """
    maskable = {*network.weights, *network.left_out}
    names = [name for name, _ in network.model.named_parameters() if name in maskable]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if len(layers) < 2:
        raise ModelError(
            "Branches share a stem and differ after it, but the model has one layer only.", where="modifiers.bort"
        )
    return layers


def _before_the_second(network: Network) -> list[str]:
    """The innermost modules that are defined before the second layer."""
    second = _layers(network)[1]
    leaves = [name for name, module in network.model.named_modules() if not any(module.children())]
    return leaves[: leaves.index(second)] if second in leaves else [_layers(network)[0]]
