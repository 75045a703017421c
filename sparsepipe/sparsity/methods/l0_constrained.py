"""L0 constrained: stochastic gates that meet a given density by a Lagrange multiplier (arXiv 2208.04425)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.network import Network

GAMMA, ZETA, TAU = -0.1, 1.1, 2 / 3
"""Of hard-concrete gates (Louizos et al., arXiv 1712.01312)."""
EPS = 1e-6


def gate(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    """z = clamp(sigm((ln u - ln(1 - u) + log_alpha) / tau) (zeta - gamma) + gamma, 0, 1); without noise the median."""
    logit = log_alpha if noise is None else log_alpha + torch.logit(noise, EPS)
    return (torch.sigmoid(logit / TAU) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def active(log_alpha: Tensor) -> Tensor:
    """P(z != 0) = 1 - sigm(tau ln(-gamma / zeta) - log_alpha)."""
    return 1 - torch.sigmoid(TAU * math.log(-GAMMA / ZETA) - log_alpha).clamp(EPS, 1 - EPS)


def mean(log_alpha: Tensor, nodes: int = 64) -> Tensor:
    """E z, the integral of P(z > t) = sigm(log_alpha - tau logit((t - gamma) / (zeta - gamma))) over [0, 1]."""
    total = torch.zeros_like(log_alpha)
    for node in range(nodes):
        level = ((node + 0.5) / nodes - GAMMA) / (ZETA - GAMMA)
        total += torch.sigmoid(log_alpha - TAU * math.log(level / (1 - level)))
    return total / nodes


class L0Constrained(Emergent):
    """Weights times hard-concrete gates; the expected density of the gates is constrained, not penalised.

        min over w, log_alpha  max over lambda >= 0   L + wd/2 sum P(z != 0) w^2 + sum_i lambda_i (density_i - target)

    Gradient descent on w and log_alpha, gradient ascent lambda <- max(0, lambda + dual_lr (density - target)). Training
    draws the gates; evaluation uses their medians, which `freeze` multiplies into the weights. Expected density comes
    within about 0.01 of the target where the training is long enough for the learning rates; the weights that are left
    are fewer, as a gate that is seldom open is closed in the median. Both are logged, and where each layer has its
    constraint, the highest expected density of one, `worst_expected_density`. `finish = "top-k"` meets the target
    exactly instead: it keeps the gates that are open most often, with their mean if the median is closed.

    Args:
        sparsity: 1 - the expected density of the gated layers.
        constraint: `model`, one for all layers together, or `layer`, one for each.
        gates: `unstructured`, one for each weight; `structured`, one for each input of a linear layer and for each
            output channel of a convolution.
        drop_init: probability p that gates begin with, log_alpha = ln((1 - p) / p); weights are divided by 1 - p.
        gate_lr: of Adam, on log_alpha.
        dual_lr: of lambda. Too small a one, or too few steps, leaves the density above the target.
        dual: `restart` sets lambda to 0 where the constraint holds (the paper's), `plain` does not, `nupi` is a PI
            controller: lambda <- max(0, lambda + dual_lr (e + kp (xi_t - xi_t-1))), xi the running mean of e.
        kp: of `nupi`.
        nu: share of the old mean in xi, of `nupi`.
        l2: wd.
        finish: `median`, or `top-k`, which `freeze` alone applies: until then evaluation uses the medians.
        limit: log_alpha stays in [-limit, limit]. The paper's ln 100 = 4.6 allows no density below 0.047.
        **shared: the options of `Emergent`.

    Raises:
        RecipeError: an option is out of range or of the wrong type, `limit` does not allow the target, or, in `attach`,
            no layer is left to the method.
    """

    name = "l0-constrained"

    def __init__(
        self,
        *,
        sparsity: float = 0.8,
        constraint: str = "model",
        gates: str = "unstructured",
        drop_init: float = 0.3,
        gate_lr: float = 0.1,
        dual_lr: float = 0.2,
        dual: str = "restart",
        kp: float = 10.0,
        nu: float = 0.9,
        l2: float = 0.0,
        finish: str = "median",
        limit: float = 10.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.sparsity = options.number("sparsity", sparsity, high=1, below=True)
        self.constraint = options.choice("constraint", constraint, ("model", "layer"))
        self.gates = options.choice("gates", gates, ("unstructured", "structured"))
        self.drop_init = options.number("drop_init", drop_init, low=1e-6, high=1, below=True)
        self.gate_lr = options.positive("gate_lr", gate_lr)
        self.dual_lr = options.positive("dual_lr", dual_lr)
        self.dual = options.choice("dual", dual, ("restart", "plain", "nupi"))
        self.kp = options.number("kp", kp)
        self.nu = options.number("nu", nu, high=1, below=True)
        self.l2 = options.number("l2", l2)
        self.finish = options.choice("finish", finish, ("median", "top-k"))
        self.limit = options.positive("limit", limit)
        lowest = float(active(torch.tensor(-self.limit)))
        if 1 - self.sparsity < lowest:
            raise RecipeError(
                f"With limit = {self.limit:g} the density cannot fall below {lowest:.2%}.",
                where="sparsity",
                advice="Raise 'limit', or lower 'sparsity'.",
            )

    def attach(self, network: Network) -> None:
        super().attach(network)
        if not self.sparse_layers(network):
            raise RecipeError(
                "'l0-constrained' has no layer to give gates: every one stays dense.",
                where="overrides",
                advice="Leave at least one layer to the method, or choose the method 'dense'.",
            )
        for name in self.sparse_layers(network):
            weight = network.weights[name].parameter
            noise = scores.random(weight.new_empty(self._gate_shape(network, name)), network.seed, name, 0)
            first = math.log((1 - self.drop_init) / self.drop_init) + 0.01 * torch.special.ndtri(noise.clamp(EPS))
            network.variables[name] = nn.Parameter(first.to(weight.dtype))
            weight.div_(1 - self.drop_init)
        network.own_optimizer = torch.optim.Adam(network.variables.values(), lr=self.gate_lr)
        zeros = {key: torch.zeros((), device=weight.device) for key in self._constraints(network)}
        for kind in ("multiplier", "violation", "mean"):
            network.memory[kind] = {key: value.clone() for key, value in zeros.items()}

    def transforms(self, network: Network) -> Collection[str]:
        return self.sparse_layers(network)

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        log_alpha = network.variables[name]
        noise = scores.random(log_alpha, network.seed, name, step) if training else None
        return weight * gate(log_alpha, noise).to(weight.dtype)

    def extra_loss(self, network: Network, step: int) -> Tensor | None:
        loss = next(iter(network.variables.values())).new_zeros(())
        for key, violation in self._violations(network).items():
            network.memory["violation"][key].copy_(violation.detach())
            loss = loss + network.memory["multiplier"][key] * violation
        if self.l2:
            for name, log_alpha in network.variables.items():
                weight = network.weights[name].parameter
                loss = loss + self.l2 / 2 * (active(log_alpha).detach() * weight.square()).sum()
        return loss

    def after_step(self, network: Network, step: int) -> None:
        for key, multiplier in network.memory["multiplier"].items():
            violation, mean = network.memory["violation"][key], network.memory["mean"][key]
            change = violation.clone()
            if self.dual == "nupi":
                before = mean.clone()
                mean.lerp_(violation, 1.0 if step == 1 else 1 - self.nu)
                change += self.kp * (mean - before) if step > 1 else 0
            multiplier.add_(self.dual_lr * change).clamp_(min=0)
            if self.dual == "restart" and violation < 0:
                multiplier.zero_()
        for log_alpha in network.variables.values():
            log_alpha.clamp_(-self.limit, self.limit)

    def effective(self, network: Network, name: str) -> Tensor:
        weight, log_alpha = network.weights[name].parameter, network.variables[name]
        median = gate(log_alpha, None)
        if "kept" in network.memory:
            median = torch.where(median > 0, median, mean(log_alpha)) * network.memory["kept"][name]
        return weight * median.to(weight.dtype)

    def finalize(self, network: Network) -> None:
        if self.finish == "top-k":
            layers = [[name] for name in network.variables] if self.constraint == "layer" else [[*network.variables]]
            network.memory["kept"] = {
                name: kept for names in layers for name, kept in self._top(network, names).items()
            }
        super().finalize(network)

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        expected = self._expected(network)
        figures = {**super().metrics(network, step), "expected_density": float(_together(network, expected))}
        if self.constraint == "layer":
            figures["worst_expected_density"] = max(float(density) for density in expected.values())
        return figures

    def describe(self) -> dict[str, Any]:
        rates = ("drop_init", "gate_lr", "dual_lr", "dual", "kp", "nu", "l2")
        own = ("sparsity", "constraint", "gates", *rates, "finish", "limit")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}

    def _gate_shape(self, network: Network, name: str) -> tuple[int, ...]:
        weight = network.weights[name]
        if self.gates == "unstructured":
            return weight.shape
        kept = 0 if weight.convolution != weight.transposed else 1
        return tuple(size if axis == kept else 1 for axis, size in enumerate(weight.shape))

    def _top(self, network: Network, names: list[str]) -> dict[str, Tensor]:
        """For each of the layers which gates are open most often, as many as come closest to the target together."""
        gates = [network.variables[name].detach() for name in names]
        order = torch.cat([each.flatten() for each in gates]).argsort(descending=True, stable=True)
        weights = [network.weights[name].parameter.numel() for name in names]
        sizes = torch.cat(
            [each.new_full((each.numel(),), size / each.numel()) for each, size in zip(gates, weights, strict=True)]
        )[order].double()
        wanted = round((1 - self.sparsity) * sum(weights))
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = sizes.cumsum(0) - sizes / 2 < wanted
        parts = torch.split(kept, [each.numel() for each in gates])
        return {name: part.reshape(each.shape) for name, part, each in zip(names, parts, gates, strict=True)}

    def _constraints(self, network: Network) -> list[str]:
        return list(network.variables) if self.constraint == "layer" else ["model"]

    def _violations(self, network: Network) -> dict[str, Tensor]:
        """Expected density - target, by constraint."""
        expected, target = self._expected(network), 1 - self.sparsity
        if self.constraint == "layer":
            return {name: density - target for name, density in expected.items()}
        return {"model": _together(network, expected) - target}

    def _expected(self, network: Network) -> dict[str, Tensor]:
        """Expected density of each layer."""
        return {name: active(log_alpha).mean() for name, log_alpha in network.variables.items()}


def _together(network: Network, expected: dict[str, Tensor]) -> Tensor:
    """Expected density of all gated layers together."""
    sizes = {name: network.weights[name].parameter.numel() for name in expected}
    return torch.stack([expected[name] * sizes[name] for name in expected]).sum() / sum(sizes.values())
