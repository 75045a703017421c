"""From torch to ONNX: values as in torch's evaluation mode, readable names, and an untouched network."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from onnx import ModelProto, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from sparsepipe.errors import GraphError  # noqa: E402
from sparsepipe.graph.build import build  # noqa: E402
from sparsepipe.graph.index import opset  # noqa: E402


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.conv2(x) + x)


class Images(nn.Module):
    """Every way of naming: containers, a module called twice, functional operations, a dropout, a name like `input`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), nn.MaxPool2d(2))
        self.input = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.input(self.layer1(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Tokens(nn.Module):
    """Layers of rank 3, tied weights, a norm, attention with computed shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.act = nn.GELU()
        self.third = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.third(self.second(self.act(self.first(x))))
        return self.third(x.mean(1)) + x.flatten(1)[:, :4]


SHAPES = {Images: (2, 6, 6), Tokens: (5, 4)}


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    made = kind().train()
    with torch.no_grad():  # running statistics other than 0 and 1
        made(torch.randn(8, *SHAPES[kind]))
    return made


@cache
def exported_once(kind: type[nn.Module]) -> tuple[nn.Module, ModelProto]:
    made = network(kind)
    return made, build(made, SHAPES[kind])


@pytest.fixture(params=[Images, Tokens])
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, ModelProto]:
    return exported_once(request.param)


@pytest.fixture
def images() -> ModelProto:
    return exported_once(Images)[1]


def evaluate(model: ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})[0])


def expected(made: nn.Module, x: np.ndarray) -> np.ndarray:
    made.eval()
    with torch.no_grad():
        result = made(torch.from_numpy(x)).numpy()
    made.train()
    return result


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_computes_what_torch_computes_in_evaluation_mode(exported: tuple[nn.Module, ModelProto], batch: int) -> None:
    made, model = exported
    x = np.random.default_rng(batch).standard_normal((batch, *SHAPES[type(made)])).astype(np.float32)
    np.testing.assert_allclose(evaluate(model, x), expected(made, x), rtol=1e-4, atol=1e-6)


def test_it_is_valid_and_says_nothing_of_this_machine(exported: tuple[nn.Module, ModelProto]) -> None:
    _, model = exported
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert opset(model) == 18
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert __file__.encode() not in model.SerializeToString()


def test_parameters_keep_their_names_and_values(exported: tuple[nn.Module, ModelProto]) -> None:
    made, model = exported
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, parameter in made.named_parameters():
        value = parameter.detach().numpy()
        turned = stored[name].shape != value.shape or not np.array_equal(stored[name], value)
        np.testing.assert_array_equal(stored[name].T if turned else stored[name], value)


def test_tensors_are_named_after_modules(images: ModelProto) -> None:
    outputs = [name for node in images.graph.node for name in node.output]
    wanted = ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu", "layer1.0.conv2", "layer1.0.relu@1", "layer1.1"]
    assert [name for name in outputs if name in wanted] == wanted
    assert "input_" in outputs  # the module `input`, because the network's input has that name
    assert outputs[-1] == "logits"
    assert images.graph.node[-1].name == "head"
    assert len(set(outputs)) == len(outputs)


def test_named_tensors_hold_what_their_modules_give(exported: tuple[nn.Module, ModelProto]) -> None:
    made, model = exported
    x = np.random.default_rng(0).standard_normal((2, *SHAPES[type(made)])).astype(np.float32)
    modules, seen = dict(made.named_modules()), {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.setdefault(name, output.detach().clone().numpy())

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    expected(made, x)
    for hook in hooks:
        hook.remove()
    names = [name for node in model.graph.node for name in node.output if name in seen]
    assert len(names) >= 3
    traced = ModelProto()
    traced.CopyFrom(model)
    traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(traced.SerializeToString())
    for name, found in zip(names, session.run(names, {"input": x}), strict=True):
        np.testing.assert_allclose(found, seen[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_flattening_costs_no_shape_computation(images: ModelProto) -> None:
    assert not {"Shape", "Constant", "Identity", "Expand"} & {node.op_type for node in images.graph.node}


def test_the_network_is_left_as_it_was_and_the_exporter_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    made = network(Images)
    made.layer1.eval()  # a mixture of modes
    made.head.weight.requires_grad_(False)
    made.head.bias.grad = torch.ones(3)
    before = {name: tensor.numpy().tobytes() for name, tensor in made.state_dict().items()}
    modes = {name: module.training for name, module in made.named_modules()}
    storages = {name: parameter.data_ptr() for name, parameter in made.named_parameters()}
    level, generator = logging.getLogger("torch.onnx").level, torch.get_rng_state()
    capfd.readouterr()

    build(made, SHAPES[Images])

    assert capfd.readouterr() == ("", "")
    assert {name: tensor.numpy().tobytes() for name, tensor in made.state_dict().items()} == before
    assert {name: module.training for name, module in made.named_modules()} == modes
    assert {name: parameter.data_ptr() for name, parameter in made.named_parameters()} == storages
    assert [name for name, parameter in made.named_parameters() if not parameter.requires_grad] == ["head.weight"]
    assert made.head.bias.grad is not None
    assert made.head.weight.grad is None
    assert logging.getLogger("torch.onnx").level == level
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_same_network_gives_the_same_bytes_in_any_memory_layout(images: ModelProto) -> None:
    turned = network(Images).to(memory_format=torch.channels_last)
    assert build(turned, SHAPES[Images]).SerializeToString() == images.SerializeToString()


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x + 1


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1).sum(0, keepdim=True)


@pytest.mark.parametrize(
    ("made", "said"), [(Branches(), "cannot export"), (TwoOutputs(), "2 outputs"), (FixedBatch(), "batch")]
)
def test_what_cannot_be_exported_is_named(made: nn.Module, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        build(made, (4,))
    assert type(made).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_cannot_be_copied_is_refused_with_advice() -> None:
    from torch.nn.utils import prune

    made = nn.Sequential(nn.Linear(4, 2))
    prune.random_unstructured(made[0], "weight", 0.5)
    with pytest.raises(GraphError, match=r"prune\.remove"):
        build(made, (4,))
