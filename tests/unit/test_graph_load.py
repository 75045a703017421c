"""Reading ONNX files of others: complete, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph import load as loading
from sparsepipe.graph.load import load

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) * (np.arange(12).reshape(4, 3) % 3 == 0)


def gemm(weight: NDArray[Any] = WEIGHT, opset: int = 17, **graph_parts: Any) -> ModelProto:
    parts = {"initializer": [numpy_helper.from_array(weight, "w")]} | graph_parts
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        **parts,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight_of(model: ModelProto) -> NDArray[Any]:
    (tensor,) = model.graph.initializer
    assert not model.graph.sparse_initializer
    return numpy_helper.to_array(tensor)


def test_a_plain_file_comes_back_as_it_is(tmp_path: Path) -> None:
    assert load(saved(gemm(), tmp_path)) == gemm()


@pytest.mark.parametrize(
    "content",
    [b"", b"not onnx at all, but text", b"\x08\x08", b"PK\x03\x04" + bytes(100), bytes(64)],
    ids=["empty", "text", "only a version", "zip", "zeros"],
)
def test_what_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"not an ONNX file|holds no ONNX model"):
        load(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gemm().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(GraphError):
            load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(GraphError, match="no such ONNX file"):
            load(path)


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_out_of_range_is_named(opset: int, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=f"opset {opset}; opsets 7 to"):
        load(saved(gemm(opset=opset), tmp_path))


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    broken = gemm()
    broken.graph.node[0].input[1] = "nowhere"
    with pytest.raises(GraphError, match=r"not valid ONNX.*nowhere"):
        load(saved(broken, tmp_path))


def test_outputs_of_unknown_shape_get_one(tmp_path: Path) -> None:
    vague = gemm()
    vague.graph.output[0].type.tensor_type.ClearField("shape")
    dims = load(saved(vague, tmp_path)).graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["n", 4]


def test_an_output_behind_an_operator_of_onnxruntime_may_have_no_shape(tmp_path: Path) -> None:
    vague = gemm()
    vague.graph.name = ""  # onnxruntime does not mind this, either
    vague.graph.node[0].output[0] = "a"
    vague.graph.node.append(helper.make_node("FastGelu", ["a"], ["y"], domain="com.microsoft"))
    vague.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(GraphError, match=r"No opset import for domain 'com\.microsoft'"):
        load(saved(vague, tmp_path))
    vague.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    read = load(saved(vague, tmp_path))
    x = np.ones((2, 3), np.float32)
    outputs = [onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0] for made in (vague, read)]
    np.testing.assert_array_equal(*outputs)
    vague.graph.node[0].input[1] = "nowhere"
    with pytest.raises(GraphError, match=r"not valid ONNX.*nowhere"):
        load(saved(vague, tmp_path))


@pytest.mark.parametrize("size", [8, 47, 52])
def test_a_tensor_of_other_bytes_than_its_shape_has_is_refused(size: int, tmp_path: Path) -> None:
    broken = gemm()
    broken.graph.initializer[0].raw_data = bytes(size)
    with pytest.raises(GraphError, match=rf"tensor 'w': It has {size} bytes, not the 48 of its shape \[4, 3\]"):
        load(saved(broken, tmp_path))


@pytest.mark.parametrize("kind", ["INT2", "INT4", "UINT4", "FLOAT4E2M1", "FLOAT8E5M2", "BFLOAT16", "BOOL", "COMPLEX64"])
@pytest.mark.parametrize("count", [4, 5])
def test_every_width_of_number_is_read(kind: str, count: int, tmp_path: Path) -> None:
    """The bytes are those that onnx writes."""
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    tensor = numpy_helper.from_array(np.ones(count).astype(dtype), "k")
    made = gemm()
    made.graph.initializer.append(tensor)
    assert load(saved(made, tmp_path)).graph.initializer[1] == tensor


@pytest.mark.parametrize("name", ["value", "value_float", "value_ints", "sparse_value"])
def test_a_constant_of_a_function_may_be_what_its_caller_gives(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "value": numpy_helper.from_array(np.float32([2, 3, 4])),
        "value_float": 2.5,
        "value_ints": [2, 3, 4],
        "sparse_value": sparse_zeros((3,), "k"),
    }
    constant = helper.make_node("Constant", [], ["k"], **{name: given[name]})
    kind = constant.attribute[0].type
    del constant.attribute[:]
    constant.attribute.add(name=name, ref_attr_name="given", type=kind)
    nodes = [constant, helper.make_node("Cast", ["k"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Add", ["a", "f"], ["b"]))
    function = helper.make_function("own", "Plus", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)], ["given"])
    made = gemm()
    made.graph.node.insert(0, helper.make_node("Plus", ["x"], ["p"], domain="own", given=given[name]))
    made.graph.node[1].input[0] = "p"
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    assert load(saved(made, tmp_path)) == made


def test_sparse_initializers_become_dense(tmp_path: Path) -> None:
    flat = np.flatnonzero(WEIGHT)
    for positions in (flat, np.argwhere(WEIGHT)):
        tensor = SparseTensorProto(dims=WEIGHT.shape)
        tensor.values.CopyFrom(numpy_helper.from_array(WEIGHT.reshape(-1)[flat], "w"))
        tensor.indices.CopyFrom(numpy_helper.from_array(positions.astype(np.int64)))
        model = load(saved(gemm(initializer=[], sparse_initializer=[tensor]), tmp_path))
        np.testing.assert_array_equal(weight_of(model), WEIGHT)


@pytest.mark.parametrize("inside", [False, True])
def test_a_sparse_constant_becomes_dense(inside: bool, tmp_path: Path) -> None:
    tensor = SparseTensorProto(dims=WEIGHT.shape)
    tensor.values.CopyFrom(numpy_helper.from_array(WEIGHT[WEIGHT != 0], "v"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.flatnonzero(WEIGHT).astype(np.int64)))
    made = gemm(initializer=[])
    constant = helper.make_node("Constant", [], ["w"], sparse_value=tensor)
    made.graph.node.insert(0, constant)
    if inside:
        made.functions.append(helper.make_function("own", "f", [], ["w"], [constant], [helper.make_opsetid("", 17)]))
        made.opset_import.append(helper.make_opsetid("own", 1))
        made.graph.node[0].CopyFrom(helper.make_node("f", [], ["w"], domain="own"))
    model = load(saved(made, tmp_path))
    holder = model.functions[0] if inside else model.graph
    np.testing.assert_array_equal(numpy_helper.to_array(holder.node[0].attribute[0].t), WEIGHT)


def sparse_zeros(shape: tuple[int, ...], name: str) -> SparseTensorProto:
    tensor = SparseTensorProto(dims=shape)
    tensor.values.CopyFrom(numpy_helper.from_array(np.zeros(0, np.float32), name))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(0, np.int64)))
    return tensor


@pytest.mark.parametrize("shapes", [[(2**40, 2**40)], [(20000, 20000)] * 6, [(20000, 20000)] * 2 + [(-30000, 30000)]])
@pytest.mark.parametrize("place", ["initializers", "constants", "function"])
def test_sparse_tensors_that_are_large_in_all_are_refused_before_any_is_made(
    shapes: list[tuple[int, ...]], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [sparse_zeros(shape, f"s{position}") for position, shape in enumerate(shapes)]
    made = gemm(sparse_initializer=tensors if place == "initializers" else [])
    constants = [helper.make_node("Constant", [], [t.values.name], sparse_value=t) for t in tensors]
    if place == "constants":
        made.graph.node.extend(constants)
    if place == "function":
        made.functions.append(helper.make_function("own", "f", [], [], constants, [helper.make_opsetid("", 17)]))
    path = saved(made, tmp_path)
    assert path.stat().st_size < 2000
    monkeypatch.setattr(loading.np, "zeros", None)
    with pytest.raises(GraphError, match="more than 2 GB when they are dense") as caught:
        load(path)
    assert "portable" not in str(caught.value)


@pytest.mark.parametrize(("indices", "shape"), [([-1, 3], (4, 3)), ([3, 12], (4, 3)), ([1], (4, 3)), ([0], (-4, -3))])
def test_a_malformed_sparse_initializer_is_refused(indices: list[int], shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = SparseTensorProto(dims=shape)
    tensor.values.CopyFrom(numpy_helper.from_array(np.float32([1, 2]), "w"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64)))
    with pytest.raises(GraphError, match="sparse tensor 'w' is malformed"):
        load(saved(gemm(initializer=[], sparse_initializer=[tensor]), tmp_path))


@pytest.mark.parametrize("place", ["initializer", "constant", "sparse"])
@pytest.mark.parametrize("data_type", [0, 77])
def test_a_data_type_that_onnx_does_not_know_is_refused(place: str, data_type: int, tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(WEIGHT, "w")
    tensor.data_type = data_type
    sparse = sparse_zeros(WEIGHT.shape, "w")
    sparse.values.data_type = data_type
    made = gemm(
        initializer=[tensor] if place == "initializer" else [],
        sparse_initializer=[sparse] if place == "sparse" else [],
    )
    if place == "constant":
        made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    with pytest.raises(GraphError, match=rf"'w' has a data type that is unknown, {data_type}") as caught:
        load(saved(made, tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(gemm(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def relocated(path: Path, **entries: str) -> Path:
    """Change the external data entries of the one tensor."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    for entry in tensor.external_data:
        entry.value = entries.pop(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read_in(external: Path) -> None:
    model = load(external)
    np.testing.assert_array_equal(weight_of(model), WEIGHT)
    assert model.graph.initializer[0].data_location == TensorProto.DEFAULT


@pytest.mark.parametrize("length", [None, "0"])
def test_external_data_may_leave_its_length_to_the_shape(length: str | None, tmp_path: Path) -> None:
    """Two tensors in one file, the second at an offset, as onnxruntime reads them."""
    bias = np.float32([1, 2, 3, 4])
    made = gemm(initializer=[numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(bias, "b")])
    made.graph.node[0].input.append("b")
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes() + bias.tobytes() + bytes(64))
    for tensor, offset in zip(made.graph.initializer, (0, WEIGHT.nbytes), strict=True):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": "weights.bin", "offset": str(offset)} | ({"length": length} if length else {})
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    onnxruntime.InferenceSession(saved(made, tmp_path))
    read = {tensor.name: numpy_helper.to_array(tensor) for tensor in load(tmp_path / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(read["w"], WEIGHT)
    np.testing.assert_array_equal(read["b"], bias)


def test_missing_external_data_is_named(external: Path) -> None:
    (external.parent / "weights.bin").unlink()
    with pytest.raises(GraphError, match=r"'weights\.bin' is missing.*Copy it"):
        load(external)


@pytest.mark.parametrize("entries", [{"length": "49"}, {"offset": "4"}, {"offset": "-1"}, {"length": "x"}])
def test_external_data_that_is_cut_off_is_refused(entries: dict[str, str], external: Path) -> None:
    with pytest.raises(GraphError, match="tensor 'w'"):
        load(relocated(external, **entries))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "", "..\\secret", "link"])
def test_external_data_cannot_leave_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    path = folder / "model.onnx"
    onnx.save(gemm(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(GraphError, match="leads out of the file's folder"):
        load(relocated(path, location=location))


def test_more_than_the_limit_is_refused_before_it_is_read(external: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LIMIT_BYTES", external.stat().st_size + WEIGHT.nbytes - 1)
    with pytest.raises(GraphError, match=r"more than 2 GB.*split the network") as caught:
        load(external)
    assert "portable" not in str(caught.value)
    monkeypatch.setattr(loading, "LIMIT_BYTES", external.stat().st_size - 1)
    with pytest.raises(GraphError, match="more than 2 GB"):
        load(external)
