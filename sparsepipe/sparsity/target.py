"""What a method aims at: sparsity, distribution, pattern and per-layer overrides, turned into exact counts."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.distribution import DISTRIBUTIONS, NAMES, apportion, global_magnitude, proportional
from sparsepipe.sparsity.pattern import Pattern, Shape, Unstructured, parse
from sparsepipe.sparsity.weights import Weight

log = logging.getLogger("sparsepipe")

OVERRIDE_KEYS = ("layers", "sparsity", "pattern", "dense")
GIVEN = "given"
"""The name of a distribution that is a table of relative densities."""


@dataclass(frozen=True)
class Override:
    """Settings of the layers whose name matches a glob."""

    layers: str
    sparsity: float | None = None
    pattern: Pattern | None = None
    dense: bool = False

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Override:
        """Read `{layers = "*.conv1", sparsity = 0.5}` and its like.

        Raises:
            RecipeError: an unknown key, no `layers`, a value out of range, or nothing to override.
        """
        for key in table:
            if key not in OVERRIDE_KEYS:
                raise RecipeError(f"Unknown key '{key}'; allowed: {', '.join(OVERRIDE_KEYS)}.", where="overrides")
        layers, dense = table.get("layers"), table.get("dense", False)
        if not isinstance(layers, str) or not isinstance(dense, bool) or len(table) < 2:
            raise RecipeError(
                f"{dict(table)} is not an override.",
                where="overrides",
                advice='Examples: {layers = "*.conv1", sparsity = 0.5}, {layers = "head", dense = true}.',
            )
        sparsity = pattern = None
        if "sparsity" in table:
            sparsity = options.number("overrides.sparsity", table["sparsity"], high=1, below=True)
        if "pattern" in table:
            pattern = parse(table["pattern"])
        return cls(layers, sparsity, pattern, dense)

    def matches(self, name: str) -> bool:
        return _matches(self.layers, name)


@dataclass(frozen=True)
class Layer:
    """What one weight is to become. Its mask has `rows` rows of `groups` groups of `size` weights."""

    name: str
    shape: Shape
    pattern: Pattern
    rows: int
    groups: int
    size: int
    density: float | None
    """Density from an override or from the pattern itself; None where the distribution decides."""
    dense_because: str | None
    """Why it keeps everything, whatever the distribution says."""
    misfit: bool = False
    """Whether that is because its shape cannot have the pattern asked for."""

    @property
    def unit(self) -> int:
        """Weights gained by keeping one group more in each row."""
        return self.rows * self.size


@dataclass(frozen=True)
class Target:
    """Sparsity over all maskable weights that no override settles, and how it is spread over them."""

    sparsity: float
    distribution: str
    relative_densities: tuple[tuple[str, float], ...]
    """Globs and relative densities of the distribution `given`; the first match wins."""
    pattern: Pattern
    overrides: tuple[Override, ...]
    first_conv: str
    last_linear: str

    @classmethod
    def of(
        cls,
        sparsity: float,
        distribution: str | Mapping[str, float],
        pattern: str | Pattern,
        overrides: Iterable[Mapping[str, Any]],
        first_conv: str = "auto",
        last_linear: str = "sparse",
    ) -> Target:
        """Check the options that methods share; `TargetMethod` says what they mean.

        Raises:
            RecipeError: an option is out of range or of the wrong type, or contradicts the pattern.
        """
        listed = isinstance(overrides, Iterable) and not isinstance(overrides, Mapping | str)
        entries = tuple(overrides) if listed else ()
        if not listed or not all(isinstance(entry, Mapping) for entry in entries):
            raise RecipeError("'overrides' must be a list of tables.", where="overrides")
        given = distribution if isinstance(distribution, Mapping) else {}
        target = cls(
            options.number("sparsity", sparsity, high=1, below=True),
            GIVEN if given else _named(distribution),
            tuple((str(glob), options.positive(f"distribution.{glob}", value)) for glob, value in given.items()),
            parse(pattern),
            tuple(Override.read(entry) for entry in entries),
            options.choice("first_conv", first_conv, ("auto", "dense", "sparse")),
            options.choice("last_linear", last_linear, ("dense", "sparse")),
        )
        _refuse_contradiction(target.pattern, target.sparsity)
        for override in target.overrides:
            if override.pattern is not None and override.sparsity is not None:
                _refuse_contradiction(override.pattern, override.sparsity)
        return target

    def plan(self, weights: Mapping[str, Weight]) -> dict[str, Layer]:
        """Decide for each weight its pattern and whether something other than the distribution settles its density.

        Raises:
            RecipeError: an override or an entry of the distribution matches no weight.
        """
        globs = [("overrides", override.layers) for override in self.overrides]
        for where, glob in [*globs, *(("distribution", glob) for glob, _ in self.relative_densities)]:
            if not any(_matches(glob, name) for name in weights):
                _refuse_unmatched(where, glob, weights)
        policies = self._policies(weights)
        return {name: self._layer(weight, policies.get(name)) for name, weight in weights.items()}

    def _policies(self, weights: Mapping[str, Weight]) -> dict[str, str]:
        """Layers that stay dense for their place in the network, unless an override settles their density, and why."""
        reasons = {}
        convolutions = [name for name, weight in weights.items() if weight.convolution]
        if convolutions and self.first_conv == "dense":
            reasons[convolutions[0]] = "first_conv = dense"
        elif convolutions and self.first_conv == "auto" and self.distribution == "uniform":
            reasons[convolutions[0]] = "uniform keeps the first convolution dense"
        linear = [name for name, weight in weights.items() if weight.linear]
        if linear and self.last_linear == "dense":
            reasons[linear[-1]] = "last_linear = dense"
        return reasons

    def _layer(self, weight: Weight, policy: str | None) -> Layer:
        override = next((entry for entry in self.overrides if entry.matches(weight.name)), Override("*"))
        pattern = override.pattern or self.pattern
        misfit = pattern.misfit(weight.shape)
        if weight.transposed and not isinstance(pattern, Unstructured):
            misfit = f"a transposed weight, [inputs, outputs], can only be unstructured, not {pattern}"
        density = pattern.density if override.sparsity is None else 1 - override.sparsity
        reason = None
        if override.dense:
            density, reason = 1.0, f"override '{override.layers}'"
        elif misfit:
            if override.pattern is not None or override.sparsity is not None:
                log.warning("'%s' stays dense in spite of the override '%s': %s.", weight.name, override.layers, misfit)
            density, reason = None, misfit
        elif policy and override.sparsity is None and (override.pattern is None or override.pattern.density is None):
            density, reason = None, policy
        if reason:
            pattern = Unstructured()
        fails = reason is not None and reason == misfit
        return Layer(weight.name, weight.shape, pattern, *pattern.grid(weight.shape), density, reason, fails)

    def kept(self, layers: Mapping[str, Layer], scores: Mapping[str, Tensor], progress: float = 1.0) -> dict[str, int]:
        """Groups that each row of each layer keeps.

        Args:
            layers: from `plan`.
            scores: elementwise magnitudes; read by the distribution `global` alone.
            progress: of a gradual method on its way from dense (0) to the target (1). For the same scores, no layer
                ever keeps more later on.

        Raises:
            RecipeError: the layers that must stay dense exceed the target or are all there are, or the distribution
                leaves a layer out.
        """
        free = {name: layer for name, layer in layers.items() if layer.density is None}
        dense = {name: layer.dense_because for name, layer in free.items() if layer.dense_because}
        if len(dense) == len(free) and self._settled_by_pattern(layers):
            densities = dict.fromkeys(free, 1.0)
        elif self.distribution == "global":
            grouped = {name: _mean_over_groups(scores[name], layer.pattern) for name, layer in free.items()}
            densities = global_magnitude(grouped, self.sparsity * progress, dense)
        else:
            shapes = {name: layer.shape for name, layer in free.items()}
            if self.distribution == GIVEN:
                relative = {name: self._relative_density(name) for name in shapes}
                densities = proportional(shapes, self.sparsity, dense, relative)
            else:
                densities = DISTRIBUTIONS[self.distribution](shapes, self.sparsity, dense)
        groups = {name: layer.groups for name, layer in layers.items()}
        shares = {name: density * groups[name] for name, density in densities.items() if name not in dense}
        final = apportion(shares, groups, {name: layer.unit for name, layer in free.items()})
        final |= {name: groups[name] for name in dense}  # whatever rounding, they never give a weight
        for name, layer in layers.items():
            if layer.density is not None:
                final[name] = max(1, round(layer.density * layer.groups))
        settled = free if self.distribution == "global" else {}
        return {
            name: final[name] if name in settled else final[name] + ceil((groups[name] - final[name]) * (1 - progress))
            for name in layers
        }

    def _settled_by_pattern(self, layers: Mapping[str, Layer]) -> bool:
        """Whether the pattern (N:M) gives layers their density: no distribution could make up for the others."""
        return self.pattern.density is not None and any(layer.pattern == self.pattern for layer in layers.values())

    def _relative_density(self, name: str) -> float:
        for glob, value in self.relative_densities:
            if _matches(glob, name):
                return value
        raise RecipeError(
            f"The distribution says nothing of '{name}'.",
            where="distribution",
            advice='End the table with an entry for all others: "*" = 1.0.',
        )


def _named(distribution: Any) -> str:
    if distribution in NAMES:
        return str(distribution)
    raise RecipeError(
        f"'distribution' must be one of {', '.join(NAMES)}, or a table of relative densities; not {distribution!r}.",
        advice='A table names layers by globs, and the first match wins: {"stem*" = 2.0, "*" = 1.0}.',
    )


def _matches(glob: str, name: str) -> bool:
    """Whether the glob fits a parameter's name, with or without its ending `.weight`."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def _mean_over_groups(score: Tensor, pattern: Pattern) -> Tensor:
    """Every element with the mean score of its group, so that groups of different sizes compare."""
    folded = pattern.fold(score)
    return folded.mean(-1, keepdim=True).expand_as(folded)


def _refuse_contradiction(pattern: Pattern, sparsity: float) -> None:
    if pattern.density is None:
        return
    implied = 1 - pattern.density
    if abs(implied - sparsity) > 1e-6:
        raise RecipeError(
            f"The pattern {pattern} fixes the sparsity at {implied:g}, but {sparsity:g} is asked for.",
            where="sparsity",
            advice=f"Set sparsity = {implied:g}, or choose another pattern.",
        )


def _refuse_unmatched(where: str, glob: str, weights: Mapping[str, Weight]) -> None:
    names = [name.removesuffix(".weight") for name in weights]
    close = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    raise RecipeError(f"No maskable layer is called '{glob}'.", where=where, advice=f"Close names: {', '.join(close)}.")
