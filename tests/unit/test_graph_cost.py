"""The cost model: sizes, layouts, predictions against the timings that they were fitted to, and the fit itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from scipy import sparse

from sparsepipe.benchmark import fit_cost
from sparsepipe.benchmark.layers import NCHWC, optimised, repeated, without_layout_changes
from sparsepipe.graph import cost
from sparsepipe.graph.balance import worth_it
from sparsepipe.graph.index import index
from sparsepipe.graph.kernel_layer import read
from sparsepipe.graph.layout import Layout
from sparsepipe.graph.sizes import sizes_of
from sparsepipe.graph.verdict import COMMON_ISAS, Network, judge, stored_shares
from sparsepipe.runtime import run, session

Array = NDArray[Any]
SAMPLES = fit_cost.read_samples(Path(__file__).parents[2] / "examples" / "results" / "cost_fit.json")
RANDOM = np.random.default_rng(3)
node = helper.make_node


def values(*shape: int, density: float = 1.0) -> Array:
    return (RANDOM.standard_normal(shape) * (RANDOM.random(shape) < density)).astype(np.float32)


def model(nodes: list[NodeProto], shape: list[int | str], constants: dict[str, Array], output: str = "y") -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def tower() -> ModelProto:
    """Convolutions and poolings, a flattening that divides a batch, a linear layer."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["c", "w1"], ["d"], dilations=[2, 1]),
        node("Reshape", ["d", "flat"], ["e"]),
        node("MatMul", ["e", "w2"], ["y"]),
    ]
    constants: dict[str, Array] = {"w0": values(16, 3, 3, 3), "w1": values(32, 16, 3, 3)}
    return model(nodes, ["n", 3, 30, 22], constants | {"flat": np.array([-1, 96]), "w2": values(96, 5)})


@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_are_those_that_onnxruntime_computes(batch: int) -> None:
    made = tower()
    before = made.SerializeToString()
    found = (sizes_of(made) if batch == 1 else sizes_of(made, {"x": (batch, 3, 30, 22)})).sizes
    assert made.SerializeToString() == before
    names = [name for entry in made.graph.node for name in entry.output]
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    outputs = run(session(made.SerializeToString()), {"x": values(batch, 3, 30, 22)})
    assert {name: found[name] for name in names} == {
        name: output.shape for name, output in zip(names, outputs, strict=True)
    }


def test_free_sizes_are_those_of_images_and_sequences() -> None:
    made = model([node("Conv", ["x", "w"], ["y"], strides=[2, 2])], ["n", 8, "h", 9], {"w": values(16, 8, 3, 3)})
    assert sizes_of(made).sizes["y"] == (1, 16, 111, 4)
    assert sizes_of(made).assumed
    made = model([node("MatMul", ["x", "w"], ["y"])], ["n", "s", 8], {"w": values(8, 5)})
    assert sizes_of(made).sizes["y"] == (1, 16, 5)
    assert not sizes_of(tower()).assumed


def test_sizes_behind_operators_that_onnx_does_not_know_are_not_known() -> None:
    nodes = [node("Odd", ["x"], ["a"], domain="somewhere"), node("Conv", ["a", "w"], ["y"])]
    made = model(nodes, ["n", 64, 9, 9], {"w": values(64, 64, 1, 1)})
    made.opset_import.append(helper.make_opsetid("somewhere", 1))
    assert sizes_of(made).sizes["x"] == (1, 64, 9, 9)
    assert "196 positions (assumed)" in verdict_of(made, place=1).reason


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5])
def test_stored_shares_count_the_blocks(density: float) -> None:
    weight = values(12, 10, 3, 1, density=density)
    for block, share in stored_shares(weight).items():
        assert round(share * weight.size) == sparse.bsr_array(weight.reshape(12, -1), blocksize=(block, 1)).data.size


def test_blocks_that_do_not_divide_the_outputs_are_left_out() -> None:
    assert list(stored_shares(values(6, 4))) == [1, 2]
    assert list(stored_shares(values(5, 4))) == [1]


def verdict_of(made: ModelProto, place: int = 0, isa: str = "any") -> Any:
    return judge(read(made.graph.node[place], index(made.graph)), Network.of(made), isa)


def point(side: int | str, density: float, channels: int = 256) -> ModelProto:
    weight = values(channels, channels, 1, 1, density=density)
    return model([node("Conv", ["x", "w"], ["y"])], ["n", channels, side, side], {"w": weight})


