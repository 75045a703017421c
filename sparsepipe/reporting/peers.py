"""The tables and the picture of the suite `peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepipe.reporting import units
from sparsepipe.reporting.markdown import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
BASELINE, OURS = "onnxruntime", "sparsepipe"
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
"""Marker and line of a runtime, so that the picture needs no colour. Their numbers share no factor: 28 pairs differ."""
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.4
LEGEND_HANDLE, LEGEND_LETTER, LEGEND_LINE = 0.8, 0.08, 0.22
"""Inches that an entry of the legend takes: beside its name, for each letter of it, in height."""


def tables(result: Row) -> list[Table]:
    """Speed in times of dense onnxruntime, and how far the outputs are off: a row for each network and runtime."""
    sparsities = sorted({row["sparsity"] for row in result["rows"]})
    heads = [f"{100 * sparsity:.4g}%" for sparsity in sparsities]
    speeds, errors = [], []
    for title, runtime, threads in _lines(result):
        cells = [_find(result, title, sparsity, runtime, threads) for sparsity in sparsities]
        if runtime == BASELINE:
            speeds.append([title, runtime, threads, *(_latency(cell) for cell in cells)])
        else:
            speeds.append([title, runtime, threads, *(_speedup(cell) for cell in cells)])
            errors.append([title, runtime, threads, *(_fidelity(cell) for cell in cells)])
    return [
        Table(
            "Times faster than dense fp32 onnxruntime in the same turns, with 95% intervals; of onnxruntime itself the "
            "median latency. `!` marks a noisy measurement",
            ["network", "runtime", "threads", *heads],
            speeds,
        ),
        Table(
            "Largest error of the outputs in times of the largest output of dense onnxruntime, and share of samples "
            "with the same top-1 class",
            ["network", "runtime", "threads", *heads],
            errors,
        ),
    ]


def remarks(result: Row) -> list[str]:
    """How and on what it was measured, and what must be said about the figures."""
    environment = result["environment"]
    verdicts = [verdict for row in result["rows"] for verdict in row["verdicts"]]
    noisy = sum(verdict["noisy"] for verdict in verdicts)
    known = [verdict["difference"] for verdict in verdicts if verdict["difference"] is not None]
    versions = sorted(
        {f"{one['runtime']} {one['version']}" for row in result["rows"] for one in row["runtimes"] if "version" in one}
    )
    dates = sorted({row["measured"][:10] for row in result["rows"]})
    found = [
        result["method"],
        f"{environment['cpu']} ({', '.join(environment['isa'])}), {', '.join(versions)}, "
        f"{result['settings']['seconds']:g} s for each runtime and setting, "
        f"{', '.join(dates) or 'nothing measured yet'}.",
        f"The machine was noisy in {noisy} of {len(verdicts)} races"
        + (f"; two processes of the same file differed by up to {max(known):.1%}." if known else "."),
    ]
    notes = {
        (one["runtime"], one["note"]): row["title"]
        for row in result["rows"]
        for one in row["results"]
        if not one["samples"]
    }
    return found + [f"{runtime} ({title}): {note}." for (runtime, note), title in notes.items()]


def markdown(result: Row) -> str:
    """All tables for a document."""
    parts = [table.markdown() for table in tables(result)]
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in remarks(result))])


def picture(result: Row, path: Path) -> None:
    """Write `figure` in the format that the name of the file asks for."""
    figure(result).savefig(path, dpi=130)


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
                linewidth=2.6 if runtime == OURS else 1.3,
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
            for one in row["results"]:
                if (one["runtime"], str(one["threads"])) == (runtime, threads):
                    return dict(one)
    return None


def _latency(cell: Row | None) -> str:
    estimate = cell and cell["latency_ms"]["p50"]
    return units.milliseconds(estimate["value"] if estimate else None)


def _speedup(cell: Row | None) -> str:
    gain = cell and cell["speedup"]
    if not cell or not gain:
        return units.MISSING
    return f"{gain['value']:.2f} ({gain['low']:.2f}–{gain['high']:.2f}){'!' if cell['noisy'] else ''}"


def _fidelity(cell: Row | None) -> str:
    facts = cell and cell["fidelity"]
    if not facts or facts["max_relative_error"] is None:
        return units.MISSING
    agreement = facts["top1_agreement"]
    return f"{facts['max_relative_error']:.1e}" + ("" if agreement is None else f", {agreement:.0%}")
