"""The stage `export`: from frozen and converted networks, and from ONNX files of other tools."""

from __future__ import annotations

import copy
import json
import logging
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from sparsepipe.artefact import Artefact, draft, read_json
from sparsepipe.errors import GraphError, ModelError, RecipeError
from sparsepipe.recipe import Conversion, Export
from sparsepipe.runtime import session
from sparsepipe.settings import Choice
from sparsepipe.spec import ModelSpec, Preprocessing
from sparsepipe.stages import convert, export
from sparsepipe.stages.network import load_network

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("decided_by_size")

NETWORK = """
from pathlib import Path
Path(__file__).with_name("was_imported").touch()

from torch import nn


def make(input_shape, classes, width=8):
    channels = input_shape[0]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes),
    )
"""
NAME = "own_network:make"
SHAPE = (2, 6, 6)
MASKED = ("0.weight", "3.weight", "9.weight")


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network of the user's own; its module leaves a mark when it is imported."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    return folder / "was_imported"


def state(density: float = 0.1) -> dict[str, Array]:
    """Weights and statistics for `own_network`: no zeros but those of the masks."""
    random = np.random.default_rng(6)
    shapes = {"0.weight": (8, 2, 3, 3), "3.weight": (8, 8, 3, 3), "9.weight": (4, 32), "9.bias": (4,)}
    values: dict[str, Array] = {name: random.uniform(0.5, 2, shape) for name, shape in shapes.items()}
    for name in MASKED:
        values[name] *= random.random(values[name].shape) < density
    for norm in ("1", "4", "6"):
        values |= {f"{norm}.{part}": random.uniform(0.5, 2, 8) for part in ("weight", "bias", "running_var")}
        values[f"{norm}.weight"] *= np.resize([1, -1], 8)
        values[f"{norm}.running_mean"] = random.standard_normal(8)
    result = {name: value.astype(np.float32) for name, value in values.items()}
    return result | {f"{norm}.num_batches_tracked": np.array(3) for norm in ("1", "4", "6")}


def frozen(folder: Path, weights: dict[str, Array] | None = None, spec: ModelSpec | None = None) -> Artefact:
    """What `freeze` would have written."""
    spec = spec or ModelSpec(
        model=Choice(name=NAME),
        input_shape=SHAPE,
        classes=("a", "b", "c", "d"),
        preprocessing=Preprocessing(mean=(0.5, 0.5), std=(0.25, 0.25)),
        recipe_digest="sha256:abc",
    )
    with draft(folder, "freeze", Conversion(), {}) as building:
        spec.write(building.folder)
        save_file(state() if weights is None else weights, building.folder / "model.safetensors")
    return Artefact.read(folder)


