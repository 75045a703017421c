"""The masks of a network, and how often each weight was active."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sparsepipe.errors import ArtefactError

Shape = tuple[int, ...]
COUNTER_LIMIT = torch.iinfo(torch.int16).max


class MaskSet(Mapping[str, Tensor]):
    """One bool mask per maskable weight, True where it is active; a mapping from parameter name to mask.

    A mask is stored at a fixed address and changes in place. A weight that never had an inactive element has no
    storage: its mask is a single True, expanded. For each stored mask there is a counter N of the rounds in which
    each element was active (int16, saturating), counted from the first mask on; N > 0 tells what was ever active.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        self.counters: dict[str, Tensor] = {}
        self.rounds = 0
        """Mask updates so far."""
        self.reasons: dict[str, str] = {}
        """Name -> why that layer is dense, for layers that are."""

    @classmethod
    def dense(cls, weights: Mapping[str, Tensor]) -> MaskSet:
        """Masks that keep everything."""
        return cls({name: _all_true(weight) for name, weight in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def start(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Begin with `masks`: only what they keep counts as having been active. Layouts are those of `weights`."""
        for name, mask in masks.items():
            self._masks[name] = torch.empty_like(weights[name], dtype=torch.bool).copy_(mask)
            self.counters[name] = self._masks[name].to(torch.int16)

    def change(self, weight: Tensor, name: str, mask: Tensor) -> None:
        """Give one weight another mask; a weight that was dense so far counts as active everywhere until now."""
        if name not in self.counters:
            self._masks[name] = torch.empty_like(weight, dtype=torch.bool)
            self.counters[name] = torch.ones_like(weight, dtype=torch.int16)
        self._masks[name].copy_(mask)

    def make_dense(self, weight: Tensor, name: str) -> None:
        """Take the mask from a weight, as if it never had one."""
        self._masks[name] = _all_true(weight)
        del self.counters[name]

    def count(self) -> None:
        """End a round of updates: N += mask."""
        self.rounds += 1
        for name, counter in self.counters.items():
            counter.add_(self._masks[name] & (counter < COUNTER_LIMIT))

    @property
    def nnz(self) -> int:
        """Number of active weights."""
        return sum(self.nnz_of(name) for name in self)

    def nnz_of(self, name: str) -> int:
        return int(self._masks[name].count_nonzero())

    @property
    def size(self) -> int:
        """Number of weights that have a mask, dense layers included."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of inactive weights over all maskable weights."""
        return (self.size - self.nnz) / self.size

    def densities(self) -> dict[str, float]:
        """Fraction of active weights of each layer."""
        return {name: self.nnz_of(name) / mask.numel() for name, mask in self.items()}

    def ever_active(self, name: str) -> Tensor:
        """Elements that were active in any round so far."""
        return self.counters[name] > 0 if name in self.counters else self._masks[name]

    def exploration_rate(self) -> float:
        """R = weights active at any time / all maskable weights, dense layers included (ITOP, arXiv 2102.02887)."""
        return sum(int(self.ever_active(name).count_nonzero()) for name in self) / self.size

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(mask.shape) for name, mask in self.items()}

    def pack(self) -> dict[str, Tensor]:
        """Each mask as bits: uint8 [ceil(size / 8)], flattened in C order, lowest bit first."""
        return {name: torch.from_numpy(pack_mask(mask)) for name, mask in self.items()}

    def digest(self) -> str:
        """`sha256:<hex>` of names, shapes and bits; equal for equal masks on any device."""
        hashed = hashlib.sha256(json.dumps(sorted(self.shapes().items())).encode())
        for name in sorted(self):
            hashed.update(pack_mask(self[name]).tobytes())
        return f"sha256:{hashed.hexdigest()}"


def unpack_mask(name: str, bits: Tensor, shape: Shape) -> Tensor:
    """A bool mask of `shape` from the bits that `MaskSet.pack` made.

    Raises:
        ArtefactError: the number of bytes does not fit the shape.
    """
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.ndim != 1 or bits.numel() != -(-size // 8):
        raise ArtefactError(
            f"A mask of shape {tuple(shape)} needs {-(-size // 8)} bytes (uint8), "
            f"but there are {bits.numel()} values ({bits.dtype}).",
            where=name,
        )
    flat = np.unpackbits(bits.cpu().numpy(), count=size, bitorder="little")
    return torch.from_numpy(flat).to(torch.bool).reshape(shape)


def pack_mask(mask: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A mask as bits: uint8 [ceil(size / 8)], flattened in C order, lowest bit first."""
    return np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little")


def _all_true(weight: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape)
