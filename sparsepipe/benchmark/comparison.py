"""Two results of the same benchmark: which measurements got slower by more than their noise.

Absolute times of two runs differ because machines do, not only because programs do. So where both results have the
speed-up over the same dense file measured beside it, that is compared: a slower machine slows both. Where they have
none (the dense file itself), the latency is shown, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsepipe.benchmark.records import DENSE, Record
from sparsepipe.benchmark.statistics import NOISE_LIMIT
from sparsepipe.errors import ArtefactError

SCHEMA_VERSION = 1
BASELINES = ("", "onnxruntime")
"""Runtimes whose dense file is what speed-ups are relative to."""
SLOWER, FASTER, SAME, UNKNOWN, MISSING, NEW = "slower", "faster", "same", "not comparable", "missing", "new"


@dataclass(frozen=True)
class Change:
    """One measurement in both results.

    Attributes:
        network: and what follows name it, as in `Record`.
        label: of the file.
        threads: of one operator.
        batch: batch size.
        clock: "wall" or "cpu".
        verdict: "slower" and "faster" where the intervals do not overlap and the values differ by more than 3%, "same",
            "not comparable" where an interval is missing, or "missing" and "new" where one of the results lacks it.
        old: speed-up with its interval in the old result; the latency in milliseconds where `by` says so.
        new: the same in the new result.
        ratio: new / old in units of speed: below 1 is slower.
        by: "speedup" or "latency".
        note: why it is not comparable.
    """

    network: str
    label: str
    threads: int
    batch: int
    clock: str
    verdict: str
    old: Mapping[str, Any] | None = None
    new: Mapping[str, Any] | None = None
    ratio: float | None = None
    by: str = "speedup"
    note: str | None = None


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """A change for each measurement of either result, those of the old one first.

    Raises:
        ArtefactError: the results have no measurement in common.
    """
    later = {record.key: record for record in new}
    earlier = {record.key for record in old}
    if not earlier & later.keys():
        raise ArtefactError(
            "The two results have no measurement in common.",
            where="--compare",
            advice="Compare results of the same files, patterns, sparsities, threads and batch sizes.",
        )
    changes = [_change(record, later.get(record.key)) for record in old]
    return changes + [_named(record, NEW, new=record.speedup) for record in new if record.key not in earlier]


def as_dict(changes: Sequence[Change]) -> dict[str, Any]:
    """JSON-able: `schema_version`, `changes`, and `slower`, the number of those."""
    return {
        "schema_version": SCHEMA_VERSION,
        "slower": sum(change.verdict == SLOWER for change in changes),
        "changes": [asdict(change) for change in changes],
    }


def _change(old: Record, new: Record | None) -> Change:
    if new is None:
        return _named(old, MISSING, old=old.speedup)
    if old.latency_ms is not None and new.latency_ms is None:
        return _named(old, SLOWER, old=old.latency_ms, by="latency", note=f"it cannot be measured any more: {new.note}")
    measured_beside_dense = old.kind != DENSE or old.runtime not in BASELINES
    if old.speedup and new.speedup and measured_beside_dense and old.baseline == new.baseline:
        ratio = new.speedup["value"] / old.speedup["value"]
        verdict, note = _verdict(old.speedup, new.speedup, ratio)
        return _named(old, verdict, old=old.speedup, new=new.speedup, ratio=ratio, note=note)
    ratio = None
    if old.latency_ms and new.latency_ms:
        ratio = old.latency_ms["value"] / new.latency_ms["value"]
    note = "times of two runs without a dense file beside them: the machine may have changed"
    if old.baseline != new.baseline:
        note = f"speed-ups over {old.baseline} and over {new.baseline}: name the same files in the same order"
    return _named(old, UNKNOWN, old=old.latency_ms, new=new.latency_ms, ratio=ratio, by="latency", note=note)


def _verdict(old: Mapping[str, Any], new: Mapping[str, Any], ratio: float) -> tuple[str, str | None]:
    if any(estimate.get(bound) is None for estimate in (old, new) for bound in ("low", "high")):
        return UNKNOWN, "an interval is missing"
    if new["high"] < old["low"] and ratio < 1 - NOISE_LIMIT:
        return SLOWER, None
    if new["low"] > old["high"] and ratio > 1 + NOISE_LIMIT:
        return FASTER, None
    return SAME, None


def _named(record: Record, verdict: str, **facts: Any) -> Change:
    return Change(record.network, record.label, record.threads, record.batch, record.clock, verdict, **facts)
