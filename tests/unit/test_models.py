"""The networks: published sizes and costs, input shapes, initialisation, and clear errors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from sparsepipe.errors import ModelError  # noqa: E402
from sparsepipe.models.registry import MODELS, available, create  # noqa: E402
from sparsepipe.models.vit import Attention  # noqa: E402
from sparsepipe.models.wide_resnet import WideResNet  # noqa: E402


def build(name: str, **options: object) -> nn.Module:
    """The published network without storage, so that the large ones cost nothing."""
    info = MODELS[name]
    with torch.device("meta"):
        return create(name, input_shape=info.input_shape, classes=info.classes, options=options)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def multiply_adds(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of convolutions and linear layers: weights times the positions that each is applied to."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else output.numel() // output.shape[-1]
        assert isinstance(module.weight, Tensor)
        total += module.weight.numel() * positions

    for layer in layers(network):
        layer.register_forward_hook(count)
    network.eval()(torch.empty(1, *input_shape, device="meta"))
    return total


def test_a_stem_with_a_stride_quarters_the_work_of_all_stages() -> None:
    plain, strided = build("resnet20"), build("resnet20", stem_stride=2)
    head = 64 * 10
    assert parameters(plain) == parameters(strided)
    assert multiply_adds(strided, (3, 32, 32)) - head == (multiply_adds(plain, (3, 32, 32)) - head) // 4


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # torchvision's resnet50, timm's vit_tiny_patch16_224, and the MobileNetV1 of the Keras application
        ("resnet50", 25_557_032),
        ("vit-tiny", 5_717_416),
        ("mobilenet-v1", 4_231_976),
        # published for CIFAR-10 with projection shortcuts: 0.27, 0.47 and 0.86 million
        ("resnet20", 272_474),
        ("resnet32", 466_906),
        ("resnet56", 855_770),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert parameters(build(name)) == count


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"),
    [
        ("vgg19", 20.024, 0.398),
        ("resnet50-cifar", 23.468, 1.298),
        ("resnet50", 25.503, 4.089),
        ("resnet20", 0.271, 0.0408),
        ("mobilenet-v1", 4.209, 0.569),
    ],
)
def test_weights_and_multiply_adds_are_the_published_ones(name: str, millions: float, giga_macs: float) -> None:
    network = build(name)
    weights = sum(layer.weight.numel() for layer in layers(network))
    assert weights / 1e6 == pytest.approx(millions, abs=5e-4)
    assert multiply_adds(network, MODELS[name].input_shape) / 1e9 == pytest.approx(giga_macs, rel=2e-3)


@pytest.mark.parametrize(
    ("depth", "factor", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (16, 8, 11.0), (22, 8, 17.2), (28, 10, 36.5)]
)
def test_wide_resnets_have_the_sizes_of_their_paper(depth: int, factor: int, millions: float) -> None:
    with torch.device("meta"):
        network = WideResNet(3, 10, depth, factor)
    assert round(parameters(network) / 1e6, 1) == millions


def test_wrn_22_2_has_about_1_08_million_parameters() -> None:
    assert parameters(build("wrn-22-2")) / 1e6 == pytest.approx(1.08, abs=0.005)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_cifar_resnets_have_as_many_layers_as_their_name_says(depth: int) -> None:
    network = build(f"resnet{depth}")
    counted = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len([name for name in counted if "downsample" not in name]) == depth


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("input_shape", [(1, 28, 28), (3, 32, 32), (2, 17, 24), (3, 64, 64)])
def test_every_network_takes_every_image_size(name: str, input_shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = create(name, input_shape=input_shape, classes=7).eval()
        assert network(torch.empty(2, *input_shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {}), ("resnet8", {}), ("mobilenet-v1", {}), ("vit-tiny", {"depth": 2})]
)
def test_small_networks_train_on_8x8_images(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    network = create(name, input_shape=(1, 8, 8), classes=10, options=options)
    logits = network(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_mlp_takes_features_and_its_options() -> None:
    network = create("mlp", input_shape=(30,), classes=4, options={"hidden": 3, "width": 8})
    assert [tuple(layer.weight.shape) for layer in layers(network)] == [(8, 30), (8, 8), (8, 8), (4, 8)]
    assert network(torch.zeros(5, 30)).shape == (5, 4)


def test_attention_agrees_with_torchs_own_layer() -> None:
    torch.manual_seed(0)
    attention = Attention(tokens=5, width=12, heads=3)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.weight.copy_(attention.proj.weight)
        reference.out_proj.bias.copy_(attention.proj.bias)
    x = torch.randn(2, 5, 12)
    expected, _ = reference(x, x, x)
    torch.testing.assert_close(attention(x.reshape(10, 12)).reshape(2, 5, 12), expected)


def test_weights_are_drawn_with_the_documented_variances() -> None:
    torch.manual_seed(0)
    network = create("resnet20", input_shape=(3, 32, 32), classes=10)
    weight = network.get_parameter("layer3.1.conv1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert network.get_parameter("fc.weight").std().item() == pytest.approx(0.01, rel=0.1)
    assert not network.get_parameter("fc.bias").any()


def test_the_generator_alone_decides_the_weights() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().ravel() for p in create("resnet8", input_shape=(1, 8, 8), classes=2).parameters()])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_resnet50_parameters_are_named_as_in_torchvision() -> None:
    names = {name for name, _ in build("resnet50").named_parameters()}
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias", "fc.bias"} <= names
    assert len(names) == 161


def test_available_filters_by_glob() -> None:
    assert [info.name for info in available("resnet?")] == ["resnet8"]
    assert len(available()) == len(MODELS) == 14


def test_the_registry_loads_no_torch() -> None:
    code = "import sys, sparsepipe.models.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def a_network(input_shape: tuple[int, ...], classes: int, units: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), units), nn.Linear(units, classes))


def not_a_network(input_shape: tuple[int, ...], classes: int) -> str:
    return "a network"


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "my_networks", sys.modules[__name__])
    return "my_networks"


def test_a_network_of_the_users_own(user_module: str) -> None:
    network = create(f"{user_module}:a_network", input_shape=(1, 4, 4), classes=2, options={"units": 5})
    assert network(torch.zeros(3, 1, 4, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("resnet21", (3, 32, 32), {}, ["no network 'resnet21'", "resnet20", "module:function"]),
        ("resnet20", (3, 32, 32), {"widht": 8}, ["no option 'widht'", "width"]),
        ("vgg19", (3, 32, 32), {"width": 8}, ["takes no options"]),
        ("resnet20", (64,), {}, ["takes images", "(64,)", "mlp"]),
        ("vgg19", (1, 8, 8), {}, ["at least 16x16", "8x8"]),
        ("resnet20", (3, 32, 32), {"width": "wide"}, ["cannot be built", "width = 'wide'"]),
        ("vit-tiny", (1, 28, 28), {"patch": 5}, ["patch of 5", "1, 2, 4, 7, 14, 28"]),
        ("vit-tiny", (1, 28, 28), {"heads": 5}, ["heads = 5", "multiple"]),
        ("mlp", (10,), {"width": 0}, ["width = 0"]),
        ("link-mlp", (16,), {"width": 0}, ["layer of 0 units"]),
        ("link-gnn", (15,), {}, ["15 values", 'features = "ends"']),
        ("no_such_module:network", (10,), {}, ["no_such_module", "cannot be imported"]),
        ("my_networks:no_such_function", (10,), {}, ["no function 'no_such_function'"]),
        ("my_networks:not_a_network", (10,), {}, ["returned str", "torch.nn.Module"]),
        ("my_networks:a_network", (10,), {"unit": 3}, ["no option 'unit'", "units"]),
    ],
)
def test_errors_say_what_and_what_to_do(
    user_module: str, name: str, shape: tuple[int, ...], options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        create(name, input_shape=shape, classes=10, options=options)
    for word in words:
        assert word in str(caught.value)


def test_the_scorer_of_pairs_computes_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    network = create("link-mlp", input_shape=(16,), classes=2)
    assert [tuple(layer.weight.shape) for layer in layers(network)] == [(128, 16), (1, 128)]
    x, labels = torch.randn(32, 16), torch.arange(32) % 2
    hidden, score = layers(network)
    expected = nn.functional.binary_cross_entropy(
        score(nn.functional.relu(hidden(x))).sigmoid().squeeze(1), labels.float()
    )
    torch.testing.assert_close(nn.functional.cross_entropy(network(x), labels), expected)


def test_the_encoder_of_nodes_does_not_care_which_comes_first() -> None:
    torch.manual_seed(0)
    network = create("link-gnn", input_shape=(96,), classes=2)
    assert [tuple(layer.weight.shape) for layer in layers(network)] == [(64, 48), (64, 64), (128, 64), (1, 128)]
    first, second = torch.randn(2, 5, 48)
    one, other = (network(torch.cat(pair, dim=1)) for pair in ((first, second), (second, first)))
    torch.testing.assert_close(one, other)
    assert one.shape == (5, 2)


def test_a_layer_on_spread_features_is_a_graph_convolution() -> None:
    """sum over k of S^k X W_k^T + b, with a matrix S that the network never sees."""
    from scipy.sparse import csr_array

    from sparsepipe.data.embedding import propagated

    torch.manual_seed(0)
    network = create("link-gnn", input_shape=(24,), classes=2)
    edges = torch.rand(9, 9).triu(1) > 0.5
    looped = (edges | edges.T).double() + torch.eye(9)
    step = looped / (looped.sum(0)[:, None] * looped.sum(0)).sqrt()
    x = torch.randn(9, 4)
    weights = network.get_parameter("convolution.weight").double().split(4, dim=1)
    powers = [x.double(), step @ x.double(), step @ step @ x.double()]
    expected = sum(power @ weight.T for power, weight in zip(powers, weights, strict=True))
    spread = propagated(csr_array((edges | edges.T).numpy().astype(float)), x.numpy(), 2)
    torch.testing.assert_close(network.get_submodule("convolution")(torch.from_numpy(spread)), expected.float())
