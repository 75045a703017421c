"""`edgelist:FILE`: link prediction. Is there an edge between two nodes, as far as the rest of the graph tells?

The edges fall, at random, into three parts: those of the graph that features are computed from, and those that are
held out from it as positive samples of the training and of the test split. So no sample, nor a validation split that is
held out from the training split, has its own edge in its features. A random spanning forest always stays in the graph,
so that no node loses all that is known of it (node2vec, arXiv 1607.00653, section 4.4). Negative samples are as many
pairs without an edge, the same in every run with the same options.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import mmread
from scipy.sparse import coo_array, issparse
from scipy.sparse.csgraph import minimum_spanning_tree

from sparsepipe.data.dataset import Dataset, assemble
from sparsepipe.data.embedding import Nodes, adjacency, propagated, spectral
from sparsepipe.data.options import EdgeOptions
from sparsepipe.data.paths import existing, listing
from sparsepipe.data.preprocess import statistics
from sparsepipe.data.split import ArraySplit, IntArray
from sparsepipe.errors import DataError, one_line
from sparsepipe.spec import Preprocessing

CLASSES = ("no edge", "edge")
DRAWS = 100
"""Rounds in which pairs without an edge must be found."""


class EdgeList:
    """A Matrix Market file, or a text file with the numbers of two nodes in each line."""

    def load(self, name: str, argument: str, options: EdgeOptions) -> Dataset:
        edges, nodes = read(existing("file", argument))
        parts = divide(edges, nodes, options, argument)
        if options.dimensions >= nodes:
            raise DataError(
                f"The graph has {nodes} nodes, which is too few for vectors of {options.dimensions} dimensions.",
                where=argument,
            )
        graph = adjacency(parts.graph, nodes)
        vectors = spectral(graph, options.dimensions)
        if options.features == "product":
            return assemble(name, CLASSES, _products(vectors, parts.train), _products(vectors, parts.test))
        vectors = propagated(graph, vectors, options.hops)
        train, test = _ends(vectors, parts.train), _ends(vectors, parts.test)
        return Dataset(name, CLASSES, train, test, (2 * vectors.shape[1],), _statistics_of_ends(train))

    def identity(self, argument: str, options: EdgeOptions) -> object:
        path = existing("file", argument)
        return listing(path.parent, [path])


@dataclass(frozen=True)
class Samples:
    """Pairs of nodes: int64 [N, 2], and labels int64 [N], 1 where there is an edge."""

    pairs: IntArray
    labels: IntArray


@dataclass(frozen=True)
class Parts:
    """The edges that stay in the graph, int64 [E, 2], and the samples of both splits."""

    graph: IntArray
    train: Samples
    test: Samples


def read(path: Path) -> tuple[IntArray, int]:
    """The edges of a file and the number of nodes.

    Directions, weights, loops and repetitions are passed over, and nodes without an edge left out.

    Returns:
        int64 [E, 2] in ascending order, the smaller node first in each; nodes are numbered from 0 in the order of
        their numbers in the file.

    Raises:
        DataError: the file cannot be read, is no list of edges, or holds no edge.
    """
    try:
        pairs = _from_matrix(path) if path.suffix == ".mtx" else _from_lines(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"The file cannot be read: {one_line(error)}.",
            where=str(path),
            advice="It must be a Matrix Market file (.mtx), or text with the numbers of two nodes in each line.",
        ) from error
    pairs = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)
    if not len(pairs):
        raise DataError("The file holds no edge between two different nodes.", where=str(path))
    names, numbers = np.unique(pairs, return_inverse=True)
    return numbers.reshape(pairs.shape).astype(np.int64), len(names)


def _from_matrix(path: Path) -> IntArray:
    matrix = mmread(path)
    if not issparse(matrix) or matrix.shape[0] != matrix.shape[1]:
        raise DataError(
            f"The matrix is {'x'.join(map(str, matrix.shape))}{'' if issparse(matrix) else ' and dense'}; that of a "
            "graph is sparse and square.",
            where=str(path),
        )
    entries = coo_array(matrix)
    return np.column_stack([entries.row, entries.col]).astype(np.int64)


def _from_lines(path: Path) -> IntArray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an empty file, which is an error later
        return np.loadtxt(path, np.int64, comments=("#", "%"), usecols=(0, 1), ndmin=2)


def divide(edges: IntArray, nodes: int, options: EdgeOptions, where: str) -> Parts:
    """Which edges stay in the graph, which are held out, and as many pairs without an edge.

    Args:
        edges: int64 [E, 2], as `read` gives them.
        nodes: their number.
        options: fractions, seed and kind of negative samples.
        where: the file, for errors.

    Raises:
        DataError: edges outside of a spanning forest are too few, or pairs without an edge are.
    """
    # RandomState's streams are frozen; those of numpy's newer generators may change with the version.
    random = np.random.RandomState(options.seed)
    train, test = (round(fraction * len(edges)) for fraction in (options.train_fraction, options.test_fraction))
    free = random.permutation(np.flatnonzero(~_in_forest(edges, nodes, random)))
    if not 0 < train + test <= len(free) or not train or not test:
        raise DataError(
            f"{train} edges for training and {test} for the test are to be held out of {len(edges)}; {len(free)} can "
            "be without cutting the graph apart.",
            where=where,
            advice="Choose other fractions, or a graph with more edges.",
        )
    held = free[: train + test]
    ends = edges[held].ravel() if options.negatives == "degree" else np.arange(nodes)
    absent = _without_edge(len(held), ends, edges, nodes, random, where)
    stays = np.ones(len(edges), bool)
    stays[held] = False
    return Parts(
        edges[stays],
        _samples(edges[held[:train]], absent[:train]),
        _samples(edges[held[train:]], absent[train:]),
    )


def _in_forest(edges: IntArray, nodes: int, random: np.random.RandomState) -> NDArray[np.bool_]:
    """Whether each edge is in a random spanning forest: that of least weight, for weights in random order."""
    weights = random.permutation(len(edges)) + 1.0
    forest = minimum_spanning_tree(coo_array((weights, (edges[:, 0], edges[:, 1])), shape=(nodes, nodes)).tocsr())
    return np.isin(weights, forest.data)


def _without_edge(
    count: int, ends: IntArray, edges: IntArray, nodes: int, random: np.random.RandomState, where: str
) -> IntArray:
    """`count` different pairs without an edge, int64 [count, 2], both nodes drawn from `ends`, the smaller first."""
    known, found = edges @ [nodes, 1], np.empty(0, np.int64)
    for _ in range(DRAWS):
        pairs = np.sort(random.choice(ends, (2 * count, 2)), axis=1)
        codes = pairs[pairs[:, 0] != pairs[:, 1]] @ [nodes, 1]
        found = np.concatenate([found, codes[~np.isin(codes, known)]])
        _, first = np.unique(found, return_index=True)
        found = found[np.sort(first)]
        if len(found) >= count:
            return np.column_stack(np.divmod(found[:count], nodes))
    raise DataError(
        f"Only {len(found)} of {count} pairs without an edge were found: almost all nodes are joined.",
        where=where,
        advice="Hold out fewer edges, or choose negatives = 'uniform'.",
    )


def _samples(positive: IntArray, negative: IntArray) -> Samples:
    labels = np.repeat(np.array([1, 0], np.int64), [len(positive), len(negative)])
    return Samples(np.concatenate([positive, negative]), labels)


def _products(vectors: Nodes, samples: Samples) -> ArraySplit:
    """Products of the coordinates of both ends, [N, d]: the same whichever end comes first."""
    first, second = vectors[samples.pairs.T]
    return ArraySplit(first * second, samples.labels)


def _ends(vectors: Nodes, samples: Samples) -> ArraySplit:
    """The vectors of both ends side by side, [N, 2 d]."""
    return ArraySplit(vectors[samples.pairs].reshape(len(samples.pairs), -1), samples.labels)


def _statistics_of_ends(split: ArraySplit) -> Preprocessing:
    """The same mean and std for both ends, so that their order does not matter."""
    both = split.inputs.reshape(2 * len(split), -1)
    one = statistics(ArraySplit(both, np.repeat(split.labels, 2)), 1.0)
    return Preprocessing(mean=2 * one.mean, std=2 * one.std)


EDGE_LIST = EdgeList()
