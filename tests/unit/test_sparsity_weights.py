"""Weights that cannot be masked are refused, or left dense, by their name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.parametrizations import weight_norm  # noqa: E402

from sparsepipe.errors import ModelError  # noqa: E402
from sparsepipe.sparsity.methods.dst_ee import DSTEE  # noqa: E402
from sparsepipe.sparsity.methods.static import Static  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402


class Packed(torch.Tensor):
    """A tensor of another kind, as quantisation libraries put in the place of weights."""

    @staticmethod
    def __new__(cls, values: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def on_meta(model: Any) -> None:
    model[2].to("meta")


def packed(model: Any) -> None:
    model[2].weight = nn.Parameter(Packed(model[2].weight.detach()))


def complex_numbers(model: Any) -> None:
    model[2].to(torch.complex64)


def eight_bits(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.float8_e4m3fn))


def compressed(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse_csr())


def partitioned(model: Any) -> None:
    model[2].weight = nn.Parameter(torch.empty(0))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (on_meta, "has no memory yet.*to_empty"),
        (packed, "is a Packed, not an ordinary tensor.*quantise what is trained"),
        (complex_numbers, "consists of complex64"),
        (eight_bits, "consists of float8_e4m3fn"),
        (compressed, "has the memory layout sparse_csr"),
        (partitioned, r"has the shape \(0,\).*DistributedDataParallel"),
    ],
)
def test_unusual_weights_are_refused_by_name_before_anything_is_masked(
    change: Callable[[Any], None], said: str
) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    change(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(ModelError, match=rf"'2\.weight' {said}"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), DSTEE(), total_steps=1000)
    assert torch.equal(model[0].weight, before)


def test_weights_of_integers_are_not_trained_and_therefore_left_as_they_are() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight"]
    assert sparsifier.mask_set.nnz == 32


def test_a_computed_weight_is_left_dense_with_a_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), weight_norm(nn.Linear(8, 4)))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.5), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight"]
    assert [record.message for record in caplog.records if "'2.weight' is computed anew" in record.message]
