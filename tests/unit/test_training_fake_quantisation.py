"""Rounded passes against onnxruntime's own operators, and which tensors of a network they round."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")
pytest.importorskip("onnxscript")

from qat_network import even  # noqa: E402
from torch import nn  # noqa: E402

from sparsepipe.errors import RecipeError  # noqa: E402
from sparsepipe.graph.build import build  # noqa: E402
from sparsepipe.graph.fold import fold  # noqa: E402
from sparsepipe.quantization.calibrate import ranges  # noqa: E402
from sparsepipe.quantization.points import completed, quantised_tensors  # noqa: E402
from sparsepipe.recipe import Training  # noqa: E402
from sparsepipe.runtime.sessions import run, session  # noqa: E402
from sparsepipe.sparsity.methods.autosparse import AutoSparse  # noqa: E402
from sparsepipe.sparsity.methods.set import SET  # noqa: E402
from sparsepipe.sparsity.methods.static import Static  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402
from sparsepipe.stages import qat  # noqa: E402
from sparsepipe.training.fake_quantisation import (  # noqa: E402
    FakeQuantisation,
    Points,
    rounded_activation,
    rounded_weight,
)

SHAPE = (1, 8, 8)


def there_and_back(values: np.ndarray, scale: float, zero_point: int) -> np.ndarray:  # type: ignore[type-arg]
    """What QuantizeLinear and DequantizeLinear of onnxruntime make of `values`."""
    names = ["scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *names], ["q"]),
            helper.make_node("DequantizeLinear", ["q", *names], ["y"]),
        ],
        "there_and_back",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(values.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(values.shape))],
        [
            numpy_helper.from_array(np.float32(scale), "scale"),
            numpy_helper.from_array(np.uint8(zero_point), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    found: np.ndarray = run(session(model.SerializeToString(), library=False), {"x": values})[0]  # type: ignore[type-arg]
    return found


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (0.5, 2.0), (-2.0, -0.5)])
def test_activations_are_rounded_as_onnxruntime_does(low: float, high: float) -> None:
    values = np.random.default_rng(0).normal(0, 2, 4000).astype(np.float32)
    bottom, top = min(low, 0.0), max(high, 0.0)
    scale = np.float32(top - bottom) / np.float32(255)
    expected = there_and_back(values, scale, round(-bottom / scale))
    found = rounded_activation(torch.from_numpy(values), torch.tensor([low, high])).numpy()
    assert len(np.unique(expected)) > 50
    # Where a value lies in the middle of two steps, the product with 1 / scale may fall to the other side.
    steps = np.abs(found - expected) / scale
    assert steps.max() < 1.01
    assert (steps > 0.01).mean() < 0.001


def test_weights_keep_zeros_and_the_sign_of_each_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3) * torch.tensor([1, 10, 0.1, 1, 0, 1.0]).view(-1, 1, 1, 1)
    weight[torch.rand_like(weight) < 0.5] = 0
    found = rounded_weight(weight)
    assert not found[weight == 0].any()
    assert not found[4].any()
    for channel, rounded in zip(weight, found, strict=True):
        scale = channel.abs().max() / 127
        steps = torch.arange(-127, 128) * scale
        nearest = (channel.flatten()[:, None] - steps).abs().amin(1)
        assert torch.allclose((channel - rounded).abs().flatten(), nearest, atol=1e-6 * float(channel.abs().max()))


def test_gradients_pass_straight_through_and_stop_where_values_are_clipped() -> None:
    values = torch.tensor([-2.0, -0.3, 0.4, 5.0], requires_grad=True)
    rounded_activation(values, torch.tensor([-1.0, 1.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 0]
    weight = torch.randn(3, 4, requires_grad=True)
    rounded_weight(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(1).all()


def test_the_tensors_are_those_that_the_export_quantises() -> None:
    folded, _ = fold(build(even(SHAPE, 10).eval(), SHAPE))
    found = quantised_tensors(folded)
    # bn2 stands before the sum; bn1 and the sum stand before a ReLU, which their bytes come behind.
    assert {"input", "relu", "bn2", "side", "relu@1", "logits"} <= found
    assert not {"bn1", "stem", "conv", "head.weight"} & found


def test_observed_ranges_are_those_of_onnxruntime() -> None:
    network = even(SHAPE, 10)
    sparsifier = Sparsifier(network, torch.optim.SGD(network.parameters(), 0.1), Static(sparsity=0.5), total_steps=10)
    settings = Training(precision="int8-qat", qat_start=0.0)
    rounding = qat.prepare(network, SHAPE, sparsifier, settings, 10)
    assert rounding is not None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the one batch, so that training and evaluation agree
    samples = torch.randn(32, *SHAPE)
    rounding.active = True
    network.train()(samples)
    rounding.active = False
    folded, _ = fold(build(network.eval(), SHAPE))
    expected = ranges(folded, [{"input": samples.numpy()}])
    found, missing = completed(folded, rounding.ranges())
    assert not missing
    assert found.keys() >= quantised_tensors(folded)
    for name in quantised_tensors(folded):
        # Rounding on the way, and a variance without Bessel's correction, move the extremes a little.
        width = expected[name][1] - expected[name][0]
        assert found[name] == pytest.approx(expected[name], abs=0.03 * width), name


def test_nothing_is_rounded_before_it_is_active_and_parameters_stay() -> None:
    network = even(SHAPE, 10).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    samples = torch.randn(4, *SHAPE)
    expected = network(samples)
    rounding = FakeQuantisation(network, Points({"conv": "relu", "head": "flat"}, {"": "logits"}), 0)
    assert torch.equal(network(samples), expected)
    rounding.active = True
    assert not torch.equal(network.train()(samples), expected)
    rounding.active = False
    found = network.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before if not name.startswith("bn"))
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()}["conv.weight"]


def test_a_failing_pass_leaves_the_weights() -> None:
    network = even(SHAPE, 10)
    rounding = FakeQuantisation(network, Points({"conv": "relu"}, {}), 0)
    rounding.active = True
    weight = network.conv.weight
    with pytest.raises(RuntimeError):
        network.conv(torch.zeros(1, 3, 8, 8))
    assert network.conv.weight is weight


@pytest.mark.parametrize(
    ("method", "settings", "word"),
    [
        (SET(sparsity=0.5, stop_at=0.9, update_every=1), {}, "stop_at"),
        (AutoSparse(), {}, "autosparse"),
        (Static(sparsity=0.5), {"ema": 0.9}, "train.ema"),
    ],
)
def test_refusals(method: object, settings: dict[str, float], word: str) -> None:
    network = even(SHAPE, 10)
    sparsifier = Sparsifier(network, torch.optim.SGD(network.parameters(), 0.1), method, total_steps=100)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=word):
        qat.prepare(network, SHAPE, sparsifier, Training(precision="int8-qat", **settings), 100)  # type: ignore[arg-type]


def test_an_observed_range_behind_a_relu_is_that_of_the_layer_before() -> None:
    folded, _ = fold(build(even(SHAPE, 10).eval(), SHAPE))
    relu = next(node for node in folded.graph.node if node.output[0] == "relu")
    found, missing = completed(folded, {"relu": (0.0, 2.0), "elsewhere": (0.0, 1.0)})
    assert found == {"relu": (0.0, 2.0), relu.input[0]: (0.0, 2.0)}
    assert "input" in missing
    assert "relu" not in missing
    assert isinstance(folded, onnx.ModelProto)
