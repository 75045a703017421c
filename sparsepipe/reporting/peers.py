"""The tables and the picture of the suite `peers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepipe.artefact import digest_bytes
from sparsepipe.benchmark.records import OURS
from sparsepipe.reporting import units, verdicts
from sparsepipe.reporting.contents import Estimate
from sparsepipe.reporting.markdown import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
BASELINE = "onnxruntime"
MARK_KEY = "Description"
"""Where a picture says what it shows, among the texts of a PNG file."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
"""Marker and line of a runtime, so that the picture needs no colour. Their numbers share no factor: 28 pairs differ."""
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.4
LEGEND_HANDLE, LEGEND_LETTER, LEGEND_LINE = 0.8, 0.08, 0.22
"""Inches that an entry of the legend takes: beside its name, for each letter of it, in height."""


def tables(result: Row) -> list[Table]:
    """Speed in times of dense onnxruntime, and how far the outputs are off: a row for each network and runtime."""
    sparsities = sorted({row["sparsity"] for row in result["rows"]})
    heads = [f"{100 * sparsity:.4g}%" for sparsity in sparsities]
    rows = []
    for title, runtime, threads in _lines(result):
        cells = [_find(result, title, sparsity, runtime, threads) for sparsity in sparsities]
        show = _latency if runtime == BASELINE else _speedup
        rows.append([title, runtime, threads, *(show(cell) for cell in cells), *_fidelity(cells)])
    return [
        Table(
            "Times faster than dense fp32 onnxruntime in the same turns, with 95% intervals; of onnxruntime itself the "
            "median latency, with its interval. `!` marks a noisy measurement, or a race in which two processes of the "
            "same file differed too much. Of all sparsities, the largest error of the outputs in times of "
            "the largest output of dense onnxruntime, and the smallest share of samples with the same top-1 class",
            ["network", "runtime", "threads", *heads, "error", "top-1 same"],
            rows,
        ),
    ]


def remarks(result: Row) -> list[str]:
    """How and on what it was measured, and what must be said about the figures."""
    environment = result["environment"]
    versions = sorted(
        {f"{one['runtime']} {one['version']}" for row in result["rows"] for one in row["runtimes"] if "version" in one}
    )
    dates = sorted({row["measured"][:10] for row in result["rows"]})
    found = [
        result["method"],
        f"{environment['cpu']} ({', '.join(environment['isa'])}), {', '.join(versions)}, "
        f"{result['settings']['seconds']:g} s for each runtime and setting, "
        f"{', '.join(dates) or 'nothing measured yet'}.",
        verdicts.summary([verdict for row in result["rows"] for verdict in row["verdicts"]]),
    ]
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for row in result["rows"]:
        for one in row["results"]:
            if not one["samples"]:
                notes.setdefault((one["runtime"], one["note"]), {})[row["title"]] = None
    return found + [f"{runtime} ({', '.join(titles)}): {note}." for (runtime, note), titles in notes.items()]


def markdown(result: Row, *, link: str = "") -> str:
    """All tables for a document, under the picture that `link` leads to, if any."""
    parts = [f"![Times faster than dense onnxruntime by sparsity, in each runtime]({link})"] if link else []
    parts += [table.markdown() for table in tables(result)]
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in remarks(result))])


def picture(result: Row, path: Path) -> None:
    """Write `figure` as PNG, with the `mark` of what it shows."""
    figure(result).savefig(path, format="png", dpi=130, metadata={MARK_KEY: mark(result)})


def mark(result: Row) -> str:
    """A digest of the rows, which tells whether a picture was drawn from them."""
    return digest_bytes(json.dumps(result["rows"], sort_keys=True).encode())


