"""Effective model complexity as a table and as a figure over sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsepipe.reporting.comparison import MARKERS, NARROW, STYLES
from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, count, percent


def table(result: Mapping[str, Any]) -> Table:
    """Means over seeds with half of their 95% intervals; `≥` marks rows where a search found a lower bound alone."""
    rows = []
    for line in result["table"]:
        bound = "≥ " if line["lower_bounds"] else ""
        means = line["means"]
        rows.append(
            [
                line["method"],
                MISSING if line["sparsity"] is None else percent(line["sparsity"], 1),
                str(len(line["seeds"])),
                count(means["nonzero"]["value"]) if means["nonzero"] else MISSING,
                bound + _mean(means["emc"], "{:.0f}"),
                bound + _mean(means["emc_per_nonzero"], "{:.3f}"),
                f"{line['lower_bounds']}/{len(line['seeds'])}",
            ]
        )
    title = (
        f"{result['recipe']}: largest sample fit, {result['inputs']} inputs, {result['labels']} labels, within "
        f"{100 * result['tolerance']:g}{NARROW}%; mean over seeds ± half of the 95% interval"
    )
    headers = ["method", "sparsity", "seeds", "nonzero parameters", "EMC", "EMC per nonzero", "lower bounds"]
    return Table(title, headers, rows)


def _mean(estimate: Mapping[str, Any] | None, form: str) -> str:
    if estimate is None:
        return MISSING
    text = form.format(estimate["value"])
    return text if estimate["high"] is None else f"{text} ± {form.format(estimate['high'] - estimate['value'])}"


def figure(result: Mapping[str, Any]) -> str | None:
    """EMC and EMC per nonzero against sparsity, a line for each method, as a standalone SVG.

    Dense training stands at sparsity 0. None before two points are known.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from sparsepipe.reporting.svg import DENSE, INK, SPARSE, STYLE, standalone, to_svg

    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in result["table"]:
        if line["means"]["emc"] and (line["sparsity"] is not None or line["method"] == "dense"):
            lines.setdefault(line["method"], []).append(line)
    if sum(map(len, lines.values())) < 2:
        return None
    panels = (("emc", "EMC (samples)"), ("emc_per_nonzero", "EMC per nonzero parameter"))
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasSVG(drawing)
        for (key, label), axes in zip(panels, drawing.subplots(1, 2), strict=True):
            for number, (method, found) in enumerate(lines.items()):
                found = sorted(found, key=lambda line: line["sparsity"] or 0.0)
                estimates = [line["means"][key] for line in found]
                axes.errorbar(
                    [line["sparsity"] or 0.0 for line in found],
                    [each["value"] for each in estimates],
                    yerr=[(each["high"] or each["value"]) - each["value"] for each in estimates],
                    label=method,
                    color=DENSE if method == "dense" else SPARSE if number < 2 else INK,
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=6,
                    linestyle=STYLES[number % len(STYLES)],
                    linewidth=1.4,
                    capsize=3,
                )
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}{NARROW}%"))
            axes.set_xlabel("sparsity")
            axes.set_ylabel(label)
        drawing.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, handlelength=3.2)
        text = to_svg(drawing, "emc", "Samples fit, and samples fit per nonzero parameter, against sparsity.")
    return standalone(text)
