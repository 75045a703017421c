"""What `sparsepipe bench` prints below its table: every note once."""

from __future__ import annotations

from typing import Any

import pytest

from sparsepipe.cli import bench_tables


def row(file: str, threads: int, note: str | None, *, noisy: bool) -> dict[str, Any]:
    return {
        "file": file, "threads": threads, "batch": 1, "latency_ms": {"p50": None}, "speedup": None, "load_ms": None,
        "first_call_ms": None, "rss_bytes": None, "file_bytes": 10, "inputs": None, "noisy": noisy, "note": note,
    }  # fmt: skip


def test_notes_that_differ_in_numbers_alone_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    disturbed = "other processes disturbed {} of 28 blocks; all were kept"
    rows = [
        row("a.onnx", 1, disturbed.format(28), noisy=True),
        row("b.onnx", 1, disturbed.format(27), noisy=True),
        row("a.onnx", 2, "the process ended with signal 9", noisy=False),
        row("b.onnx", 2, None, noisy=False),
        row("c.onnx", 2, disturbed.format(15), noisy=True),
    ]
    bench_tables.files({"results": rows})
    below = capsys.readouterr().out.splitlines()[-3:]
    assert below == [
        "The machine was noisy in 3 of 5 measurements of wall time: small differences are noise.",
        "a.onnx, 1 thread, batch 1: other processes disturbed 28 of 28 blocks; all were kept (and so in 2 other "
        "measurements)",
        "a.onnx, 2 threads, batch 1: the process ended with signal 9",
    ]


@pytest.mark.parametrize(
    ("rows_noisy", "pair_noisy", "expected"),
    [((False, False), False, "quiet"), ((True, True), False, "noisy"), ((False, False), True, "noisy")],
)
def test_a_setting_has_one_verdict_on_the_machine(
    rows_noisy: tuple[bool, bool], pair_noisy: bool, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(f"{name}.onnx", 1, None, noisy=noisy) for name, noisy in zip("ab", rows_noisy, strict=True)]
    verdict = {
        "threads": 1, "batch": 1, "difference": 0.001, "limit": 0.03, "noisy": pair_noisy, "blocks": 40,
        "blocks_disturbed": 3, "conditions": {"note": "a clock of 2 GHz"},
    }  # fmt: skip
    bench_tables.files({"results": rows, "verdicts": [verdict]})
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "noisy" in line or "quiet" in line]
    assert told.startswith(f"1 thread, batch 1: {expected} machine: two runs of the same file differed by 0.1%")
    assert ("2 of 2 measurements" in told) == rows_noisy[0]


def test_a_network_without_a_sparse_layer_has_no_speed_up(capsys: pytest.CaptureFixture[str]) -> None:
    gain = {"value": 1.025, "low": 1.015, "high": 1.035}
    timed = {"latency_ms": {"p50": None}, "speedup": gain, "load_ms": 1.0, "file_bytes": 1, "rss_bytes": 1,
             "noisy": False, "note": None}  # fmt: skip
    results = [
        {"sparsity": sparsity, "pattern": "unstructured", "threads": 1, "batch": 1, "dense": timed, "sparse": timed,
         "layers_sparse": sparse, "layers_dense": 3 - sparse, "max_relative_error": 0.0}
        for sparsity, sparse in ((0.8, 0), (0.95, 2))
    ]  # fmt: skip
    bench_tables.what_if({"model": "mlp", "input": {"x": [1, 784]}, "results": results})
    printed = capsys.readouterr().out
    first, second = (line for line in printed.splitlines() if "of 3" in line)
    assert "1.02" not in first
    assert "1.02 (1.01–1.03)" in second
    assert "No layer is sparse at unstructured 0.8, because none would be faster" in printed


def test_the_speed_over_dense_int8_is_shown_where_a_dense_int8_file_ran_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row("a.onnx", 1, None, noisy=False), row("b.onnx", 1, None, noisy=False)]
    bench_tables.files({"results": rows})
    assert "int8" not in capsys.readouterr().out
    rows[1]["speedup_over_int8"] = {"value": 2.0, "low": 1.75, "high": 2.25}
    bench_tables.files({"results": rows})
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).count("int8") == 1
    (line,) = [line for line in printed.splitlines() if "b.onnx" in line]
    assert "2 (1.75–2.25)" in line
