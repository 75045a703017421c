"""Vectors for the nodes of a graph: its spectral embedding, and what graph convolutions spread over it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, diags_array, eye_array
from scipy.sparse.linalg import ArpackError, eigsh

from sparsepipe.data.split import IntArray
from sparsepipe.errors import DataError

Nodes = NDArray[np.float32]


def adjacency(edges: IntArray, nodes: int) -> csr_array:
    """The symmetric adjacency matrix [nodes, nodes] of edges [E, 2], each of which is there once."""
    half = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(nodes, nodes)).tocsr()
    return csr_array(half + half.T)


def spectral(graph: csr_array, dimensions: int) -> Nodes:
    """Spectral embedding: eigenvectors of the regularised normalised adjacency, scaled by the roots of their values.

    The matrix is (D + d I)^-1/2 A (D + d I)^-1/2 with the mean degree d (Qin and Rohe, arXiv 1309.4111). Without d its
    first eigenvectors would each single out one small, loosely connected set of nodes. The inner product of two rows is
    the best approximation of their entry of the matrix, times the number of nodes, so products of coordinates are
    features of a pair. The signs of eigenvectors are a matter of convention: here the entry of largest magnitude is
    positive.

    Args:
        graph: adjacency matrix [N, N].
        dimensions: of a node's vector, less than N.

    Returns:
        float32 [N, dimensions], the largest eigenvalue first.

    Raises:
        DataError: the eigenvectors were not found.
    """
    nodes = graph.shape[0]
    degrees = graph.sum(axis=1)
    matrix = _scaled(graph, degrees + degrees.mean())
    start = np.random.RandomState(0).standard_normal(nodes)  # ARPACK would draw another one each time
    try:
        values, vectors = eigsh(matrix, k=dimensions, which="LA", v0=start)
    except ArpackError as error:
        raise DataError(
            f"The eigenvectors of the graph were not found: {error}.",
            where="dimensions",
            advice="Ask for fewer dimensions.",
        ) from error
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(dimensions)]
    scale = np.sqrt(nodes * np.maximum(values, 0)) * np.sign(largest)
    return np.ascontiguousarray(vectors * scale, np.float32)


def propagated(graph: csr_array, vectors: Nodes, hops: int) -> Nodes:
    """[X, SX, ..., S^hops X] side by side, with S = (D + I)^-1/2 (A + I) (D + I)^-1/2 (arXiv 1609.02907, equation 2).

    A linear layer on these is a graph convolution that reaches so many hops (TAGConv, arXiv 1710.10370): S does not
    depend on weights, so what it does to the nodes' vectors can be done once, before training (SIGN, arXiv 2004.11198).

    Args:
        graph: adjacency matrix [N, N].
        vectors: X [N, d].
        hops: how often S is applied.

    Returns:
        float32 [N, (hops + 1) * d].
    """
    looped = csr_array(graph + eye_array(graph.shape[0]))
    matrix = _scaled(looped, looped.sum(axis=1))
    spread = [vectors.astype(np.float64)]
    for _ in range(hops):
        spread.append(matrix @ spread[-1])
    return np.hstack(spread).astype(np.float32)


def _scaled(matrix: csr_array, degrees: NDArray[Any]) -> csr_array:
    roots = diags_array(degrees**-0.5)
    return csr_array(roots @ matrix @ roots)