def figure(result: Row) -> Figure:
    """Draw speed-up against sparsity, a panel for each network.

    Lines differ by marker and dashes; a bar at each point is the 95% interval, the level 1 is dense onnxruntime.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(row["title"] for row in result["rows"]))
    lines = [line for line in _lines(result) if line[1] != BASELINE]
    runtimes = list(dict.fromkeys(runtime for _, runtime, _ in lines))
    first = lines[0][2] if lines else "1"
    columns = min(3, max(len(titles), 1))
    height = -(-max(len(titles), 1) // columns)
    width = PANEL_WIDTH * columns
    beside = max(int(width / (LEGEND_HANDLE + LEGEND_LETTER * max(map(len, runtimes), default=0))), 1)
    legend = LEGEND_LINE * (-(-len(runtimes) // beside) + 1)
    page = Figure(figsize=(width, PANEL_HEIGHT * height + legend), layout="constrained")
    FigureCanvasAgg(page)
    drawn: dict[str, Any] = {}
    for place, title in enumerate(titles):
        axes = page.add_subplot(height, columns, place + 1)
        sparsities = sorted({row["sparsity"] for row in result["rows"] if row["title"] == title})
        for number, runtime in enumerate(runtimes):
            cells = [(one, _find(result, title, one, runtime, first)) for one in sparsities]
            points = [(100 * one, cell["speedup"]) for one, cell in cells if cell and cell["speedup"]]
            if not points:
                continue
            drawn[runtime] = axes.errorbar(
                [x for x, _ in points],
                [gain["value"] for _, gain in points],
                yerr=[
                    [max(gain["value"] - gain["low"], 0) for _, gain in points],
                    [max(gain["high"] - gain["value"], 0) for _, gain in points],
                ],
                color=f"C{number}",
                marker=MARKERS[number % len(MARKERS)],
                linestyle=DASHES[number % len(DASHES)],
                linewidth=2.6 if runtime.startswith(OURS) else 1.3,
                markersize=6,
                capsize=3,
            )
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_xticks([100 * one for one in sparsities], [f"{100 * one:.4g}" for one in sparsities])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("sparsity, %")
        axes.set_ylabel(f"faster than dense onnxruntime, {first} thread{'' if first == '1' else 's'}", fontsize=8)
    shown = [runtime for runtime in runtimes if runtime in drawn]  # some run in some of the networks only
    if shown:
        handles = [drawn[runtime] for runtime in shown]
        page.legend(handles, shown, loc="outside lower center", ncols=beside, handlelength=4, fontsize=9)
    return page


def _lines(result: Row) -> list[tuple[str, str, str]]:
    """Title, runtime and threads of each line, in the order of the file."""
    return list(
        dict.fromkeys(
            (row["title"], one["runtime"], str(one["threads"])) for row in result["rows"] for one in row["results"]
        )
    )


def _find(result: Row, title: str, sparsity: float, runtime: str, threads: str) -> Row | None:
    rows: Sequence[Row] = result["rows"]
    for row in rows:
        if (row["title"], row["sparsity"]) == (title, sparsity):
            noisy = any(verdict["noisy"] for verdict in row["verdicts"] if str(verdict["threads"]) == threads)
            for one in row["results"]:
                if (one["runtime"], str(one["threads"])) == (runtime, threads):
                    return {**one, "noisy": noisy or one["noisy"]}
    return None


def _latency(cell: Row | None) -> str:
    estimate = cell and cell["latency_ms"]["p50"]
    if not cell or not estimate:
        return units.MISSING
    bounds = units.milliseconds_interval(Estimate(**estimate))
    return f"{units.milliseconds(estimate['value'])} ({bounds}){'!' if cell['noisy'] else ''}"


def _speedup(cell: Row | None) -> str:
    gain = cell and cell["speedup"]
    if not cell or not gain:
        return units.MISSING
    return f"{gain['value']:.2f} ({gain['low']:.2f}–{gain['high']:.2f}){'!' if cell['noisy'] else ''}"


def _fidelity(cells: Sequence[Row | None]) -> tuple[str, str]:
    known = [cell["fidelity"] for cell in cells if cell and cell["fidelity"]]
    errors = [facts["max_relative_error"] for facts in known if facts["max_relative_error"] is not None]
    shares = [facts["top1_agreement"] for facts in known if facts["top1_agreement"] is not None]
    return (
        f"{max(errors):.1e}" if errors else units.MISSING,
        f"{min(shares):.0%}" if shares else units.MISSING,
    )
