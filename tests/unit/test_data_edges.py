"""`edgelist:FILE`: reading graphs, holding edges out, features that know nothing of held-out edges, bad input."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import mmwrite
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sparsepipe.data import fingerprint, hold_out, load
from sparsepipe.data.edges import divide, read
from sparsepipe.data.embedding import adjacency, propagated, spectral
from sparsepipe.data.options import EdgeOptions
from sparsepipe.errors import DataError, RecipeError
from sparsepipe.ranking import roc_auc

Array = NDArray[Any]


def write(folder: Path, pairs: Any) -> Path:
    path = folder / "graph.txt"
    np.savetxt(path, pairs, fmt="%d")
    return path


def random_graph(nodes: int, probability: float | Array, seed: int) -> NDArray[np.int64]:
    """Edges [E, 2] of a graph in which each pair is joined with its own probability."""
    chosen = np.random.default_rng(seed).random((nodes, nodes)) < probability
    return np.argwhere(np.triu(chosen, 1))


def blocks(nodes: int, count: int, inside: float, between: float, seed: int) -> tuple[NDArray[np.int64], Array]:
    """Edges of a stochastic block model, and the block of each node."""
    block = np.arange(nodes) % count
    return random_graph(nodes, np.where(block[:, None] == block, inside, between), seed), block


def everything(split: Any) -> Array:
    return np.asarray(split.load(np.arange(len(split))))


def as_set(pairs: Array) -> set[tuple[int, ...]]:
    return {tuple(pair) for pair in pairs.tolist()}


def test_lines_and_matrices_hold_the_same_graph(tmp_path: Path) -> None:
    text = tmp_path / "graph.edges"
    text.write_text("% a comment\n7 3 1.5 1084\n# another\n3\t7\n3 3\n10 7\n")
    edges, nodes = read(text)
    assert edges.tolist() == [[0, 1], [1, 2]]  # 3-7 and 7-10
    assert nodes == 3
    mmwrite(tmp_path / "graph.mtx", coo_array((np.ones(3), ([6, 2, 9], [2, 2, 6])), shape=(12, 12)))
    again, count = read(tmp_path / "graph.mtx")
    assert again.tolist() == edges.tolist()
    assert count == 3


def test_parts_are_disjoint_and_a_held_out_edge_cuts_nothing_off() -> None:
    edges = random_graph(200, 0.06, seed=1)
    options = EdgeOptions(train_fraction=0.3, test_fraction=0.2)
    parts = divide(edges, 200, options, "")
    sides = {}
    for name, part, share in (("train", parts.train, 0.3), ("test", parts.test, 0.2)):
        positive, negative = part.pairs[part.labels == 1], part.pairs[part.labels == 0]
        assert len(positive) == len(negative) == round(share * len(edges))
        assert as_set(positive) <= as_set(edges)
        assert not as_set(negative) & as_set(edges)
        assert (part.pairs[:, 0] < part.pairs[:, 1]).all()
        sides[name] = as_set(part.pairs)
        assert len(sides[name]) == len(part.pairs)
    assert not sides["train"] & sides["test"]
    assert as_set(parts.graph) == as_set(edges) - sides["train"] - sides["test"]
    whole, left = (connected_components(adjacency(part, 200))[0] for part in (edges, parts.graph))
    assert whole == left
    np.testing.assert_array_equal(divide(edges, 200, options, "").test.pairs, parts.test.pairs)
    other = divide(edges, 200, options.model_copy(update={"seed": 1}), "")
    assert as_set(other.test.pairs) != sides["test"]


def test_negatives_have_the_degrees_of_the_edges_where_asked() -> None:
    """Of a star-like graph uniform pairs hardly touch the centre; pairs by degree do as often as edges do."""
    rng = np.random.default_rng(0)
    hubs = np.column_stack([rng.integers(0, 200, 9000), rng.integers(200, 6000, 9000)])
    edges = np.unique(np.concatenate([hubs, np.sort(rng.integers(0, 6000, (1000, 2)), axis=1)]), axis=0)
    edges = edges[edges[:, 0] != edges[:, 1]]
    shares = {}
    for kind in ("degree", "uniform"):
        part = divide(edges, 6000, EdgeOptions(negatives=kind), "").test
        touches = (part.pairs < 200).sum(axis=1)
        shares[kind] = touches[part.labels == 0].mean()
        edge_share = touches[part.labels == 1].mean()
    assert shares["degree"] == pytest.approx(edge_share, abs=0.1)
    assert shares["uniform"] < 0.1


def test_spectral_embedding_is_that_of_dense_algebra() -> None:
    edges, _ = blocks(60, 3, 0.5, 0.05, seed=2)
    graph = adjacency(edges, 60)
    dense = graph.toarray()
    degrees = dense.sum(0) + dense.sum(0).mean()
    values, vectors = np.linalg.eigh(dense / np.sqrt(np.outer(degrees, degrees)))
    best = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    found = spectral(graph, 4)
    np.testing.assert_allclose(found @ found.T, 60 * best, atol=1e-4)
    assert (found[np.abs(found).argmax(axis=0), np.arange(4)] > 0).all()
    np.testing.assert_array_equal(found, spectral(graph, 4))


def test_propagation_is_that_of_dense_algebra() -> None:
    edges = random_graph(40, 0.2, seed=3)
    graph = adjacency(edges, 40)
    looped = graph.toarray() + np.eye(40)
    step = looped / np.sqrt(np.outer(looped.sum(0), looped.sum(0)))
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    expected = np.hstack([vectors, step @ vectors, step @ step @ vectors])
    np.testing.assert_allclose(propagated(graph, vectors, 2), expected, rtol=1e-5, atol=1e-6)


def test_samples_are_products_or_both_ends_of_the_same_vectors(tmp_path: Path) -> None:
    edges, _ = blocks(120, 3, 0.3, 0.03, seed=4)
    name = f"edgelist:{write(tmp_path, edges)}"
    products = load(name, {"dimensions": 4})
    ends = load(name, {"dimensions": 4, "features": "ends", "hops": 2})
    assert (products.input_shape, ends.input_shape) == ((4,), (24,))
    assert products.classes == ends.classes == ("no edge", "edge")
    both = everything(ends.test).reshape(-1, 2, 12)
    np.testing.assert_allclose(everything(products.test), both[:, 0, :4] * both[:, 1, :4], rtol=1e-6)
    # Either end is scaled in the same way, so their order cannot matter.
    assert ends.preprocessing.mean[:12] == ends.preprocessing.mean[12:]
    stacked = everything(ends.train).reshape(-1, 12)
    np.testing.assert_allclose(ends.preprocessing.std[:12], stacked.std(0, dtype=np.float64), rtol=1e-6)
    assert fingerprint(name, {"seed": 1}) != fingerprint(name)


def scores(samples: Array, labels: Array, tested: Array) -> Array:
    """Those of a linear classifier by least squares."""
    weights, *_ = np.linalg.lstsq(np.column_stack([samples, np.ones(len(samples))]), labels, rcond=None)
    return np.column_stack([tested, np.ones(len(tested))]) @ weights


def test_blocks_are_found_as_well_as_they_can_be(tmp_path: Path) -> None:
    """Whether both nodes are in one block is all that can be known, so the area is that of one threshold."""
    edges, _ = blocks(400, 4, 0.25, 0.01, seed=5)
    dataset = load(f"edgelist:{write(tmp_path, edges)}", {"dimensions": 4, "negatives": "uniform"})
    area = roc_auc(
        scores(everything(dataset.train), dataset.train.labels, everything(dataset.test)), dataset.test.labels
    )
    among_edges = 0.25 * 0.25 / (0.25 * 0.25 + 0.75 * 0.01)
    among_others = 0.25 * 0.75 / (0.25 * 0.75 + 0.75 * 0.99)
    assert area == pytest.approx(0.5 + (among_edges - among_others) / 2, abs=0.04)


@pytest.mark.parametrize("features", ["product", "ends"])
def test_in_a_graph_without_structure_nothing_is_predicted(tmp_path: Path, features: str) -> None:
    """Edges of a random graph are independent: the others say nothing of them, unless they leak into the features."""
    edges = random_graph(1500, 6 / 1500, seed=6)
    options = {"dimensions": 16, "features": features, "hops": 1}
    dataset = load(f"edgelist:{write(tmp_path, edges)}", options)

    def area(train: Array, test: Array) -> float | None:
        if features == "ends":
            train, test = (each[:, :16] * each[:, 32:48] for each in (train, test))
        return roc_auc(scores(train, dataset.train.labels, test), dataset.test.labels)

    honest = area(everything(dataset.train), everything(dataset.test))
    assert honest == pytest.approx(0.5, abs=0.08)
    # The same, had held-out edges been in the graph: the test would notice.
    own, nodes = read(tmp_path / "graph.txt")
    parts = divide(own, nodes, EdgeOptions(), "")
    vectors = spectral(adjacency(own, nodes), 16)
    leaked = [vectors[part.pairs[:, 0]] * vectors[part.pairs[:, 1]] for part in (parts.train, parts.test)]
    found = roc_auc(scores(leaked[0], parts.train.labels, leaked[1]), parts.test.labels)
    assert found is not None
    assert found > 0.62


def test_features_depend_on_edges_of_the_graph_alone(tmp_path: Path) -> None:
    """Those of validation samples, too, which the training holds out later."""
    edges, _ = blocks(150, 3, 0.3, 0.03, seed=7)
    dataset = load(f"edgelist:{write(tmp_path, edges)}", {"dimensions": 4})
    own, nodes = read(tmp_path / "graph.txt")
    parts = divide(own, nodes, EdgeOptions(dimensions=4), "")
    assert not as_set(parts.graph) & (as_set(parts.train.pairs) | as_set(parts.test.pairs))
    vectors = spectral(adjacency(parts.graph, nodes), 4)
    for split, part in ((dataset.train, parts.train), (dataset.test, parts.test)):
        np.testing.assert_array_equal(everything(split), vectors[part.pairs[:, 0]] * vectors[part.pairs[:, 1]])
    rest, held = hold_out(dataset.train, 0.2, seed=0)
    assert held.labels.mean() == pytest.approx(0.5, abs=0.01)
    assert rest.labels.mean() == pytest.approx(0.5, abs=0.01)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(8)
    values, labels = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in values[labels == 1] for b in values[labels == 0]]
    assert roc_auc(values, labels) == pytest.approx(np.mean(pairs))
    assert roc_auc(values, np.ones(60, int)) is None
    assert roc_auc(np.full(60, np.nan), labels) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a b\nc d\n", "cannot be read: .*two nodes in each line"),
        ("1\n2\n", "cannot be read"),
        ("1 1\n2 2\n", "no edge between two different nodes"),
        ("", "no edge between two different nodes"),
        ("1 2\n2 3\n3 4\n", "0 edges for training"),
        ("".join(f"{i} {i + 1}\n" for i in range(60)), "6 edges for training and 6 for the test .* of 60; 0 can"),
        ("".join(f"{i} {j}\n" for i, j in combinations(range(20), 2)), "of 38 pairs without an edge were found"),
    ],
    ids=["words", "one column", "loops", "empty", "tiny", "path", "complete"],
)
def test_bad_edge_lists_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "graph.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(f"edgelist:{path}", {"dimensions": 2})
    assert "graph.txt" in str(caught.value)


def test_bad_matrices_and_options(tmp_path: Path) -> None:
    (tmp_path / "graph.mtx").write_text("no matrix")
    with pytest.raises(DataError, match="cannot be read"):
        load(f"edgelist:{tmp_path}/graph.mtx")
    mmwrite(tmp_path / "graph.mtx", coo_array(([1.0], ([0], [2])), shape=(2, 3)))
    with pytest.raises(DataError, match="2x3; that of a graph is sparse and square"):
        load(f"edgelist:{tmp_path}/graph.mtx")
    mmwrite(tmp_path / "graph.mtx", np.eye(3))
    with pytest.raises(DataError, match="3x3 and dense"):
        load(f"edgelist:{tmp_path}/graph.mtx")
    path = write(tmp_path, random_graph(12, 0.6, seed=9))
    with pytest.raises(DataError, match=r"12 nodes.*16 dimensions"):
        load(f"edgelist:{path}")
    with pytest.raises(RecipeError, match="negatives"):
        load(f"edgelist:{path}", {"negatives": "hard"})
    with pytest.raises(DataError, match="no such file"):
        load("edgelist:absent.txt")
