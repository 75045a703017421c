"""The tables of a profile, as text: for the terminal, for documents and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsepipe.reporting import units
from sparsepipe.reporting.markdown import Table

Row = Mapping[str, Any]


def tables(result: Row) -> list[Table]:
    """A row for each layer, and one for each kind of other work."""
    compared = any(row["dense"] for row in result["layers"])
    heads = ["layer", "runs as", "zeros", "time", "share", "GFLOP/s", "of peak", "bandwidth", "of memory's"]
    heads += [*(["dense", "speed-up", "fewer products"] if compared else []), "why not faster"]
    layers = Table(f"Layers of {result['file']}", heads, [_cells(row, compared) for row in result["layers"]])
    total = result["total"]["us"]
    other = Table(
        "Other work",
        ["operator", "what", "count", "time", "share"],
        [
            [row["op"] or units.MISSING, row["what"], str(row["count"]), micro(row["us"]), share(row["us"] / total)]
            for row in result["other"]
        ],
    )
    return [layers, other]


def remarks(result: Row) -> list[str]:
    """The machine's limits, the whole call, and how all of it was measured."""
    roof, total = result["roofline"], result["total"]
    whole = f"One call takes {micro(total['us'])}: layers {micro(total['layers_us'])}"
    if dense := result.get("dense"):
        whole += f"; {result['against']} {micro(dense['total']['us'])}: layers {micro(dense['total']['layers_us'])}"
    return [
        f"{whole} (profiled, {units.plural(result['threads'], 'thread')}, batch {result['batch']}, "
        f"{total['calls']} calls).",
        f"This machine: {roof['peak_gflops']:.0f} GFLOP/s ({roof['peak_by']}), {roof['memory_gbs']:.1f} GB/s from and "
        f"to memory, {roof['cache_gbs']:.0f} GB/s in the L2 cache, {roof['overhead_us']:.2g} us an operator. "
        "More than 100% of memory's bandwidth: the caches held a part.",
        *(f"{name[0].upper()}{name[1:]}: {meaning}." for name, meaning in result["reasons"].items()),
        f"{result['method']} {roof['method'].capitalize()}.",
    ]


def markdown(result: Row) -> str:
    """All of it for a document."""
    lines = "\n".join(f"- {remark}" for remark in remarks(result))
    return "\n\n".join([*(table.markdown() for table in tables(result)), lines])


def micro(value: float | None) -> str:
    """Microseconds as a person reads them."""
    if value is None:
        return units.MISSING
    return units.milliseconds(value / 1e3) if value >= 999.5 else f"{value:.1f}\u202fus"


def share(value: float | None) -> str:
    """A fraction without decimals."""
    return units.percent(value, 0)


def _cells(row: Row, compared: bool) -> list[str]:
    dense = row["dense"] or {}
    beside = [micro(dense.get("us")), units.ratio(dense.get("speedup")), units.ratio(dense.get("fewer_operations"))]
    return [
        row["name"],
        f"{row['op']} {row['stored_as']}" if row["stored_as"] != "dense" else row["op"],
        units.percent(1 - row["density"], 1),
        micro(row["us"]),
        share(row["share"]),
        units.MISSING if row["gflops"] is None else f"{row['gflops']:.1f}",
        share(row["peak_share"]),
        units.MISSING if row["bandwidth_gbs"] is None else f"{row['bandwidth_gbs']:.1f}\u202fGB/s",
        share(row["bandwidth_share"]),
        *(beside if compared else []),
        ", ".join(row["reasons"]),
    ]
