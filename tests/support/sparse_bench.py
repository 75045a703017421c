"""What the tests of sparse training share: a small network with its batches, optimizers, and a bench for one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.sparsifier import Sparsifier


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 6, 6, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


def dst_ee(**options: Any) -> DSTEE:
    return DSTEE(**{"sparsity": 0.8, "update_every": 4, "c": 0.01} | options)


def loss_of(model: nn.Module, step: int) -> Any:
    x, y = batch(step)
    return cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def inactive_are_positive_zero(model: nn.Module, sparsifier: Sparsifier) -> bool:
    weights = dict(model.named_parameters())
    return all(not weights[name].detach()[~mask].view(torch.int32).any() for name, mask in sparsifier.masks.items())


class Bench:
    """One linear layer whose gradients are given by hand."""

    def __init__(
        self,
        method: Method,
        shape: tuple[int, int],
        total_steps: int,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.01),
    ) -> None:
        torch.manual_seed(0)
        model = nn.Linear(shape[1], shape[0], bias=False)
        self.weight = model.weight
        self.optimizer = optimizer([model.weight])
        self.sparsifier = Sparsifier(model, self.optimizer, method, total_steps=total_steps)

    @property
    def mask(self) -> Tensor:
        return self.sparsifier.masks["weight"]

    @property
    def counters(self) -> Tensor:
        return self.sparsifier.mask_set.counters["weight"]

    def step(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.clone()
        self.optimizer.step()


class Noisy(torch.optim.Optimizer):
    """Moves every weight at random whatever its gradient: the worst that an optimizer can do to a mask."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                self.state[parameter]["average"] += torch.randn_like(parameter)
                parameter -= 0.01 * self.state[parameter]["average"]
                parameter.view(-1)[0] = -1.0
        return loss


class LionStyle(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(0.99).sub_(group["lr"] * (0.9 * momentum + 0.1 * parameter.grad).sign())
                momentum.lerp_(parameter.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True, weight_decay=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lion": LionStyle,
    "noisy": Noisy,
}
