"""From a matplotlib figure to an `<svg>` element that can stand in the body of an HTML page beside others.

Text stays text and takes the font of the page. Colours are written as CSS variables (`--ink`, `--grid`, `--sparse`,
`--dense`), so one figure serves light and dark pages. Equal figures give equal text: no dates, fixed salt for ids.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib.text
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sparsepipe.reporting.units import printable

# Colours that nothing else in a figure has; each is replaced by a CSS value once the SVG is written.
_PLACEHOLDERS = {
    "#010203": "currentColor",
    "#020304": "var(--grid)",
    "#030405": "var(--sparse)",
    "#040506": "var(--dense)",
    "#050607": "var(--surface)",
}
INK, GRID, SPARSE, DENSE, SURFACE = _PLACEHOLDERS
_LIGHT = {"grid": "#d5d9df", "sparse": "#0b5cad", "dense": "#a34a00", "surface": "#ffffff"}
"""What the page's light scheme makes of the variables, for figures that stand in no page."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsepipe",
    "text.parse_math": False,
    "font.size": 11.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
_POINTS_PER_INCH = 72


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in CSS pixels with one set of axes; make it, and draw in it, under `STYLE`."""
    figure = Figure(figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.tick_params(length=3)
    return figure, axes


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn under `STYLE`.
        name: unique in the page; prefix of the ids inside the element.
        alt: what the figure shows, in words.
    """
    for text in figure.findobj(matplotlib.text.Text):
        text.set_text(printable(text.get_text()).replace("\n", " "))
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The page's font draws the text, so characters that matplotlib's font lacks do not matter.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return ElementTree.tostring(_embeddable(buffer.getvalue(), name, alt), encoding="unicode")


def standalone(text: str) -> str:
    """An element of `to_svg` as a file of its own: dark on white, in the reader's font."""
    for name, colour in _LIGHT.items():
        text = text.replace(f"var(--{name})", colour)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width, height = size.groups() if size else ("100%", "100%")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'style="background: #ffffff; color: #16191d; font-family: sans-serif"'
    )
    return text.replace("<svg", head, 1) + "\n"


def _embeddable(text: str, name: str, alt: str) -> ElementTree.Element:
    """An SVG document as an element for HTML: no namespaces, own ids, CSS colours, the page's font."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag != "text":
            element.text = None
        element.tail = None
        attributes = {key.rpartition("}")[2]: _restyle(value, name) for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if "href" in attributes:
            attributes["href"] = f"#{name}-{attributes['href'].removeprefix('#')}"
        element.attrib.clear()
        element.attrib.update(attributes)
    view_box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": view_box, "role": "img", "aria-label": printable(alt)})
    return root


def _restyle(value: str, name: str) -> str:
    """An attribute's value with local references to this figure's ids, and placeholders resolved."""
    value = value.replace("url(#", f"url(#{name}-")
    for placeholder, colour in _PLACEHOLDERS.items():
        value = value.replace(placeholder, colour)
    return re.sub(r"font-family: [^;]*;?", "", value)