def matrix(outputs: int, inputs: int, density: float, rows: int = 1) -> ModelProto:
    weight = {"w": values(inputs, outputs, density=density)}
    return model([node("MatMul", ["x", "w"], ["y"])], [rows, inputs], weight)


@pytest.mark.parametrize(
    ("made", "pays"),
    [
        (point(14, 0.3, 512), True),  # measured 0.63 of the dense time
        (point(2, 0.3, 512), False),  # 2.46
        (matrix(512, 512, 0.1), False),  # 1.05
        (matrix(512, 512, 0.2), False),  # 2.1 to 2.4
        (matrix(4096, 1024, 0.1), True),  # 0.33
    ],
)
def test_the_decision_at_layers_that_were_timed(made: ModelProto, pays: bool) -> None:
    verdict = verdict_of(made, isa="avx512")
    assert bool(verdict.block) == pays
    assert verdict.reason.startswith(f"predicted {min(verdict.times.values()):.2f} of the dense time")
    assert ("pays below" in verdict.reason) != pays


def test_times_grow_with_the_stored_share() -> None:
    works = [
        cost.Work("conv", 64, 576, 196, 9, 196),
        cost.Work("conv", 64, 64, 4, 1, 4, False),
        cost.Work("linear", 300, 784, 1, 1, 1),
        cost.Work("linear", 300, 784, 50, 1, 50),
    ]
    for work in works:
        for name, isa in cost.ISAS.items():
            for block in cost.BLOCKS:
                times = [cost.relative_time(work, share, block, isa) for share in (0.01, 0.1, 0.4, 1.0)]
                assert times == sorted(times), (work, name)
                assert 0 < times[0] < times[-1], (work, name)


def test_a_file_for_any_machine_counts_the_worst() -> None:
    made = point(7, 0.2)
    alone = {isa: verdict_of(made, isa=isa).times for isa in COMMON_ISAS}
    for block, time in verdict_of(made).times.items():
        assert time == max(times[block] for times in alone.values())


def test_a_verdict_on_free_sizes_says_that_they_are_assumed() -> None:
    free, fixed = verdict_of(point("h", 0.2, 16)), verdict_of(point(224, 0.2, 16))
    assert free.times == pytest.approx(fixed.times, rel=0.2)
    assert "50176 positions (assumed)" in free.reason
    assert "assumed" not in fixed.reason


def test_tiles_fit_the_registers() -> None:
    """The sums of a tile, its broadcast weights and one input vector are live at once."""
    for isa in cost.ISAS.values():
        for block in cost.BLOCKS:
            assert isa.tile(block) >= 1
            assert isa.tile(block) * block + block <= isa.registers


@pytest.mark.parametrize("isa", sorted(SAMPLES))
def test_of_the_timed_layers_that_were_to_pay_nearly_all_did(isa: str) -> None:
    timed = [
        (cost.relative_time(layer.work, stored, block, cost.ISAS[isa]), time / layer.dense)
        for layer in SAMPLES[isa].layers
        for block, stored, time in layer.sparse
    ]
    chosen = [measured < 1 for predicted, measured in timed if predicted < cost.pays_below()]
    assert len(chosen) > 300
    assert np.mean(chosen) > 0.96
    assert sum(chosen) > 0.8 * sum(measured < 1 for _, measured in timed)  # not by leaving everything dense


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    random = np.random.default_rng(1)
    isa = cost.ISAS[cost.REFERENCE]
    true = {name: value * random.uniform(0.5, 2) for name, value in cost.fitted(isa).items()}
    true |= {"layout.call": 900.0, "layout.float": 0.06}
    layers = []
    for layer in SAMPLES[cost.REFERENCE].layers[::2]:
        times = tuple(
            (block, share, cost.sparse_time(layer.work, share, block, isa, true)) for block, share, _ in layer.sparse
        )
        layers.append(fit_cost.Timed(layer.work, cost.dense_time(layer.work, isa, true), times))
    changes = [(floats, 900 + 0.06 * floats) for floats in (100, 10_000, 1_000_000)]
    machine = {"cpu": "made up", "onnxruntime": "0"}
    found = fit_cost.fit({cost.REFERENCE: fit_cost.Samples(machine, layers, changes)})
    assert found["pays_below"] == fit_cost.WIDEST
    fitted = found["fits"][cost.REFERENCE]
    assert fitted["spread"]["dense"] < 0.03
    assert fitted["spread"]["sparse"] < 0.03
    assert fitted["constants"]["layout.float"] == pytest.approx(0.06, rel=0.02)


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    fit_cost.write_samples(path, SAMPLES)
    assert fit_cost.read_samples(path) == SAMPLES


