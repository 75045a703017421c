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
