"""Curvature of a loss: products with its Hessian, and the extreme eigenvalues that Lanczos' method finds from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def hessian_times(losses: Iterable[Tensor], tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """H v of a sum of losses, by a second backward pass through the first (Pearlmutter, 1994).

    Args:
        losses: scalars with graphs, each of which is freed before the next is asked for.
        tensors: what the losses are differentiated by; zero where a loss does not depend on one.
        vectors: v, of the shapes of `tensors`.
    """
    total = [torch.zeros_like(tensor) for tensor in tensors]
    for loss in losses:
        found = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        pairs = [(vector, each) for vector, each in zip(vectors, found, strict=True) if each is not None]
        along = torch.stack([(vector * each).sum() for vector, each in pairs]).sum()
        if not along.requires_grad:  # linear in all of them
            continue
        second = torch.autograd.grad(along, tensors, allow_unused=True)
        for product, each in zip(total, second, strict=True):
            if each is not None:
                product += each
    return total


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Approximate eigenpairs of a symmetric operator; those at both ends of the spectrum are found first.

    Every vector is orthogonalised against all before it, so that no eigenvalue is found twice.

    Args:
        product: v -> A v, [n] -> [n].
        start: of all eigenvectors that are wanted it has to hold some part; a random one does. float64 [n].
        steps: products at most.

    Returns:
        Values, ascending, [m], and vectors of length one, [m, n], with m <= min(steps, n): all of them exact where the
        steps exhausted what the start vector reaches.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        vector = product(basis[-1])
        diagonal.append(vector @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves errors of the size of the rounding times what was taken away
            vector = vector - known.T @ (known @ vector)
        length = vector.norm()
        scale = torch.stack([each.abs() for each in [*diagonal, *beside]]).max()
        if len(basis) == min(steps, start.numel()) or not length > 1e-7 * scale:
            break
        beside.append(length)
        basis.append(vector / length)
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.stack(beside)
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, rotations = torch.linalg.eigh(matrix)
    return values, rotations.T @ torch.stack(basis)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors as one vector in float64."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def separated(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `joined`, in the types of `like`."""
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
