"""Sparsity patterns: which weights are kept or dropped together, and what must hold in every row of a weight.

A pattern arranges a weight [O, I, *kernel] as rows of groups of elements, [R, G, S]. A mask keeps whole groups, and
the same number of groups in each row, so that one exact top-k per row serves every pattern.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from sparsepipe.errors import RecipeError

Shape = tuple[int, ...]


class Pattern(ABC):
    """How a weight [O, I, *kernel] is arranged as [R rows, G groups, S elements]."""

    @property
    def density(self) -> float | None:
        """Fraction of weights kept, where the pattern itself fixes it (N:M), else None."""
        return None

    @abstractmethod
    def misfit(self, shape: Shape) -> str | None:
        """Why a weight of this shape cannot have the pattern; None if it can."""

    @abstractmethod
    def fold(self, tensor: Tensor) -> Tensor:
        """Arrange [O, I, *kernel] as [R, G, S]."""

    @abstractmethod
    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        """Spread one value per group, [R, G], over the elements of a weight of this shape."""

    @abstractmethod
    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """(R, G, S) for a weight of this shape."""

    def fits(self, shape: Shape) -> bool:
        return self.misfit(shape) is None

    def scores(self, score: Tensor) -> Tensor:
        """Scores of groups [R, G]: the sum over the elements of each."""
        folded = self.fold(score)
        return folded.squeeze(-1) if folded.shape[-1] == 1 else folded.sum(-1)

    def rows(self, mask: Tensor) -> Tensor:
        """The groups [R, G] that an elementwise mask of this pattern keeps."""
        return self.fold(mask)[..., 0]


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight by itself: one row, in flat C order."""

    def misfit(self, shape: Shape) -> str | None:
        return None

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return 1, math.prod(shape), 1

    def fold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1, 1)

    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(shape)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of r consecutive output channels x c consecutive input channels; each kernel tap is a block of its own."""

    r: int
    c: int

    def __post_init__(self) -> None:
        if self.r < 1 or self.c < 1:
            raise RecipeError(f"A block must be at least 1x1, not {self}.", where="pattern")

    def misfit(self, shape: Shape) -> str | None:
        if shape[0] % self.r:
            return f"{shape[0]} output channels are not divisible by {self.r} ({self} blocks)"
        if shape[1] % self.c:
            return f"{shape[1]} input channels are not divisible by {self.c} ({self} blocks)"
        return None

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        size = self.r * self.c
        return 1, math.prod(shape) // size, size

    def fold(self, tensor: Tensor) -> Tensor:
        blocks = tensor.reshape(tensor.shape[0] // self.r, self.r, tensor.shape[1] // self.c, self.c, -1)
        return blocks.permute(0, 2, 4, 1, 3).reshape(1, -1, self.r * self.c)

    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        outputs, inputs = shape[0] // self.r, shape[1] // self.c
        blocks = rows.reshape(outputs, 1, inputs, 1, -1)
        return blocks.expand(outputs, self.r, inputs, self.c, -1).reshape(shape)

    def __str__(self) -> str:
        return f"{self.r}x{self.c}"


@dataclass(frozen=True)
class NM(Pattern):
    """n weights kept of every m consecutive input channels, at each output channel and kernel tap."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(f"N:M needs 0 < N < M, not {self}.", where="pattern")

    @property
    def density(self) -> float:
        return self.n / self.m

    def misfit(self, shape: Shape) -> str | None:
        if shape[1] % self.m:
            return f"{shape[1]} input channels are not divisible by {self.m} ({self})"
        return None

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return math.prod(shape) // self.m, self.m, 1

    def fold(self, tensor: Tensor) -> Tensor:
        runs = tensor.reshape(tensor.shape[0], tensor.shape[1] // self.m, self.m, -1)
        return runs.transpose(2, 3).reshape(-1, self.m, 1)

    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        runs = rows.reshape(shape[0], shape[1] // self.m, -1, self.m)
        return runs.transpose(2, 3).reshape(shape)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels."""

    def misfit(self, shape: Shape) -> str | None:
        return None

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return 1, shape[0], math.prod(shape[1:])

    def fold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, tensor.shape[0], -1)

    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class ConstantFanIn(Pattern):
    """Any weights, but the same number in every output channel (SRigL, arXiv 2305.02299)."""

    def misfit(self, shape: Shape) -> str | None:
        return None

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return shape[0], math.prod(shape[1:]), 1

    def fold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, 1)

    def unfold(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(shape)

    def __str__(self) -> str:
        return "constant-fan-in"


_NAMED: dict[str, Pattern] = {str(pattern): pattern for pattern in (Unstructured(), Channel(), ConstantFanIn())}


def parse(text: str | Pattern) -> Pattern:
    """Read a pattern as `str(pattern)` writes it: unstructured, 4x1, 2:4, channel, constant-fan-in.

    Raises:
        RecipeError: any other text; the message lists the forms.
    """
    if isinstance(text, Pattern):
        return text
    if isinstance(text, str):
        if text in _NAMED:
            return _NAMED[text]
        if sizes := re.fullmatch(r"([0-9]+)([x:])([0-9]+)", text):
            first, second = int(sizes[1]), int(sizes[3])
            return Block(first, second) if sizes[2] == "x" else NM(first, second)
    raise RecipeError(
        f"There is no pattern {text!r}.",
        where="pattern",
        advice="Patterns are unstructured, RxC (blocks, as 4x1), N:M (as 2:4), channel and constant-fan-in.",
    )
