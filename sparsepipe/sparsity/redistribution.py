"""Redistribution: how the weights dropped in an update are shared out among the layers that may trade them.

A rule gives each layer a share; `DropGrow` turns the shares into whole numbers of groups whose sum is exactly what was
dropped. Layers trade only with layers whose groups hold as many weights, so the total nnz is exact for any pattern, and
scores of groups compare between the layers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer


@dataclass(frozen=True)
class Turnover:
    """One layer in an update, after its drop and before its growth. Tensors are over groups, [R, G]."""

    layer: Layer
    active: Tensor
    """Groups that were active before the drop."""
    kept: Tensor
    """Those that the drop left."""
    free: Tensor
    """Groups that may grow before all others: inactive ones, with or without what was just dropped."""
    salience: Tensor
    """Drop scores of the active groups, flat; summed over each group: |w|, unless the method has another."""
    grow_score: Tensor
    """Summed over each group."""

    @property
    def dropped(self) -> Tensor:
        """Number of groups dropped in each row, int64 [R]."""
        return self.active.sum(dim=1) - self.kept.sum(dim=1)


Redistribution = Callable[[Sequence[Turnover]], list[float]]


def by_score(turnovers: Sequence[Turnover]) -> list[float]:
    """In proportion to the mean grow score of the active weights: with |momentum|, sparse momentum's rule (SNFS)."""
    return [float(each.grow_score[each.active].mean()) for each in turnovers]


def by_magnitude(turnovers: Sequence[Turnover]) -> list[float]:
    """In proportion to the mean drop score, |w|, of the active weights."""
    return [float(each.salience.mean()) for each in turnovers]


def by_nonzeros(turnovers: Sequence[Turnover]) -> list[float]:
    """In proportion to the weights that survived the drop: dynamic sparse reparameterization's rule (DSR)."""
    return [float(each.kept.sum()) for each in turnovers]


def by_growth(turnovers: Sequence[Turnover]) -> list[float]:
    """To where the free groups of highest grow score are in all the layers together."""
    scores = torch.cat([each.grow_score.reshape(1, -1) for each in turnovers], dim=1)
    free = torch.cat([each.free.reshape(1, -1) for each in turnovers], dim=1)
    total = torch.stack([each.dropped.sum() for each in turnovers]).sum().reshape(1)
    grown = top_k(scores, total.clamp(max=int(free.sum())), free)
    return [float(part.sum()) for part in torch.split(grown, [each.free.numel() for each in turnovers], dim=1)]


REDISTRIBUTIONS: dict[str, Redistribution] = {
    "score": by_score,
    "magnitude": by_magnitude,
    "nonzeros": by_nonzeros,
    "global": by_growth,
}
"""Rules by name, beside `none`: every layer grows as much as it dropped."""
