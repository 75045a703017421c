"""Masks chosen before training, against closed forms and definitions computed by other means."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sparse_bench import batch, network, sgd
from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.methods.grasp import GraSP
from sparsepipe.sparsity.methods.snip import SNIP
from sparsepipe.sparsity.methods.synflow import SynFlow
from sparsepipe.sparsity.sparsifier import Sparsifier


def quadratic(weight: Tensor, method: Any) -> Tensor:
    """The mask for L = 1/2 sum_j h_j w_j^2 with h = 1..6, so that g = h w and H g = h^2 w, all by hand."""
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    scales = torch.arange(1.0, 7.0).sqrt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.square().sum() / 2

    samples = [(torch.diag(scales), torch.zeros(6))]
    return Sparsifier(model, optimizer, method, total_steps=1, samples=samples, loss=loss).masks["weight"]


def test_snip_keeps_the_largest_products_of_weight_and_gradient() -> None:
    weight = torch.tensor([[3.0, -1.0, 1.5, 0.1, -1.3, 0.2]])  # h w^2: 9, 2, 6.75, 0.04, 8.45, 0.24
    assert quadratic(weight, SNIP(sparsity=0.5)).tolist() == [[True, False, True, False, True, False]]


def test_grasp_keeps_the_largest_w_h_g() -> None:
    weight = torch.tensor([[3.0, -1.0, 1.5, 0.1, -1.3, 0.9]])  # h^2 w^2: 9, 4, 20.25, 0.16, 42.25, 29.16
    mask = quadratic(weight, GraSP(sparsity=0.5, temperature=1.0))
    assert mask.tolist() == [[False, False, True, False, True, True]]


@pytest.mark.parametrize("make", [SNIP, GraSP, SynFlow])
def test_scoring_leaves_no_trace_but_the_masks(make: Any) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sparsifier = Sparsifier(
        model, sgd(model.parameters()), make(sparsity=0.9), total_steps=5, samples=[batch(0), batch(1)]
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        expected = before[name] * sparsifier.masks[name] if name in sparsifier.masks else before[name]
        assert torch.equal(value, expected)
    assert sparsifier.mask_set.nnz == 437
    with pytest.raises(RecipeError, match=r"samples=\[\(inputs, labels\)"):
        Sparsifier(model, sgd(model.parameters()), make(), total_steps=5)


def test_synflow_leaves_buffers_of_truth_values_alone() -> None:
    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("kept", torch.arange(8) < 5)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.kept

    torch.manual_seed(0)
    model = Gated()
    samples = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]
    method = SynFlow(sparsity=0.5)
    masks = Sparsifier(model, sgd(model.parameters()), method, total_steps=1, samples=samples).masks
    assert masks["weight"].sum(dim=1)[5:].tolist() == [0, 0, 0], "nothing flows through these outputs"


def test_snip_over_two_batches_is_that_of_their_mean_loss() -> None:
    masks = []
    for samples in ([batch(0), batch(1)], None):
        model = network().eval()  # batch statistics would depend on the split
        joined = samples or [tuple(torch.cat(each) for each in zip(batch(0), batch(1), strict=True))]
        sparsifier = Sparsifier(model, sgd(model.parameters()), SNIP(sparsity=0.9), total_steps=5, samples=joined)
        masks.append(torch.cat([mask.flatten() for mask in sparsifier.masks.values()]))
    assert (masks[0] == masks[1]).float().mean() > 0.998


def test_synflow_never_cuts_a_layer_off_where_one_round_by_gradient_does() -> None:
    """Its reason to exist: at 99.5% of a deep network of unequal widths every layer keeps some weights in a path."""
    torch.manual_seed(0)
    sizes = [32, 256, 8, 256, 8, 256, 4]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    samples = [(torch.randn(4, 32), torch.zeros(4, dtype=torch.int64))]
    sparsifier = Sparsifier(model, sgd(model.parameters()), SynFlow(sparsity=0.995), total_steps=1, samples=samples)
    assert sparsifier.mask_set.nnz == round(0.005 * sparsifier.mask_set.size)
    path = torch.ones(32, dtype=torch.float64)
    for mask in sparsifier.masks.values():
        path = mask.double() @ path
    assert path.sum() > 0, "something flows from the inputs to the outputs"
