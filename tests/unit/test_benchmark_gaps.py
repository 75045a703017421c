"""Reasons for a gap, against times that the roofline gives by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsepipe.benchmark import roofline
from sparsepipe.benchmark.gaps import LEGEND, Measured, legend, reasons
from sparsepipe.benchmark.layer_work import LayerWork
from sparsepipe.benchmark.roofline import Roofline

ROOF = Roofline(
    threads=1, peak_gflops=100.0, peak_by="", memory_gbs=10.0, cache_gbs=100.0, cache_bytes=1 << 20, overhead_us=1.0
)  # fmt: skip
# 10,000 nonzeros of 100,000 at 1,000 positions: 20 MFLOP, 200 us at 100 GFLOP/s; dense 200 MFLOP, 2000 us.
WORK = LayerWork(
    "n", "w", "Conv", (100, 1000), nnz=10_000, size=100_000, parameter_bytes=0, positions=1_000, stored_as="csr"
)


def test_times_of_the_roofline() -> None:
    layer = Measured(WORK, us=250.0, bytes=4_000_000, sparse=True, roof=ROOF)
    assert layer.arithmetic_us == pytest.approx(200.0)
    assert layer.moving_us == pytest.approx(400.0)  # 4 MB are more than half of the cache: 10 GB/s
    assert replace(layer, bytes=500_000).moving_us == pytest.approx(5.0)  # 100 GB/s
    assert layer.attainable_us == pytest.approx(400.0)


def test_zeros_that_are_computed_come_first() -> None:
    found = reasons(Measured(WORK, us=2_500.0, bytes=4_000_000, sparse=False, roof=ROOF))
    assert found == ["dense operator (90% zeros)"]


def test_bytes_are_named_where_they_take_longer_than_arithmetic() -> None:
    found = reasons(Measured(WORK, us=500.0, bytes=4_000_000, sparse=True, roof=ROOF))
    assert found == ["memory bound (80% of a copy's rate in memory)"]


def test_a_layer_near_its_arithmetic_has_no_reason() -> None:
    assert reasons(Measured(WORK, us=215.0, bytes=4_000, sparse=True, roof=ROOF)) == []


def test_what_no_price_explains_is_told_by_the_shape() -> None:
    work = replace(WORK, shape=(2_000, 100, 1, 1), positions=49)
    found = reasons(Measured(work, us=100.0, bytes=4_000, sparse=True, roof=ROOF))
    assert found == ["small map (49 outputs)", "short rows (5.0 each)", "unstructured"]
    blocks = replace(work, shape=(100, 100, 3, 3), stored_as="bsr 4x1", positions=1024)
    found = reasons(Measured(blocks, us=2_000.0, bytes=4_000, sparse=True, roof=ROOF))
    assert found == ["window (3x3)"]
    row = replace(WORK, positions=1)
    assert reasons(Measured(row, us=100.0, bytes=4_000, sparse=False, roof=ROOF)) == ["one row"]


def test_overhead_is_named_where_it_weighs() -> None:
    work = replace(WORK, nnz=100, size=100, positions=10)
    found = reasons(Measured(work, us=1.2, bytes=400, sparse=False, roof=ROOF))
    assert found == ["overhead (1 us)"]


def test_every_reason_has_a_meaning_and_only_those_that_occur_are_told() -> None:
    assert list(legend(["unstructured", "small map (49 outputs)"])) == ["small map", "unstructured"]
    assert legend([]) == {}
    assert set(legend(LEGEND)) == set(LEGEND)


def test_the_machine_can_be_measured() -> None:
    found = roofline.measure(1, seconds=0.1)
    assert min(found.peak_gflops, found.memory_gbs, found.cache_gbs) > 0
    assert found.overhead_us >= 0
    assert found.ridge == pytest.approx(found.peak_gflops / found.memory_gbs)
    assert found.peak_by in ("a dense MatMul of onnxruntime", "a SparseLinear without zeros, in blocks of 4x1")
