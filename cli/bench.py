"""`sparsepipe bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common


@click.command("bench")
@click.argument("onnx", nargs=-1, required=True, type=common.existing_path(dir_okay=False))
@click.option("--threads", multiple=True, type=int, help="Threads of the session (repeatable). Default: 1.")
@click.option("--batch", multiple=True, type=int, help="Batch size (repeatable). Default: 1.")
@click.option("--seconds", type=float, help="Measuring time for each file at each setting. Default: 6.")
@click.option("--pin/--no-pin", default=None, help="Pin each process to as many cores as it has threads.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result into this folder.")
@common.overrides_option
@common.output_options
def command(
    onnx: tuple[Path, ...],
    threads: tuple[int, ...],
    batch: tuple[int, ...],
    seconds: float | None,
    pin: bool | None,
    out: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure latency, memory and size of ONNX files, side by side.

    Every file runs in a process of its own; the processes take turns in short blocks, so that a change in the
    machine's speed meets all of them. The dense export, or else the first file, is the baseline of the speed-ups.
    """
    from sparsepipe.stages import bench

    flags = {"threads": threads, "batch": batch, "seconds": seconds, "pin": pin}
    config = common.section(onnx[0], "bench", overrides, flags)
    result = bench.measure(onnx, config) if out is None else bench.record(onnx, config, out).metrics
    if as_json:
        common.print_json(result)
        return
    common.print_table(
        ["file", "threads", "batch", "p50 ms", "p90 ms", "p99 ms", "speed-up", "load ms", "first ms", "memory", "file"],
        [
            [
                row["file"],
                row["threads"],
                row["batch"],
                *(_interval(row["latency_ms"].get(name)) for name in ("p50", "p90", "p99")),
                _interval(row["speedup"]),
                row["load_ms"],
                row["first_call_ms"],
                common.size_text(row["rss_bytes"]),
                common.size_text(row["file_bytes"]),
            ]
            for row in result["results"]
        ],
    )
    for row in result["results"]:
        place = f"{row['file']}, {row['threads']} threads, batch {row['batch']}"
        if row["note"]:
            click.echo(f"{place}: {row['note']}")
        if row["noisy"]:
            click.echo(f"{place}: the machine was noisy, so a small difference means nothing.")


def _interval(estimate: dict[str, Any] | None) -> str | None:
    """A value with its 95% interval."""
    if estimate is None:
        return None
    return f"{estimate['value']:.3g} ({estimate['low']:.3g}–{estimate['high']:.3g})"