VARIANTS: dict[str, tuple[list[NodeProto], dict[str, tuple[int, ...]]]] = {
    "pooling alone": ([node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2])], {}),
    "residual": (
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Add", ["c", "x"], ["d"]),
            node("Relu", ["d"], ["e"]),
            node("Conv", ["e", "v"], ["y"]),
        ],
        {"w": (64, 64, 1, 1), "v": (64, 64, 1, 1)},
    ),
    "two branches": (
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["x", "v"], ["d"]),
            node("Add", ["c", "d"], ["e"]),
            node("GlobalAveragePool", ["e"], ["f"]),
            node("Flatten", ["f"], ["y"]),
        ],
        {"w": (64, 64, 1, 1), "v": (64, 64, 1, 1)},
    ),
    "separable": (
        [node("Conv", ["x", "w"], ["c"], group=64), node("Relu", ["c"], ["d"]), node("Conv", ["d", "v"], ["y"])],
        {"w": (64, 1, 3, 3), "v": (32, 64, 1, 1)},
    ),
    "softmax between": (
        [node("Conv", ["x", "w"], ["c"]), node("Softmax", ["c"], ["d"]), node("Conv", ["d", "v"], ["y"])],
        {"w": (64, 64, 1, 1), "v": (64, 64, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_layouts_change_where_onnxruntime_changes_them(name: str) -> None:
    nodes, shapes = VARIANTS[name]
    made = onnx.shape_inference.infer_shapes(
        model(nodes, ["n", 64, 8, 8], {key: values(*shape) for key, shape in shapes.items()})
    )
    kinds = [entry.op_type for entry in optimised(made).graph.node if entry.domain == NCHWC]
    if not kinds:
        pytest.skip("this onnxruntime has no blocked layout on this machine")
    moved = Layout(made.graph, sizes_of(made).sizes).changes(())
    assert len(moved) == sum(kind.startswith("Reorder") for kind in kinds)


def test_a_layer_among_dense_ones_must_pay_for_the_layout() -> None:
    """Two changes of 64 x 16 x 16 floats each; what is saved is a little less, or a little more, than that."""
    shapes = {"w": (64, 64, 1, 1), "v": (64, 64, 1, 1), "u": (64, 64, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["a", "v"], ["b"]),
        node("Conv", ["b", "u"], ["y"]),
    ]
    made = model(nodes, ["n", 64, 16, 16], {key: values(*shape) for key, shape in shapes.items()})
    layout = Layout(made.graph, sizes_of(made).sizes)
    price = cost.layout_time([64 * 16 * 16] * 2) / 1e3
    for factor, kept in ((0.9, set()), (1.1, {"b"})):
        assert worth_it({"b": price * factor}, layout, lambda sparse: ()) == kept
    # The first of two neighbours needs no change of its own: the input comes plain.
    assert worth_it({"a": price, "b": price * 0.9}, layout, lambda sparse: ()) == {"a", "b"}


def test_a_layer_without_changes_of_layout_computes_as_much() -> None:
    """The same multiset of numbers, channels permuted: a layer of random weights on a constant input."""
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["y"])]
    made = model(nodes, [1, 32, 5, 5], {"w": values(48, 32, 1, 1)})
    bare = without_layout_changes(made)
    assert not [entry for entry in bare.graph.node if entry.op_type.startswith("Reorder")]
    x = {"x": np.ones((1, 32, 5, 5), np.float32)}
    expected, found = run(session(made.SerializeToString()), x)[0], run(session(bare.SerializeToString()), x)[0]
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(expected.ravel()), rtol=1e-5, atol=1e-5)


def test_copies_of_a_layer_all_compute() -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], [3, 8], {"w": values(8, 5)})
    x = {"x": values(3, 8)}
    expected = run(session(made.SerializeToString()), x)[0]
    outputs = run(session(repeated(made, 4).SerializeToString()), x)
    assert len(outputs) == 4
    for output in outputs:
        np.testing.assert_allclose(output, expected, rtol=1e-6)
    assert len({tensor.name for tensor in repeated(made, 4).graph.initializer}) == 4
