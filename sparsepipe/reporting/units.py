"""Numbers as a person reads them. Every function takes None for "not known" and gives a dash."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepipe.reporting.contents import Estimate

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNPRINTABLE = ("Cc", "Cf", "Cs")
_FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f}\u202f%"


def percent_interval(estimate: Estimate | None, digits: int = 1) -> str:
    """The interval of a fraction, without its unit; empty where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.{digits}f}–{100 * estimate.high:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thin spaces between the thousands."""
    return MISSING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def size(value: float | None) -> str:
    """Bytes in decimal units, three digits."""
    if value is None:
        return MISSING
    scaled, unit = float(value), 0
    while scaled >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.0f}\u202fB" if unit == 0 else f"{_three_digits(scaled)}\u202f{_BYTE_UNITS[unit]}"


def flops(value: float | None) -> str:
    """A number of floating-point operations, three digits: 1.62 GFLOP."""
    if value is None:
        return MISSING
    scaled, unit = float(value), 0
    while scaled >= 999.5 and unit < len(_FLOP_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{_three_digits(scaled)}\u202f{_FLOP_UNITS[unit]}"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{_three_digits(value)}\u202fms"


def milliseconds_interval(estimate: Estimate | None) -> str:
    """The interval of a latency, without its unit; empty where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{_three_digits(estimate.low)}–{_three_digits(estimate.high)}"


def ratio(value: float | None) -> str:
    """A speed-up or a compression: 2.41×."""
    return MISSING if value is None else f"{value:.2f}×" if value < 100 else f"{value:.0f}×"


def ratio_interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.2f}–{estimate.high:.2f}"


def points(value: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    return MISSING if value is None else f"{100 * value:+.2f}\u202fpoints".replace("-", "−")


def scientific(value: float | None) -> str:
    """A small number: 3.1 × 10⁻⁷; plain where it is short enough that way."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.2g}" if abs(value) < 1 else _three_digits(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}\u202f×\u202f10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def duration(seconds: float | None) -> str:
    """Seconds as 42.1 s, 3 min 05 s or 2 h 07 min."""
    if seconds is None:
        return MISSING
    if seconds < 99.95:
        return f"{seconds:.1f}\u202fs"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60:02d}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60:02d}\u202fmin"


def dims(shape: Sequence[int]) -> str:
    """A shape: 64 × 32 × 3 × 3."""
    return " × ".join(str(extent) for extent in shape) or MISSING


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: object) -> str:
    """`text` with controls, lone surrogates and invisible marks (of text direction, say) replaced; new lines stay."""
    return "".join(
        "\ufffd" if unicodedata.category(character) in _UNPRINTABLE and character not in "\n\t" else character
        for character in str(text)
    )


def clip(label: str, limit: int) -> str:
    """A text of at most `limit` characters; an ellipsis stands for what does not fit."""
    return label if len(label) <= limit else f"{label[: limit - 1]}…"


def short_digest(digest: str) -> str:
    """The first twelve hex digits of a digest."""
    return digest.removeprefix("sha256:")[:12]


def _three_digits(value: float) -> str:
    exponent = int(f"{value:.2e}".partition("e")[2] or 0)  # of the rounded value: 9.996 is 10.0
    return f"{value:.{max(2 - exponent, 0)}f}"
