"""The state of the processor while something is measured: clock frequency, temperature, throttling, and what is set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CPU = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
DROP = 0.03
"""A clock that varies by more than this share of its highest frequency is worth a note."""


class Watch:
    """Looks at the processors now and then.

    Args:
        cpus: those that are measured on; None for all.
        root: where the files of the system begin.
    """

    def __init__(self, cpus: Sequence[int] | None = None, root: Path = Path("/")) -> None:
        self._cpus, self._root = cpus, root
        self._frequencies: list[float] = []
        self._temperatures: list[float] = []
        self._throttled = self._throttles()

    def look(self) -> None:
        """Note the state of this moment. It takes less than a millisecond."""
        self._frequencies += self._frequencies_mhz()
        self._temperatures += self._temperatures_c()

    def summary(self) -> dict[str, Any]:
        """JSON-able; None where the system does not tell.

        Returns:
            `frequency_mhz` and `temperature_c` (each with `low` and `high` of all looks), `throttled` (how often the
            processor slowed itself down for heat), `governor`, `boost`, and a `note` for people.
        """
        later = self._throttles()
        found: dict[str, Any] = {
            "frequency_mhz": _range(self._frequencies),
            "temperature_c": _range(self._temperatures),
            "throttled": later - self._throttled if later is not None and self._throttled is not None else None,
            "governor": self._text(CPU / "cpu0/cpufreq/scaling_governor"),
            "boost": self._boost(),
        }
        return {**found, "note": _note(found)}

    def _frequencies_mhz(self) -> list[float]:
        exact = [self._number(path) for path in self._of_cpus("cpufreq/scaling_cur_freq")]
        known = [value / 1e3 for value in exact if value]
        if known:
            return known
        try:
            text = self._at(Path("/proc/cpuinfo")).read_text()
        except OSError:
            return []
        each = [float(found) for found in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
        return each if self._cpus is None else [each[cpu] for cpu in self._cpus if cpu < len(each)]

    def _temperatures_c(self) -> list[float]:
        zones = self._at(THERMAL).glob("thermal_zone*/temp")
        return [value / 1e3 for path in zones if (value := self._read(path)) is not None]

    def _throttles(self) -> int | None:
        counts = [self._number(path) for path in self._of_cpus("thermal_throttle/core_throttle_count")]
        known = [int(count) for count in counts if count is not None]
        return sum(known) if known else None

    def _boost(self) -> bool | None:
        if (boost := self._number(CPU / "cpufreq/boost")) is not None:
            return bool(boost)
        off = self._number(CPU / "intel_pstate/no_turbo")
        return None if off is None else not off

    def _of_cpus(self, name: str) -> list[Path]:
        if self._cpus is not None:
            return [CPU / f"cpu{cpu}" / name for cpu in self._cpus]
        here = self._at(CPU)
        return [CPU / path.relative_to(here) for path in sorted(here.glob(f"cpu[0-9]*/{name}"))]

    def _number(self, path: Path) -> float | None:
        return self._read(self._at(path))

    def _text(self, path: Path) -> str | None:
        try:
            return self._at(path).read_text().strip() or None
        except OSError:
            return None

    def _at(self, path: Path) -> Path:
        return self._root / path.relative_to("/")

    @staticmethod
    def _read(path: Path) -> float | None:
        try:
            return float(path.read_text())
        except (OSError, ValueError):
            return None


def merged(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `frequency_mhz`, `temperature_c` and `throttled` of several `Watch.summary` together, with their `note`."""
    found: dict[str, Any] = {
        key: _range([one[key][bound] for one in summaries if one[key] for bound in ("low", "high")])
        for key in ("frequency_mhz", "temperature_c")
    }
    counts = [one["throttled"] for one in summaries if one["throttled"] is not None]
    found["throttled"] = sum(counts) if counts else None
    return {**found, "note": _note(found)}


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"low": min(values), "high": max(values)} if values else None


def _note(found: dict[str, Any]) -> str:
    parts = []
    frequency, temperature = found["frequency_mhz"], found["temperature_c"]
    if frequency is None:
        parts.append("the system does not tell the clock frequency")
    elif frequency["low"] < (1 - DROP) * frequency["high"]:
        parts.append(f"the clock varied from {frequency['low']:.0f} to {frequency['high']:.0f} MHz")
    else:
        parts.append(f"the system told a clock of {frequency['high']:.0f} MHz throughout")
    if temperature is None:
        parts.append("nor the temperature" if frequency is None else "the system does not tell the temperature")
    else:
        parts.append(f"temperatures up to {temperature['high']:.0f} °C")
    if found["throttled"]:
        parts.append(f"the processor slowed itself down for heat {found['throttled']} times")
    return ", ".join(parts)
