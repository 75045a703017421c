"""The edge profile: energy from counters made up here, limits that nothing and everything fits into, sizes."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.benchmark import energy, harness, limited
from sparsepipe.benchmark.results import file_facts, files_of
from sparsepipe.errors import RecipeError
from sparsepipe.recipe import Bench
from sparsepipe.stages import edge

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")


def write_model(path: Path, columns: int = 64) -> Path:
    weight = np.zeros((16, columns), np.float32)
    weight[0] = 1.0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_counter(root: Path, name: str, microjoules: int, most: int, what: str = "package-0") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{what}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_counters_of_whole_packages_are_found_and_turn_over(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0:0", 5, 10, "core")  # a part of a package
    write_counter(tmp_path, "intel-rapl:1", 5, 10, "psys")  # all of them, and more
    (tmp_path / "intel-rapl:2").mkdir()  # one that says nothing
    (write_counter(tmp_path, "intel-rapl:3", 5, 10) / "energy_uj").write_text("")  # one that cannot be read
    folder = write_counter(tmp_path, "intel-rapl:0", 950, 999)
    (found,) = energy.counters(tmp_path)
    assert found.read() == 950
    (folder / "energy_uj").write_text("30")
    assert found.since(950) == 80  # 950 to 999, one step to 0, and 30


def test_energy_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    found = energy.per_call("none.onnx", 1, {}, None, 0.1, 10.0, root=tmp_path)
    assert found["joules"] is None
    assert "not readable" in str(found["note"])


def test_energy_of_calls_is_that_of_the_counter(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 7, 999)
    found = energy.per_call(str(write_model(tmp_path / "m.onnx")), 1, {}, None, 0.01, 60.0, root=tmp_path)
    assert found["joules"] == 0.0  # the counter stood still
    assert int(str(found["calls"])) >= 1
    found = energy.per_call(str(tmp_path / "none.onnx"), 1, {}, None, 0.01, 60.0, root=tmp_path)
    assert (found["joules"], found["calls"]) == (None, 0)
    assert "no such ONNX file" in str(found["note"])


def spend(folder: Path, microjoules: int) -> None:
    """Count on as the hardware does: after the largest value comes 0."""
    value, most = (int((folder / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
    value += microjoules
    (folder / "energy_uj").write_text(str(value if value <= most else value - most - 1))


def test_joules_of_a_call_are_those_of_all_packages_while_the_calls_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_counter(tmp_path, "intel-rapl:0", 1_000, 262_143_328_850)
    second = write_counter(tmp_path, "intel-rapl:1", 65_532_000_000, 65_532_610_987, "package-1")
    part = write_counter(tmp_path, "intel-rapl:1:0", 0, 65_532_610_987, "core")
    asked: dict[str, dict[str, object]] = {}

    class Worker:
        """Takes 4 ms for its first call; to load costs energy, too."""

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *error: object) -> None:
            spend(first, 5_000_000)

        def ask(self, request: str, timeout: float, **arguments: object) -> dict[str, float]:
            asked[request] = {"timeout": timeout, **arguments}
            used = {"load": 70_000_000, "run": 2_000_000}[request]
            for folder in (first, second, part):
                spend(folder, used)
            spend(first, 500_000)
            return {"first_call_ms": 4.0}

    monkeypatch.setattr(energy, "WorkerProcess", Worker)
    found = energy.per_call("m.onnx", 8, {"x": [8, 3]}, [1], 0.5, 60.0, root=tmp_path)
    # 125 calls of 4 ms in half a second; 2.5 J of one package and 2 J of the other, which turned over while loading.
    assert found["calls"] == asked["run"]["count"] == 125
    assert found["joules"] == pytest.approx(4.5 / 125, rel=1e-9)
    assert asked["run"]["warmup"] == 0
    shared = {"runtime": "onnxruntime", "model": "m.onnx", "threads": 1, "batch": 8, "shapes": {"x": [8, 3]}}
    assert asked["load"].items() >= {**shared, "cpus": [1], "timeout": 60.0}.items()
    # There is one call at least, however long it takes; here a counter turns over while it runs.
    (second / "energy_uj").write_text(str(65_532_610_987 - 70_000_000 - 1_500_000))
    found = energy.per_call("m.onnx", 8, {"x": [8, 3]}, [1], 0.001, 60.0, root=tmp_path)
    assert (found["calls"], found["joules"]) == (1, pytest.approx(4.5, rel=1e-9))
    assert int((second / "energy_uj").read_text()) == 499_999


@linux
def test_a_process_with_little_memory_tells_whether_a_file_fits(tmp_path: Path) -> None:
    large = str(write_model(tmp_path / "large.onnx", columns=4 << 20))  # a weight of 256 MB
    enough = limited.fits(large, 4 << 30, 1, {}, 60.0)
    assert (enough["fits"], enough["reason"]) == (True, None)
    assert int(str(enough["peak_rss_bytes"])) > 256e6
    little = limited.fits(large, 200 << 20, 1, {}, 60.0)
    assert not little["fits"]
    assert little["reason"]
    assert limited.fits(str(write_model(tmp_path / "small.onnx")), 200 << 20, 1, {}, 60.0)["fits"]


def test_the_size_of_a_model_is_that_of_all_its_files(tmp_path: Path) -> None:
    held = onnx.load(write_model(tmp_path / "a.onnx", 64))
    whole = tmp_path / "outside.onnx"
    onnx.save(held, whole, save_as_external_data=True, location="weights.data", size_threshold=0)
    assert files_of(whole) == [whole, tmp_path / "weights.data"]
    assert file_facts(whole).bytes == sum((tmp_path / name).stat().st_size for name in ("outside.onnx", "weights.data"))
    for suffix in (".xml", ".bin"):
        (tmp_path / f"other{suffix}").write_bytes(b"12345")
    assert file_facts(tmp_path / "other.xml").bytes == 10


@linux
def test_the_profile_adds_what_a_device_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)
    paths = [write_model(tmp_path / "a.onnx"), write_model(tmp_path / "b.onnx", 8)]
    config = Bench(seconds=0.05, threads=(2,), batch=(4,), pin=False)
    result = edge.record(paths, config, tmp_path / "out", memory_limit=4 << 30).metrics
    assert (result["schema_version"], result["profile"]) == (1, "edge")
    assert [(row["threads"], row["batch"]) for row in result["results"]] == [(1, 1)] * 2
    assert result["environment"]["settings"]["pin"]
    for path, row in zip(paths, result["results"], strict=True):
        data = path.read_bytes()
        assert row["gzip_bytes"] == pytest.approx(len(zlib.compress(data, 9)), abs=20)  # 12 bytes of header more
        assert row["limit"]["fits"]
        assert row["energy"]["note"]
        assert row["load_ms"] > 0


@pytest.mark.parametrize(("text", "size"), [("256M", 256 << 20), ("1G", 1 << 30), ("512k", 512 << 10), ("7", 7)])
def test_amounts_of_memory(text: str, size: int) -> None:
    assert edge.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1M", "1.5G", "many"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount"):
        edge.parse_bytes(text)
