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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("distribution", ["erk", "er", "uniform", "global"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_layer_without_weights_is_left_out(distribution: str, shape: tuple[int, int]) -> None:
    model: Any = nn.ModuleList([nn.Linear(8, 8), nn.Linear(*shape), nn.Linear(8, 4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.5, distribution=distribution), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]
    assert sparsifier.mask_set.nnz == 48


def test_a_computed_weight_is_left_dense_with_a_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), weight_norm(nn.Linear(8, 4)))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.5), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight"]
    assert [record.message for record in caplog.records if "'2.weight' is computed anew" in record.message]


@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_the_factors_of_a_weight_norm_in_a_recurrent_layer_stay_dense(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A zero in the lengths, or a row of zeros in the directions, would make the weight NaN."""
    torch.manual_seed(0)
    name = "weight_hh_l0" if kind is nn.LSTM else "weight_hh"
    model = nn.utils.weight_norm(kind(8, 16), name)
    sparsifier = trained(model, torch.randn(5, 8), lambda output: output[0])
    assert list(sparsifier.masks) == [name.replace("hh", "ih")]
    assert getattr(model, name).isfinite().all()
    assert f"'{name}' is computed anew" in caplog.text


def trained(model: Any, inputs: Any, read: Callable[[Any], Any], **options: Any) -> Sparsifier:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, DSTEE(sparsity=0.75, update_every=2, **options), total_steps=12)
    for _ in range(12):
        optimizer.zero_grad()
        read(model(inputs)).square().mean().backward()
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            assert not model.get_parameter(name).detach()[~mask].view(torch.int32).any()
    return sparsifier


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_masked_and_their_biases_are_not(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(12, 16, num_layers=2)
    sparsifier = trained(model, torch.randn(5, 3, 12), lambda output: output[0], pattern="4x1")
    assert list(sparsifier.masks) == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    assert sparsifier.mask_set.nnz == sparsifier.mask_set.size // 4
    for mask in sparsifier.masks.values():
        blocks = mask.reshape(-1, 4, mask.shape[1])
        assert torch.equal(blocks.any(1), blocks.all(1))


def test_weights_in_one_buffer_are_taken_and_those_over_each_other_refused() -> None:
    """cuDNN keeps the weights of a recurrent layer in one buffer."""
    buffer = torch.randn(2 * 64)
    for start, refused in ((64, False), (32, True)):
        model: Any = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[0].weight = nn.Parameter(buffer[:64].view(8, 8))
        model[1].weight = nn.Parameter(buffer[start : start + 64].view(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if refused:
            with pytest.raises(ModelError, match=r"'0\.weight' and '1\.weight' are different parameters in the same"):
                Sparsifier(model, optimizer, Static(sparsity=0.5), total_steps=1)
        else:
            assert Sparsifier(model, optimizer, Static(sparsity=0.5), total_steps=1).mask_set.nnz == 64


def test_the_layers_of_gpt2_are_masked_and_its_embeddings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with caplog.at_level("INFO", logger="sparsepipe"):
        sparsifier = trained(model, torch.arange(8)[None], lambda output: output.logits)
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(sparsifier.masks) == [f"transformer.h.{index}.{name}.weight" for index in (0, 1) for name in layers]
    assert sparsifier.mask_set.nnz == sparsifier.mask_set.size // 4
    assert "2 trained tensors" in caplog.text
    assert "(transformer.wpe.weight, transformer.wte.weight)" in caplog.text
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    overrides = [{"layers": "*.mlp.*", "pattern": "unstructured", "sparsity": 0.9}]
    patterned = Sparsifier(
        model, optimizer, Static(sparsity=0.0, pattern="4x1", overrides=overrides), total_steps=1
    ).mask_set
    assert "[inputs, outputs]" in patterned.reasons["transformer.h.0.attn.c_attn.weight"]
    assert patterned.nnz_of("transformer.h.1.mlp.c_fc.weight") == round(0.1 * 16 * 64)
