"""Hessian products and Lanczos against dense linear algebra, and directional pruning along flat directions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from digits_bench import accuracy, digits, fit
from sparse_bench import batch, network, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.curvature import hessian_times, joined, lanczos, separated
from sparsepipe.sparsity.methods.directional import Directional, StructuredDirectional
from sparsepipe.sparsity.sparsifier import Sparsifier


def test_hessian_products_are_those_of_the_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    names, tensors = zip(*model.named_parameters(), strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(names, separated(flat, tensors), strict=True))
        return cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, joined(tensors))
    vector = torch.randn(len(hessian), dtype=torch.float64)
    halves = (cross_entropy(model(x), y) / 2 for _ in range(2))
    found = joined(hessian_times(halves, tensors, separated(vector, tensors)))
    torch.testing.assert_close(found, hessian @ vector, rtol=1e-9, atol=1e-12)


def test_a_loss_without_curvature_has_none() -> None:
    weight, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    found = hessian_times([2 * weight.sum()], [weight, other], [torch.ones(3), torch.ones(2)])
    assert not torch.cat(found).any()


@pytest.mark.parametrize("size", [1, 2, 40, 400])
def test_lanczos_finds_both_ends_of_the_spectrum(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    spectrum = torch.randn(size, dtype=torch.float64, generator=generator)
    spectrum[:2] = torch.tensor([9.0, -7.0])[: min(size, 2)]
    matrix = rotation @ torch.diag(spectrum) @ rotation.T
    start = torch.rand(size, dtype=torch.float64, generator=generator) - 0.5
    values, vectors = lanczos(lambda vector: matrix @ vector, start, 60)
    exact = torch.linalg.eigvalsh(matrix)
    assert len(values) == min(size, 60)
    assert float(values[-1]) == pytest.approx(float(exact[-1]))
    assert float(values[0]) == pytest.approx(float(exact[0]))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix @ vectors[-1], values[-1] * vectors[-1], rtol=0, atol=1e-6)


def test_lanczos_ends_where_the_start_vector_reaches_nothing_new() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    values, _ = lanczos(lambda vector: matrix @ vector, torch.ones(4, dtype=torch.float64), 4)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    values, _ = lanczos(torch.zeros_like, torch.ones(4, dtype=torch.float64), 4)
    assert values.tolist() == [0.0]


def quadratic(method: Directional, hessian: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [rows, columns] that `freeze` leaves of a first point, for L = vec(W)^T H vec(W) / 2 / rows."""
    model = nn.Linear(first.shape[1], first.shape[0], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(first)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        flat = outputs.T.flatten()  # the inputs are a unit matrix
        return flat @ hessian @ flat / 2

    samples = [(torch.eye(first.shape[1], dtype=torch.float64), torch.zeros(1))]
    sparsifier = Sparsifier(model, optimizer, method, total_steps=4, samples=samples, loss=loss)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()  # v = w, and t = c
    sparsifier.freeze()
    return model.weight.detach(), sparsifier.masks["weight"]


@pytest.mark.parametrize("make", [Directional, StructuredDirectional])
@pytest.mark.parametrize("project", [1, 3])
def test_nothing_of_the_perturbation_is_left_along_the_steepest_directions(make: Any, project: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator))
    spectrum = torch.cat([torch.tensor([50.0, 40.0, 30.0]), torch.rand(45, generator=generator) * 0.1]).double()
    hessian = rotation @ torch.diag(spectrum) @ rotation.T
    first = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    options: dict[str, Any] = {"c": 0.9, "mu": 0.6, "last_linear": "sparse"}
    plain, mask = quadratic(make(**options), hessian, first)
    flat, same = quadratic(make(project=project, **options), hessian, first)
    assert torch.equal(mask, same)
    assert 0.2 < float(mask.double().mean()) < 0.9
    assert torch.equal(flat != 0, mask)
    steep = rotation[:, :project]
    moved, shrunk = (flat - first).flatten(), (plain - first).flatten()
    assert float((steep.T @ moved).abs().max()) < 1e-6 < float((steep.T @ shrunk).abs().max())
    # Of all such weights these are the nearest to those of the shrinking alone: the correction lies in span V_K.
    kept = mask.flatten()
    correction = (moved - shrunk)[kept]
    inside = steep[kept] @ torch.linalg.lstsq(steep[kept], correction).solution
    torch.testing.assert_close(inside, correction, rtol=0, atol=1e-6)


def test_a_projection_needs_samples_and_takes_them_at_the_end() -> None:
    model = network()
    with pytest.raises(RecipeError, match=r"samples=\[\(inputs, labels\)"):
        Sparsifier(model, sgd(model.parameters()), Directional(project=4), total_steps=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsifier = Sparsifier(
        model, sgd(model.parameters()), Directional(project=4), total_steps=5, samples=[batch(0), batch(1)]
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sparsifier.metrics()["sparsity"] == 0
    sparsifier.freeze()  # without a step there is no threshold, and nothing to shrink
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("make", "c", "least"), [(Directional, 0.03, 15.0), (StructuredDirectional, 0.02, 4.0)])
def test_on_digits_flat_directions_spare_points_that_the_shrinking_alone_costs(
    make: Any, c: float, least: float
) -> None:
    x, y, _, _ = digits()
    settings: dict[str, Any] = {"batch": 32, "cosine": False, "momentum": 0.0, "weight_decay": 0.0}
    model, sparsifier = fit(
        make(c=c, mu=0.55, project=20), epochs=30, sizes=(64, 64, 32, 10), samples=[(x, y)], **settings
    )
    trained, network = accuracy(model), sparsifier._network
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for name, hidden in network.memory["hidden"].items():
            threshold = float(network.memory["threshold"][f"{name} threshold"])
            alone.get_parameter(name).copy_(make().shrunk(network.weights[name], hidden, threshold))
    masks = sparsifier.freeze()
    assert all(torch.equal(alone.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert 0.2 < masks.sparsity < 0.9
    assert accuracy(model) >= accuracy(alone) + least
    assert accuracy(model) >= trained - 10
