"""What `inspect` says about files and folders whose contents the tests know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from sparsepipe.artefact import Artefact, draft, write_json
from sparsepipe.errors import ArtefactError, FormatError, GraphError
from sparsepipe.formats import encode
from sparsepipe.formats.io import save
from sparsepipe.formats.masks import save_masks
from sparsepipe.inspection import inspect
from sparsepipe.recipe import Export
from sparsepipe.settings import Choice, Section
from sparsepipe.spec import ModelSpec, Preprocessing
from sparsepipe.stages.export import from_onnx

Array = np.ndarray[Any, Any]
SPEC = ModelSpec(
    model=Choice(name="mlp", hidden=64),
    input_shape=(64,),
    classes=("a", "b"),
    preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
)


class Settings(Section):
    level: int = 3


def in_blocks(shape: tuple[int, int], r: int, c: int) -> Array:
    generator = np.random.default_rng(1)
    coarse = generator.random((shape[0] // r, shape[1] // c)) < 0.2
    return np.where(coarse.repeat(r, 0).repeat(c, 1), generator.uniform(1, 2, shape), 0).astype(np.float32)


FC = in_blocks((16, 32), 4, 1)
HEAD = np.ones((4, 16), np.float32)


def rows(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    json.dumps(described)  # everything can be printed as JSON
    return {layer["name"]: layer for layer in described["layers"]}


def make_network(folder: Path, stage: str = "convert") -> Artefact:
    with draft(folder, stage, Settings(), {"freeze": "sha256:0"}) as building:
        SPEC.write(building.folder)
        save(building.folder / "model.safetensors", {"fc.weight": encode(FC, "bsr", r=4, c=1), "head.weight": HEAD})
        building.metrics |= {"bytes_after": 5, "layers": [{"name": "fc.weight"}]}
    return Artefact.read(folder)


def test_a_plain_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    tensors = {"fc.weight": FC, "fc.bias": np.zeros(16, np.float32), "index": np.zeros((2, 2), np.int64)}
    save_file(tensors, path, {"made": "here"})
    found = inspect(path)
    assert (found["kind"], found["tensors"], found["metadata"]) == ("tensors", 3, {"made": "here"})
    assert found["bytes"] == path.stat().st_size
    nnz = int(np.count_nonzero(FC))
    in_int8 = found["layers"][0].pop("int8")
    high = int(in_int8["block"][0])
    held = [FC[o : o + high, i : i + 4] for o in range(0, 16, high) for i in range(0, 32, 4)]
    stored = sum(block.size for block in held if block.any())
    assert in_int8["stored_zeros"] == pytest.approx(1 - nnz / stored)
    assert rows(found) == {
        "fc.weight": {
            "name": "fc.weight",
            "shape": [16, 32],
            "dtype": "float32",
            "nnz": nnz,
            "size": 512,
            "sparsity": 1 - nnz / 512,
            "bytes": 2048,
            "bytes_per_nonzero": 2048 / nnz,
            "format": "dense",
            "patterns": ["2x1", "4x1"],
        }
    }
    assert (found["nnz"], found["weights"], found["sparsity"]) == (nnz, 512, 1 - nnz / 512)


def test_a_file_of_masks(tmp_path: Path) -> None:
    save_masks(tmp_path / "masks.safetensors", {"fc.weight": FC != 0})
    found = inspect(tmp_path / "masks.safetensors")
    assert found["kind"] == "masks"
    row = rows(found)["fc.weight"]
    assert (row["shape"], row["nnz"], row["bytes"]) == ([16, 32], np.count_nonzero(FC), 64)
    assert row["patterns"] == ["2x1", "4x1"]


def test_an_artefact(tmp_path: Path) -> None:
    artefact = make_network(tmp_path / "convert")
    found = inspect(tmp_path / "convert")
    assert (found["kind"], found["stage"], found["digest"]) == ("artefact", "convert", artefact.digest)
    assert (found["config"], found["inputs"]) == ({"level": 3}, {"freeze": "sha256:0"})
    assert found["metrics"].items() >= {"bytes_after": 5}.items()
    assert "layers" not in found["metrics"]
    assert found["model"]["model"] == {"name": "mlp", "hidden": 64}
    assert found["intact"] is True
    assert found["bytes"] == sum(artefact.file(name).stat().st_size for name in artefact.manifest.outputs)
    row = rows(found)["fc.weight"]
    assert row["format"] == "bsr 4x1"
    assert row["bytes"] == encode(FC, "bsr", r=4, c=1).nbytes
    assert rows(found)["head.weight"]["format"] == "dense"
    assert found["sparsity"] == 1 - (np.count_nonzero(FC) + HEAD.size) / (FC.size + HEAD.size)


def test_an_artefact_that_was_changed(tmp_path: Path) -> None:
    artefact = make_network(tmp_path / "convert")
    artefact.file("model.json").write_text(artefact.file("model.json").read_text() + "\n")
    found = inspect(tmp_path / "convert")
    assert found["intact"] is False
    assert "'model.json' was changed" in found["problem"]


def test_an_artefact_without_weights(tmp_path: Path) -> None:
    with draft(tmp_path / "bench", "bench", Settings(), {}) as building:
        write_json(building.folder / "bench.json", {"results": []})
        building.metrics["baseline"] = "a.onnx"
    found = inspect(tmp_path / "bench")
    assert (found["stage"], found["layers"], found["sparsity"]) == ("bench", [], None)
    assert found["metrics"]["baseline"] == "a.onnx"


def test_a_run_folder(tmp_path: Path) -> None:
    make_network(tmp_path / "run" / "convert")
    with draft(tmp_path / "run" / "bench", "bench", Settings(), {}) as building:
        building.metrics["baseline"] = "a.onnx"
    (tmp_path / "run" / "export.partial").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    found = inspect(tmp_path / "run")
    assert (found["kind"], found["layers_of"], found["interrupted"]) == ("run", "convert", ["export.partial"])
    assert set(found["stages"]) == {"bench", "convert"}
    assert found["stages"]["bench"]["metrics"]["baseline"] == "a.onnx"
    assert set(rows(found)) == {"fc.weight", "head.weight"}


def onnx_model() -> onnx.ModelProto:
    """MatMul with 4 x 1 blocks (stored [I, O]), a sparse Gemm weight (transB), a Conv weight in a Constant node."""
    head = in_blocks((4, 16), 1, 4)
    flat = np.flatnonzero(head)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(head.reshape(-1)[flat], "head"), numpy_helper.from_array(flat, "head_i"), [4, 16]
    )
    kernel = np.zeros((2, 1, 3, 3), np.float32)
    kernel[0] = 1
    nodes = [
        helper.make_node("MatMul", ["x", "fc"], ["m"]),
        helper.make_node("Gemm", ["m", "head"], ["g"], transB=1),
        helper.make_node("Unsqueeze", ["g", "axes"], ["u"]),
        helper.make_node("Constant", [], ["kernel"], value=numpy_helper.from_array(kernel, "inner")),
        helper.make_node("Conv", ["u", "kernel"], ["y"], pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, "N", 4])],
        [numpy_helper.from_array(np.ascontiguousarray(FC.T), "fc"), numpy_helper.from_array(np.array([0, 1]), "axes")],
        sparse_initializer=[sparse],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="hand", producer_version="1"
    )
    helper.set_model_props(model, {"sparsepipe.target": "portable"})
    return model


def test_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(onnx_model(), path)
    found = inspect(path)
    assert (found["kind"], found["ir_version"], found["opset"]) == ("onnx", 8, {"ai.onnx": 17})
    assert (found["producer"], found["metadata"]) == ("hand 1", {"sparsepipe.target": "portable"})
    assert found["inputs"] == {"x": "float [N, 32]"}
    assert found["operators"]["Gemm"] == 1
    assert found["sparse_initializers"] == 1
    layers = rows(found)
    assert set(layers) == {"fc", "head", "kernel"}
    assert {name: layer["op"] for name, layer in layers.items()} == {"fc": "MatMul", "head": "Gemm", "kernel": "Conv"}
    # 4 x 1 is four outputs x one input, however the file stores the matrix.
    assert (layers["fc"]["shape"], layers["fc"]["patterns"]) == ([32, 16], ["2x1", "4x1"])
    assert (layers["head"]["format"], layers["head"]["patterns"]) == ("sparse", ["1x4"])
    nnz = layers["head"]["nnz"]
    assert 12 * nnz < layers["head"]["bytes"] < 12 * nnz + 60
    assert (layers["kernel"]["nnz"], layers["kernel"]["patterns"]) == (9, ["channel"])


def test_the_weights_of_an_onnx_file_are_those_that_export_counts(tmp_path: Path) -> None:
    """One inside of a function, two of one node, one behind a view, one that is used twice, and no position table."""
    random = np.random.default_rng(1)
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(FC[:4, :4], "k"))
    inner = helper.make_node("MatMul", ["a", "k"], ["b"])
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function("own", "Dense", ["a"], ["b"], [constant, inner], opset_imports=imports)
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=4),
        helper.make_node("Reshape", ["flat", "shape"], ["m"]),
        helper.make_node("MatMul", ["h", "m"], ["i"]),
        helper.make_node("MatMul", ["i", "m"], ["j"]),
        helper.make_node("Add", ["j", "position"], ["p"]),
        helper.make_node("Dense", ["p"], ["y"], domain="own"),
    ]
    constants = {
        "w": random.random((1, 16, 3)),
        "r": random.random((1, 16, 4)) > 0.9,
        "flat": random.random((2, 8)),
        "position": random.random((1, 4)),
    }
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4])],
        [*tensors, numpy_helper.from_array(np.array([4, 4]), "shape")],
    )
    imports = [*imports, helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[function])
    onnx.save(model, tmp_path / "net.onnx")
    found = inspect(tmp_path / "net.onnx")
    assert {layer["name"]: layer["op"] for layer in found["layers"]} == {
        "w": "LSTM",
        "r": "LSTM",
        "flat": "MatMul",
        "k": "MatMul",
    }
    counted = from_onnx(tmp_path / "net.onnx", Export(), tmp_path / "export").metrics
    assert found["sparsity"] == pytest.approx(counted["sparsity"])
    assert found["operators"]["MatMul"] == 3


@pytest.mark.usefixtures("decided_by_size")
def test_a_universal_file_shows_the_format_and_mode_of_each_layer(tmp_path: Path) -> None:
    """As many bytes as the formulas of the encoding say; the bodies of the operators are not counted as used."""
    random = np.random.default_rng(4)
    kernel = (random.random((32, 16, 3, 3)) * (random.random((32, 16, 3, 3)) < 0.1)).astype(np.float32)
    matrix = in_blocks((64, 32), 4, 1)
    depthwise = random.random((32, 1, 3, 3)).astype(np.float32)
    point = (random.random((32, 32, 1, 1)) * (random.random((32, 32, 1, 1)) < 0.1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Conv", ["a", "depthwise"], ["b"], group=32),
        helper.make_node("Conv", ["b", "point"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "matrix"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "last"], ["y"]),
    ]
    constants = {"kernel": kernel, "depthwise": depthwise, "point": point, "matrix": matrix}
    constants["last"] = random.random((64, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    made = from_onnx(tmp_path / "m.onnx", Export(targets=("universal",)), tmp_path / "export")
    found = inspect(made.file("model.universal.onnx"))
    layers = rows(found)
    assert {name: (row["op"], row["format"], row["mode"]) for name, row in layers.items()} == {
        "kernel.weight": ("SparseConv", "csr", "auto"),
        "depthwise": ("SparseSeparableConvRelu", "dense", None),
        "point.weight": ("SparseSeparableConvRelu", "csr", "auto"),
        "matrix.weight": ("SparseLinear", "bsr 4x1", "auto"),
        "last": ("MatMul", "dense", None),
    }
    counts = {f"{name}.weight": int(np.count_nonzero(constants[name])) for name in ("kernel", "point", "matrix")}
    assert {name: layers[name]["nnz"] for name in counts} == counts
    assert layers["point.weight"]["bytes"] == 5 * counts["point.weight"]  # no gap is wider than a byte
    assert layers["matrix.weight"]["bytes"] == 17 * counts["matrix.weight"] // 4
    assert layers["matrix.weight"]["patterns"] == ["2x1", "4x1"]
    assert (found["functions"], found["opset"]) == (3, {"ai.onnx": 17, "sparsepipe": 1})
    assert found["operators"] == {
        **{f"sparsepipe.{name}": 1 for name in ("SparseConv", "SparseSeparableConvRelu", "SparseLinear")},
        **dict.fromkeys(("GlobalAveragePool", "Flatten", "MatMul"), 1),
    }


def test_an_export_artefact_shows_its_smallest_file(tmp_path: Path) -> None:
    with draft(tmp_path / "export", "export", Settings(), {}) as building:
        onnx.save(onnx_model(), building.folder / "model.portable.onnx")
        larger = onnx_model()
        larger.doc_string = "x" * 1000
        larger.graph.initializer[0].name = "fc2"
        larger.graph.node[0].input[1] = "fc2"
        onnx.save(larger, building.folder / "model.dense.onnx")
    found = inspect(tmp_path / "export")
    assert set(found["onnx"]) == {"model.dense.onnx", "model.portable.onnx"}
    assert found["onnx"]["model.dense.onnx"]["producer"] == "hand 1"
    assert "fc" in rows(found)


def external(folder: Path, location: str) -> Path:
    """The model with the data of `fc` outside of the file, said to be at `location`."""
    model = onnx_model()
    fc = model.graph.initializer[0]
    (folder / "fc.bin").write_bytes(fc.raw_data)
    fc.ClearField("raw_data")
    fc.data_location = TensorProto.EXTERNAL
    fc.external_data.add(key="location", value=location)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def test_external_data_is_read_from_the_folder_of_the_file_only(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = external(folder, "fc.bin")
    found = inspect(path)
    assert rows(found)["fc"]["nnz"] == np.count_nonzero(FC)
    assert found["external_data"] == ["fc.bin"]
    assert found["bytes"] == path.stat().st_size + 2048

    (tmp_path / "secret.bin").write_bytes(bytes(2048))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "../inside/fc.bin"):
        with pytest.raises(GraphError, match="leads out of the file's folder"):
            inspect(external(folder, location))


def test_what_cannot_be_inspected_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.pt").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"junk")
    (tmp_path / "net.safetensors").write_bytes(b"junk")
    for name, error, message in (
        ("nothing", ArtefactError, "no such file or folder"),
        ("empty", ArtefactError, "neither a run nor the output of a stage"),
        ("net.pt", ArtefactError, "sparsepipe freeze"),
        ("net.onnx", GraphError, "net.onnx"),
        ("net.safetensors", ArtefactError, "not a valid safetensors file"),
    ):
        with pytest.raises(error, match=message):
            inspect(tmp_path / name)


def test_a_damaged_network_is_named(tmp_path: Path) -> None:
    weight = encode(FC, "csr")
    weight.components["deltas"][0] = 99
    save(tmp_path / "net.safetensors", {"fc.weight": weight})
    with pytest.raises(FormatError, match=r"fc\.weight\.deltas: Entry 0 is out of range"):
        inspect(tmp_path / "net.safetensors")
