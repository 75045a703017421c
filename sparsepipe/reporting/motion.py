"""How the masks of each layer moved during training: the log of the epochs -> rows of figures with small curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sparsepipe.reporting import units
from sparsepipe.reporting.contents import Epoch

WIDTH, HEIGHT = 90, 20
MAX_POINTS = 30
"""Points of one small curve: of a longer training only some of the epochs are drawn."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Cell:
    """The last known value of a quantity, that of its companion, and its curve (None where it never changed)."""

    value: str
    note: str = ""
    curve: Markup | None = None


@dataclass(frozen=True)
class Column:
    """One quantity of all layers; all curves of a column have the same axes, `low` to `high`."""

    title: str
    low: str
    high: str
    log_scale: bool
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class _Quantity:
    """A key of the log, and a second one whose last value stands below, with the word before it."""

    title: str
    key: str
    show: Callable[[float | None], str]
    log_scale: bool = False
    note: str = ""
    note_key: str = ""


def _percent(value: float | None) -> str:
    return units.percent(value, 1)


_QUANTITIES = (
    _Quantity("density", "density", _percent, log_scale=True),
    _Quantity("explored", "exploration", _percent, log_scale=True),
    _Quantity("dropped by an update", "dropped", _percent),
    _Quantity("grown by an update", "grown", _percent),
    _Quantity("median age, updates", "age_median", units.count, note="p90", note_key="age_p90"),
    _Quantity(
        "gradient norm, inactive",
        "inactive_gradient_norm",
        units.scientific,
        log_scale=True,
        note="mean",
        note_key="inactive_gradient_mean",
    ),
)


def layers(epochs: Sequence[Epoch]) -> list[str]:
    """The layers that were sparse at some time, in the order of the network."""
    sparse = {name for epoch in epochs for name in epoch.exploration}
    order = list(dict.fromkeys(name for epoch in epochs for name in [*epoch.density, *epoch.exploration]))
    return [name for name in order if name in sparse]


def columns(epochs: Sequence[Epoch], names: Sequence[str]) -> list[Column]:
    """What is known of these layers; quantities that were never logged are left out, and so is growth that equals
    what was dropped everywhere.
    """
    found = []
    for quantity in _QUANTITIES:
        table = {name: _series(epochs, quantity.key, name) for name in names}
        same = quantity.key == "grown" and all(epoch.grown == epoch.dropped for epoch in epochs)
        if same or all(value is None for values in table.values() for value in values):
            continue
        notes = {name: _last(_series(epochs, quantity.note_key, name)) for name in names if quantity.note}
        found.append(_column(quantity, table, notes))
    return found


def _series(epochs: Sequence[Epoch], key: str, name: str) -> Values:
    return [getattr(epoch, key).get(name) for epoch in epochs]


def _last(values: Values) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _column(quantity: _Quantity, table: Mapping[str, Values], notes: Mapping[str, float | None]) -> Column:
    known = [value for values in table.values() for value in values if value is not None]
    above_zero = [value for value in known if value > 0]
    log_scale = quantity.log_scale and bool(above_zero)
    low, high = (min(above_zero) if log_scale else 0.0), max(known)
    cells = {}
    for name, values in table.items():
        note = f"{quantity.note} {quantity.show(notes[name])}" if notes.get(name) is not None else ""
        cells[name] = Cell(quantity.show(_last(values)), note, _curve(quantity, values, low, high, log_scale=log_scale))
    return Column(quantity.title, quantity.show(low), quantity.show(high), log_scale, cells)


def _curve(quantity: _Quantity, values: Values, low: float, high: float, *, log_scale: bool) -> Markup | None:
    own = [value for value in values if value is not None]
    if len(set(own)) < 2:
        return None
    alt = f"curve from {quantity.show(own[0])} to {quantity.show(own[-1])}"
    return sparkline([_place(value, low, high, log_scale=log_scale) for value in values], alt)


def _place(value: float | None, low: float, high: float, *, log_scale: bool) -> float | None:
    """Where between `low` and `high` a value lies, 0 to 1."""
    if value is None or high <= low:
        return None if value is None else 0.0
    if not log_scale:
        return (value - low) / (high - low)
    return math.log(max(value, low) / low) / math.log(high / low)


def sparkline(heights: Values, alt: str) -> Markup:
    """A small curve of values in [0, 1], with a dot at the last one that is known; gaps stay gaps."""
    last = len(heights) - 1
    drawn = range(0, last + 1, max(1, math.ceil(last / MAX_POINTS)))
    spread = WIDTH / max(last, 1)
    path, pen_down, end = "", False, (0, 0)
    for at in sorted({*drawn, last}):
        height = heights[at]
        if height is not None:
            end = round(spread * at), round(HEIGHT * (1 - height))
            path += f"{'L' if pen_down else 'M'}{end[0]} {end[1]}"
        pen_down = height is not None
    return Markup(
        f'<svg class="spark" viewBox="-3 -3 {WIDTH + 6} {HEIGHT + 6}" role="img" aria-label="{alt}">'
        f'<path class="axis" d="M0 {HEIGHT}H{WIDTH}"/><path d="{path}"/>'
        f'<circle cx="{end[0]}" cy="{end[1]}" r="2.5"/></svg>'
    )