def evaluate(path: Path, shape: tuple[int, ...] = SHAPE, batch: int = 3) -> Array:
    x = np.random.default_rng(9).standard_normal((batch, *shape)).astype(np.float32)
    session = onnxruntime.InferenceSession(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def of_torch(source: Artefact, batch: int = 3) -> Array:
    import torch

    network = load_network(source, NAME)
    x = np.random.default_rng(9).standard_normal((batch, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        return np.asarray(network(torch.from_numpy(x)))


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_a_converted_network_becomes_files_that_agree(
    tmp_path: Path, own_network: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxscript")
    freeze = frozen(tmp_path / "freeze")
    source = convert.run(Conversion(), {"freeze": freeze}, tmp_path / "convert")
    with caplog.at_level(logging.INFO, "sparsepipe"):
        result = export.run(Export(), {"convert": source}, tmp_path / "export", trusted_model=NAME)

    dense, portable, universal = (result.file(f"model.{target}.onnx") for target in ("dense", "portable", "universal"))
    onnx.checker.check_model(str(dense), full_check=True)
    onnx.checker.check_model(str(portable))
    onnx.checker.check_model(str(universal), full_check=True)
    for batch in (1, 3):
        np.testing.assert_allclose(evaluate(universal, batch=batch), of_torch(freeze, batch), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(evaluate(dense, batch=batch), of_torch(freeze, batch), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(evaluate(dense, batch=batch), evaluate(portable, batch=batch))
    assert "'6' is not folded: it follows Relu '5'" in caplog.text

    model = onnx.load(dense)
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in MASKED:  # the zeros of the masks, all of them and no others
        np.testing.assert_array_equal(stored[name] == 0, state()[name] == 0)
        assert not np.signbit(stored[name][stored[name] == 0]).any()
    sparse = {tensor.values.name for tensor in onnx.load(portable).graph.sparse_initializer}
    assert sparse == set(MASKED)

    metrics = result.metrics
    assert metrics["files"] == {
        target: {"name": path.name, "bytes": path.stat().st_size, "target": target, "precision": "fp32"}
        for target, path in (("dense", dense), ("portable", portable), ("universal", universal))
    }
    assert metrics["opset"] == model.opset_import[0].version == 18
    assert metrics["layers"] == read_json(result.file("layers.json"))
    assert [layer["name"] for layer in metrics["layers"]] == list(MASKED)
    assert [layer["name"] for layer in metrics["kernels"]] == list(MASKED)
    assert {entry.op_type for entry in onnx.load(universal).graph.node} & {"SparseConv", "SparseConvRelu"}
    total = sum(state()[name].size for name in MASKED)
    nonzero = sum(np.count_nonzero(state()[name]) for name in MASKED)
    assert metrics["sparsity"] == pytest.approx(1 - nonzero / total)
    columns = ["name", "op", "shape", "nnz", "size", "sparsity", "dense_bytes", "bytes", "sparse", "reason"]
    assert all(list(layer) == columns for layer in metrics["layers"])
    assert result.manifest.inputs == {"convert": source.digest}

    properties = metadata(portable)
    assert properties["sparsepipe.target"] == "portable"
    assert metadata(dense)["sparsepipe.target"] == "dense"
    assert properties["sparsepipe.recipe_digest"] == "sha256:abc"
    assert float(properties["sparsepipe.sparsity"]) == pytest.approx(metrics["sparsity"], abs=1e-6)
    assert ModelSpec.model_validate_json(properties["sparsepipe.spec"]).input_shape == SHAPE
    assert {"sparsepipe.version", "sparsepipe.torch", "sparsepipe.onnx"} <= set(properties)


def test_a_frozen_network_is_exported_to_one_target_and_an_old_opset(tmp_path: Path, own_network: Path) -> None:
    pytest.importorskip("onnxscript")
    source = frozen(tmp_path / "freeze")
    config = Export(targets=("portable",), opset=13)
    result = export.run(config, {"freeze": source}, tmp_path / "export", trusted_model=NAME)
    assert sorted(result.manifest.outputs) == ["layers.json", "model.portable.onnx"]
    assert onnx.load(result.file("model.portable.onnx")).opset_import[0].version == 13
    assert onnx.load(result.file("model.portable.onnx")).ir_version == 7
    np.testing.assert_allclose(evaluate(result.file("model.portable.onnx")), of_torch(source), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trusted", [None, "other:make"])
def test_code_named_by_a_folder_is_not_imported(trusted: str | None, tmp_path: Path, own_network: Path) -> None:
    pytest.importorskip("torch")
    source = frozen(tmp_path / "freeze")
    with pytest.raises(ModelError, match=f"--model {NAME}"):
        export.run(Export(), {"freeze": source}, tmp_path / "export", trusted_model=trusted)
    assert not own_network.exists()
    assert not (tmp_path / "export").exists()
    load_network(source, NAME)
    assert own_network.exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path, own_network: Path) -> None:
    pytest.importorskip("torch")
    weights = state()
    weights["extra"] = weights.pop("9.bias")
    weights["0.weight"] = weights["0.weight"][:4]
    with pytest.raises(ModelError) as caught:
        load_network(frozen(tmp_path / "freeze", weights), NAME)
    assert (
        "missing: 9.bias; unexpected: extra; of the wrong shape: 0.weight (4, 2, 3, 3) instead of (8, 2, 3, 3)"
        in str(caught.value)
    )


def test_a_network_in_memory_is_exported_with_settings_like_those_of_a_recipe(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 3))
    with torch.no_grad():
        network[2].weight[:, ::2] = 0.0
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = export.export_onnx(network, (8,), str(tmp_path / "out"), targets=("dense",), opset=17)
    assert [path.name for path in sorted(result.folder.glob("*.onnx"))] == ["model.dense.onnx"]
    assert onnx.load(result.file("model.dense.onnx")).opset_import[0].version == 17
    assert {layer["name"]: layer["sparsity"] for layer in result.metrics["layers"]}["2.weight"] == 0.5
    sample = torch.randn(5, 8)
    with torch.no_grad():
        expected = copy.deepcopy(network).eval()(sample).numpy()
    found = onnxruntime.InferenceSession(result.file("model.dense.onnx")).run(None, {"input": sample.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(RecipeError, match=r"export: unknown key 'target' \(did you mean 'targets'"):
        export.export_onnx(network, (8,), tmp_path / "out", target="dense")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_model_with_several_inputs_goes_through_the_exporter_of_torch(tmp_path: Path) -> None:
    """The way that the README names for models of words: torch.onnx.export, then the verb on its file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    network = transformers.BertForSequenceClassification(config).eval()
    pruned = [name for name, weight in network.named_parameters() if weight.ndim == 2 and "embeddings" not in name]
    with torch.no_grad():
        for name in pruned:
            weight = network.get_parameter(name)
            weight.mul_(torch.rand_like(weight) < 0.1)
    words = torch.randint(30, (4, 12))
    attended = (torch.arange(12) < torch.tensor([[12], [5], [7], [9]])).long()
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        network, (words[:2], attended[:2]), tmp_path / "theirs.onnx", dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_shapes={"input_ids": batch, "attention_mask": batch},
    )  # fmt: skip
    result = export.from_onnx(tmp_path / "theirs.onnx", Export(), tmp_path / "out")
    assert sum(layer["sparsity"] > 0.8 for layer in result.metrics["layers"]) == len(pruned)
    with torch.no_grad():
        expected = network(input_ids=words, attention_mask=attended).logits.numpy()
    for target in ("dense", "portable", "universal"):
        inputs = {"input_ids": words.numpy(), "attention_mask": attended.numpy()}
        found = session(result.file(f"model.{target}.onnx")).run(None, inputs)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_network_trained_in_blocks_runs_in_those_blocks_without_padding(block: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sparsepipe.sparsity.methods.dst_ee import DSTEE
    from sparsepipe.sparsity.sparsifier import Sparsifier

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(4, 64, 3, padding=1, bias=False), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 1, bias=False), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(512, 64),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    method = DSTEE(sparsity=0.9, pattern=f"{block}x1", distribution="uniform", update_every=2, stop_at=0.9)
    sparsifier = Sparsifier(network, optimizer, method, total_steps=10)
    for step in range(10):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    nonzeros = {name: int(mask.sum()) for name, mask in sparsifier.freeze().items()}
    result = export.export_onnx(network, (4, 16, 16), tmp_path / "out", targets=("universal",))
    chosen = {each["name"]: each for each in result.metrics["kernels"]}
    model = onnx.load(result.file("model.universal.onnx"))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in ("2.weight", "4.weight", "7.weight"):
        assert (chosen[name]["sparse"], chosen[name]["block"]) == (True, block), chosen[name]["reason"]
        values, deltas = (arrays[f"{name.removesuffix('weight')}{part}"] for part in ("values", "deltas"))
        stored = values.any(axis=1)
        assert values.shape == (len(deltas), block)
        assert values[stored].all(), "no zero inside a block"
        assert stored.sum() * block == nonzeros[name]


def foreign(opset: int = 17, op_type: str = "Relu", domain: str = "") -> ModelProto:
    """A pruned network in the style of another tool."""
    random = np.random.default_rng(8)
    weight = (random.standard_normal((16, 2, 3, 3)) * (random.random((16, 2, 3, 3)) < 0.05)).astype(np.float32)
    head = (random.standard_normal((16, 5)) * (random.random((16, 5)) < 0.9)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["pixels", "onnx::Conv_7", "bias"], ["8"], name="Conv_0"),
        helper.make_node(op_type, ["8"], ["9"], name="Act_1", domain=domain),
        helper.make_node("GlobalAveragePool", ["9"], ["10"], name="Pool_2"),
        helper.make_node("Flatten", ["10"], ["11"], name="Flatten_3"),
        helper.make_node("MatMul", ["11", "onnx::MatMul_12"], ["scores"], name="MatMul_4"),
    ]
    constants = {"onnx::Conv_7": weight, "bias": np.ones(16, np.float32), "onnx::MatMul_12": head}
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 2, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    made = helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="theirs")
    helper.set_model_props(made, {"author": "someone"})
    return made


@pytest.fixture
def their_file(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.onnx"
    onnx.save(foreign(), path)
    return path


def test_a_foreign_file_keeps_its_graph_names_and_opset(their_file: Path, tmp_path: Path) -> None:
    result = export.from_onnx(their_file, Export(), tmp_path / "export")
    dense, portable = (onnx.load(result.file(f"model.{target}.onnx")) for target in ("dense", "portable"))
    for model in (dense, portable):
        assert list(model.graph.node) == list(foreign().graph.node)
        assert list(model.graph.input) == list(foreign().graph.input)
        assert list(model.graph.output) == list(foreign().graph.output)
        assert model.opset_import[0].version == 17
        assert model.producer_name == "theirs"
    assert list(dense.graph.initializer) == list(foreign().graph.initializer)
    assert [tensor.values.name for tensor in portable.graph.sparse_initializer] == ["onnx::Conv_7"]
    expected = evaluate(their_file)
    for target in ("dense", "portable"):
        np.testing.assert_array_equal(evaluate(result.file(f"model.{target}.onnx")), expected)
        properties = metadata(result.file(f"model.{target}.onnx"))
        assert properties["author"] == "someone"
        assert properties["sparsepipe.target"] == target
        assert "sparsepipe.spec" not in properties
    assert [(layer["name"], layer["sparse"]) for layer in result.metrics["layers"]] == [
        ("onnx::Conv_7", True),
        ("onnx::MatMul_12", False),
    ]
    assert result.metrics["opset"] == 17


@pytest.mark.parametrize(("opset", "before", "after"), [(17, 14, 10), (17, 9, 9), (17, 3, 3), (23, 14, 11)])
def test_a_file_format_that_is_newer_than_needed_is_lowered(
    opset: int, before: int, after: int, tmp_path: Path
) -> None:
    model = foreign(opset)
    model.ir_version = before
    if before == 3:  # then, every initializer had to be an input
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        model.graph.input.extend(
            helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in constants.items()
        )
    (tmp_path / "theirs.onnx").write_bytes(model.SerializeToString())
    result = export.from_onnx(tmp_path / "theirs.onnx", Export(), tmp_path / "export")
    for target in ("dense", "portable"):
        assert onnx.load(result.file(f"model.{target}.onnx")).ir_version == after


def test_an_export_can_be_exported_again(their_file: Path, tmp_path: Path) -> None:
    once = export.from_onnx(their_file, Export(), tmp_path / "once")
    twice = export.from_onnx(once.file("model.portable.onnx"), Export(), tmp_path / "twice")
    assert twice.metrics["layers"] == once.metrics["layers"]
    assert twice.file("model.portable.onnx").read_bytes() == once.file("model.portable.onnx").read_bytes()


@pytest.mark.parametrize("opset", [13, 21])
def test_an_opset_is_converted_only_where_it_is_asked_for(opset: int, their_file: Path, tmp_path: Path) -> None:
    result = export.from_onnx(their_file, Export(opset=opset), tmp_path / "export")
    assert result.metrics["opset"] == opset
    for target in ("dense", "portable"):
        path = result.file(f"model.{target}.onnx")
        assert onnx.load(path).opset_import[0].version == opset
        assert metadata(path)["author"] == "someone"
        np.testing.assert_allclose(evaluate(path), evaluate(their_file), rtol=1e-5, atol=1e-6)


def test_an_opset_that_lacks_an_operator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    onnx.save(foreign(op_type="HardSwish"), path)
    with pytest.raises(GraphError, match=r"opset 13 has no HardSwish \('Act_1'\)"):
        export.from_onnx(path, Export(opset=13), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_graph_that_onnxruntime_has_fused_works_too(their_file: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(their_file, options)
    result = export.from_onnx(tmp_path / "fused.onnx", Export(), tmp_path / "export")
    assert [(layer["op"], layer["sparse"]) for layer in result.metrics["layers"]] == [
        ("FusedConv", True),
        ("MatMul", False),
    ]
    np.testing.assert_array_equal(
        evaluate(result.file("model.portable.onnx")), evaluate(result.file("model.dense.onnx"))
    )


def test_external_data_is_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "theirs" / "model.onnx"
    path.parent.mkdir()
    onnx.save(foreign(), path, save_as_external_data=True, size_threshold=0)
    result = export.from_onnx(path, Export(), tmp_path / "export")
    np.testing.assert_array_equal(evaluate(result.file("model.portable.onnx")), evaluate(path))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["3.weight", "9.bias", "4.running_var"])
def test_a_network_with_weights_that_are_not_finite_is_refused(
    name: str, value: float, tmp_path: Path, own_network: Path
) -> None:
    weights = state()
    weights[name].reshape(-1)[1] = value
    source = frozen(tmp_path / "freeze", weights)
    with pytest.raises(GraphError, match=rf"freeze: '{name}' holds 1 of {weights[name].size} values that are not fin"):
        export.run(Export(targets=("dense",)), {"freeze": source}, tmp_path / "export", trusted_model=NAME)
    assert not (tmp_path / "export").exists()


def test_a_network_in_memory_with_nan_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    network = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(network.weight, math.nan)
    with pytest.raises(GraphError, match="'weight' holds 6 of 6 values that are not finite"):
        export.export_onnx(network, (3,), tmp_path / "export")


@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_foreign_file_with_nan_is_refused_and_one_with_infinite_bounds_is_not(place: str, tmp_path: Path) -> None:
    made = foreign(op_type="Clip")
    bounds = [numpy_helper.from_array(np.float32(bound), name) for bound, name in ((0, "low"), (np.inf, "high"))]
    made.graph.initializer.extend(bounds)
    made.graph.node[1].input.extend(["low", "high"])
    onnx.save(made, tmp_path / "bounds.onnx")
    export.from_onnx(tmp_path / "bounds.onnx", Export(targets=("dense",)), tmp_path / "export")
    (head,) = (tensor for tensor in made.graph.initializer if tensor.name == "onnx::MatMul_12")
    values = numpy_helper.to_array(head).copy()
    values[3, :2] = np.nan, np.inf
    head.CopyFrom(numpy_helper.from_array(values, head.name))
    if place == "constant":
        made.graph.node.insert(0, helper.make_node("Constant", [], [head.name], value=head))
        made.graph.initializer.remove(head)
    onnx.save(made, tmp_path / "nan.onnx")
    with pytest.raises(GraphError, match=rf"nan\.onnx: 'onnx::MatMul_12' holds 2 of {values.size} values"):
        export.from_onnx(tmp_path / "nan.onnx", Export(), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_masks_may_hold_infinities_and_weights_may_not(tmp_path: Path) -> None:
    """Scores with a distance penalty and no look ahead (ALiBi), and an affine network after them."""
    distance = np.subtract.outer(np.arange(4), np.arange(4))
    mask = np.where(distance >= 0, -0.5 * distance, -np.inf).astype(np.float32)
    constants = {"mask": mask, "all": np.full((1, 4), -np.inf, np.float32), "w": np.eye(4), "b": np.zeros(4)}
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("Max", ["p", "all"], ["m"]),
        helper.make_node("Gemm", ["m", "w", "b"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(made, tmp_path / "masks.onnx")
    export.from_onnx(tmp_path / "masks.onnx", Export(targets=("dense",)), tmp_path / "export")
    for place, name, value, count in ((2, "w", np.inf, 1), (3, "b", -np.inf, 1), (0, "mask", np.nan, 7)):
        broken = onnx.load(tmp_path / "masks.onnx")
        values = numpy_helper.to_array(broken.graph.initializer[place]).copy()
        values.reshape(-1)[0] = value
        if name == "b":
            values[1] = 1.0
        broken.graph.initializer[place].CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(broken, tmp_path / "broken.onnx")
        with pytest.raises(GraphError, match=rf"'{name}' holds {count} of {values.size} values that are not finite"):
            export.from_onnx(tmp_path / "broken.onnx", Export(), tmp_path / "refused")


def test_a_file_that_onnxruntime_cannot_load_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    onnx.save(foreign(op_type="Own", domain="their.domain"), path)
    with pytest.raises(GraphError, match=r"onnxruntime cannot load it.*Own"):
        export.from_onnx(path, Export(), tmp_path / "export")
    assert [entry.name for entry in tmp_path.iterdir()] == ["theirs.onnx"]


def test_a_result_over_the_limit_leaves_nothing(
    their_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "serialise", partial(export.serialise, limit=1000))
    with pytest.raises(GraphError, match=r"model\.dense\.onnx: The model has more than 2 GB"):
        export.from_onnx(their_file, Export(), tmp_path / "export")
    assert [entry.name for entry in tmp_path.iterdir()] == ["theirs.onnx"]


def test_a_damaged_file_is_refused(their_file: Path, tmp_path: Path) -> None:
    their_file.write_bytes(their_file.read_bytes()[:-100])
    with pytest.raises(GraphError, match="cut off"):
        export.from_onnx(their_file, Export(), tmp_path / "export")


def test_a_foreign_file_needs_no_torch(their_file: Path, tmp_path: Path) -> None:
    code = f"""
import math
import sys
for name in ("torch", "onnxscript", "onnx_ir", "lightning_fabric"):
    sys.modules[name] = None  # importing it fails
from pathlib import Path
from sparsepipe.recipe import Export
from sparsepipe.stages import export
export.from_onnx(Path({str(their_file)!r}), Export(), Path({str(tmp_path / "export")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / "export" / "layers.json").read_text())


ZOO: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp": ((20,), {}),
    "resnet8": ((1, 12, 12), {"width": 4}),
    "resnet50-cifar": ((3, 16, 16), {"width": 4}),
    "resnet50": ((3, 64, 64), {"width": 4}),
    "vgg19": ((3, 32, 32), {}),
    "wrn-22-2": ((3, 16, 16), {}),
    "mobilenet-v1": ((3, 32, 32), {}),
    "vit-tiny": ((3, 16, 16), {"depth": 1, "width": 24}),
}


def check_zoo(name: str, tmp_path: Path, opset: int) -> None:
    """Prune a network of the registry at random, export it, and compare with torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from sparsepipe.models.registry import create

    shape, options = ZOO[name]
    torch.manual_seed(2)
    network = create(name, input_shape=shape, classes=4, options=options)
    with torch.no_grad():
        network.train()(torch.randn(4, *shape))  # running statistics other than 0 and 1
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter *= torch.rand_like(parameter) < 0.1
    spec = ModelSpec(
        model=Choice(name=name, **options),
        input_shape=shape,
        classes=("a", "b", "c", "d"),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    )
    weights = {key: value.numpy().copy() for key, value in network.state_dict().items()}
    source = frozen(tmp_path / "freeze", weights, spec)
    result = export.run(Export(opset=opset), {"freeze": source}, tmp_path / "export")
    x = np.random.default_rng(9).standard_normal((3, *shape)).astype(np.float32)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x)).numpy()
    found = evaluate(result.file("model.dense.onnx"), shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(evaluate(result.file("model.portable.onnx"), shape), found)
    names = {layer["name"] for layer in result.metrics["layers"]}
    assert names <= {key for key, _ in network.named_parameters()}
    assert sum(layer["sparse"] for layer in result.metrics["layers"]) > 0.5 * len(names)
    assert result.metrics["opset"] == opset


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vit-tiny"])
def test_small_networks_of_the_registry(name: str, tmp_path: Path) -> None:
    check_zoo(name, tmp_path, 18)


@pytest.mark.slow
@pytest.mark.parametrize("opset", range(13, 23))
@pytest.mark.parametrize("name", ZOO)
def test_all_networks_of_the_registry_in_all_opsets(name: str, opset: int, tmp_path: Path) -> None:
    check_zoo(name, tmp_path, opset)
