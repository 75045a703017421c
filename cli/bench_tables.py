"""What `sparsepipe bench` prints of its results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from sparsepipe.cli import common
from sparsepipe.reporting import units

Row = Mapping[str, Any]


def files(result: Row) -> None:
    """A row for each file and setting."""
    with_int8 = any(row.get("speedup_over_int8") for row in result["results"])
    over_int8 = ["over dense int8"] if with_int8 else []
    common.print_table(
        [
            "file", "threads", "batch", "p50 ms", "p90 ms", "p99 ms", "speed-up", *over_int8, "load ms", "first ms",
            "memory", "file",
        ],
        [
            [
                row["file"],
                row["threads"],
                row["batch"],
                *(_interval(row["latency_ms"].get(name)) for name in ("p50", "p90", "p99")),
                _interval(row["speedup"]),
                *([_interval(row.get("speedup_over_int8"))] if with_int8 else []),
                row["load_ms"],
                row["first_call_ms"],
                units.size(row["rss_bytes"]),
                units.size(row["file_bytes"]),
            ]
            for row in result["results"]
        ],
    )  # fmt: skip
    given = {
        " ".join(f"{name} {'x'.join(map(str, shape))}" for name, (_, shape) in row["inputs"].items())
        for row in result["results"]
        if row["inputs"]
    }
    if given:
        click.echo(f"Inputs: {'; '.join(sorted(given))}.")
    _quiet(result["results"], result.get("verdicts", []))
    _notes([(f"{row['file']}, {_setting(row)}", row["note"]) for row in result["results"]])


def peers(result: Row) -> None:
    """A row for each runtime and setting: how far its outputs are off, then how long it takes."""
    common.print_table(
        ["runtime", "threads", "batch", "error", "top-1 same", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "speed-up"],
        [
            [
                row["file"],
                row["threads"],
                row["batch"],
                _number((row["fidelity"] or {}).get("max_relative_error")),
                _share((row["fidelity"] or {}).get("top1_agreement")),
                *(_interval(row["latency_ms"].get(name)) for name in ("p50", "p90", "p99")),
                row["cpu_ms"],
                _interval(row["speedup"]),
            ]
            for row in result["results"]
        ],
        title="Speed-up over dense onnxruntime; error of the outputs in times of the largest one",
    )
    click.echo(f"int8 was calibrated, and outputs were compared, on {result['samples']}.")
    for name, settings in result["peers"].items():
        click.echo(f"{name} was set to: {settings}.")
    _quiet(result["results"], result["verdicts"])
    _notes([(f"{row['file']}, {_setting(row)}", row["note"]) for row in result["results"]])


def what_if(result: Row) -> None:
    """A row for each sparsity, pattern and setting: sparse beside dense."""
    from sparsepipe.reporting import verdicts

    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in result["input"].items())
    with_int8 = any("int8" in row for row in result["results"])
    int8_headers = ["dense int8 p50 ms", "over dense int8"] if with_int8 else []
    common.print_table(
        [
            "sparsity", "pattern", "threads", "batch", "dense p50 ms", "sparse p50 ms", "speed-up", *int8_headers,
            "file", "memory", "load ms", "layers sparse",
        ],
        [
            [
                f"{row['sparsity']:.4g}",
                row["pattern"],
                row["threads"],
                row["batch"],
                _interval(row["dense"]["latency_ms"]["p50"]),
                _interval(row["sparse"]["latency_ms"]["p50"]),
                _interval(row["sparse"]["speedup"]) if row["layers_sparse"] or "int8" in row else None,
                *_over_int8(row),
                *(_beside(row, key) for key in ("file_bytes", "rss_bytes")),
                f"{_number(row['sparse']['load_ms'])} of {_number(row['dense']['load_ms'])}",
                f"{row['layers_sparse']} of {row['layers_sparse'] + row['layers_dense']}",
            ]
            for row in result["results"]
        ],
        title=f"What if {result['model']} were sparse ({shapes}; random weights and zeros)",
    )  # fmt: skip
    errors = [row["max_relative_error"] for row in result["results"]]
    dense = "plain int8 files in" if with_int8 else "dense"
    click.echo(f"Largest difference of the outputs from {dense} onnxruntime: {max(errors):.1e} of the largest output.")
    lines = [
        (f"{kind} at {row['pattern']} {row['sparsity']:.4g}, {_setting(row)}", row[kind])
        for row in result["results"]
        for kind in ("dense", "int8", "sparse")
        if kind in row
    ]
    if dense_still := [
        f"{row['pattern']} {row['sparsity']:.4g}" for row in result["results"] if not row["layers_sparse"]
    ]:
        click.echo(
            f"No layer is sparse at {', '.join(dict.fromkeys(dense_still))}, because none would be faster: that file "
            f"computes what the dense {'int8 ' if with_int8 else ''}one does, and no speed-up over it is shown."
        )
    _quiet([row for _, row in lines], [])
    if races := result.get("verdicts"):
        click.echo(verdicts.summary(races))
    _notes([(place, row["note"]) for place, row in lines])


def suite(result: Row) -> None:
    """The tables of speed, and what each file needs in a process of its own."""
    from sparsepipe.reporting import peers as beside
    from sparsepipe.reporting import speed

    if result["suite"] == "peers":
        for table in beside.tables(result):
            common.print_table(table.headers, table.rows, title=table.title)
        for remark in beside.remarks(result):
            click.echo(remark)
        return
    for table in (*speed.tables(result), speed.needs(result)):
        common.print_table(table.headers, table.rows, title=table.title)
    for remark in speed.remarks(result):
        click.echo(remark)


def edge(result: Row) -> None:
    """What `files` shows, and a row for each file with what a device asks for."""
    files(result)
    common.print_table(
        ["file", "cold start ms", "size", "gzip", "memory", "peak", "energy of a call", "with the limit"],
        [
            [
                row["file"],
                _number(None if row["load_ms"] is None else row["load_ms"] + row["first_call_ms"]),
                units.size(row["file_bytes"]),
                units.size(row["gzip_bytes"]),
                units.size(row["rss_bytes"]),
                units.size(row["peak_rss_bytes"]),
                "not readable" if row["energy"]["joules"] is None else f"{row['energy']['joules']:.3g} J",
                _limit(row["limit"]),
            ]
            for row in result["results"]
        ],
        title="One thread, pinned, batch 1 (cold start: loading and the first call in a fresh process)",
    )
    for note in dict.fromkeys(row["energy"]["note"] for row in result["results"]):
        click.echo(f"{note[0].upper()}{note[1:]}.")
    for row in result["results"]:
        if row["limit"] and row["limit"]["reason"]:
            click.echo(f"{row['file']} does not fit into {units.size(row['limit']['bytes'])}: {row['limit']['reason']}")
    limit = next((row["limit"] for row in result["results"] if row["limit"]), None)
    if limit:
        click.echo(f"The limit: {limit['how']}.")


def _limit(limit: Row | None) -> str | None:
    if limit is None:
        return None
    return f"{'fits' if limit['fits'] else 'does not fit'} into {units.size(limit['bytes'])}"


SHOW = {"edge": edge, "ONNX files": files, "--peers": peers, "--model": what_if, "--suite": suite}
"""Form of the command -> how its result is shown."""


def _quiet(rows: Sequence[Row], found: Sequence[Row]) -> None:
    """What is to be thought of the machine: a verdict for each setting that has one, a count for all others."""
    from sparsepipe.reporting import verdicts

    rest = [row for row in rows if not any(verdicts.of_setting(verdict, row) for verdict in found)]
    if noisy := sum(row["noisy"] for row in rest):
        click.echo(
            f"The machine was noisy in {noisy} of {len(rest)} measurements of wall time: small differences are noise."
        )
    for verdict in found:
        click.echo(verdicts.sentence(verdict, rows))


def _notes(notes: Sequence[tuple[str, str | None]]) -> None:
    """Each note once, with the measurements that it is about; notes that differ in numbers alone count as one."""
    places: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for place, note in notes:
        if note:
            kind = re.sub(r"\d+", "#", note)
            first.setdefault(kind, note)
            places.setdefault(kind, []).append(place)
    for kind, found in places.items():
        others = f" (and so in {len(found) - 1} other measurements)" if len(found) > 1 else ""
        click.echo(f"{found[0]}: {first[kind]}{others}")


def _setting(row: Row) -> str:
    return f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}, batch {row['batch']}"


def _over_int8(row: Row) -> list[str | None]:
    """Latency of the dense int8 file, and the speed-up over it; nothing where it was not measured."""
    if "int8" not in row:
        return []
    gain = row["sparse"]["speedup_over_int8"] if row["layers_sparse"] else None
    return [_interval(row["int8"]["latency_ms"]["p50"]), _interval(gain)]


def _beside(row: Row, key: str) -> str:
    return f"{units.size(row['sparse'][key])} of {units.size(row['dense'][key])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(estimate: Row | None) -> str | None:
    """A value with its 95% interval."""
    if estimate is None:
        return None
    return f"{estimate['value']:.3g} ({estimate['low']:.3g}–{estimate['high']:.3g})"
