"""What the two processes that ran the same file say of the machine, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsepipe.benchmark import conditions
from sparsepipe.reporting import units

Row = Mapping[str, Any]


def sentence(verdict: Row, rows: Sequence[Row]) -> str:
    """Whether the machine was quiet at one setting, and what is known of its clock and its heat.

    Args:
        verdict: on two runs of the same file.
        rows: all measurements of the result; one that was noisy by itself makes its setting noisy.
    """
    own = [row for row in rows if of_setting(verdict, row)]
    noisy = sum(row["noisy"] for row in own)
    if verdict["difference"] is None:
        found = "noisy machine: too little was measured to compare two runs of the same file"
    else:
        found = (
            f"{'noisy machine' if verdict['noisy'] or noisy else 'quiet machine'}: two runs of the same file differed "
            f"by {verdict['difference']:.1%} (limit {verdict['limit']:.0%}), other processes disturbed "
            f"{verdict['blocks_disturbed']} of their {verdict['blocks']} blocks"
        )
    if noisy:
        found += f"; {noisy} of {units.plural(len(own), 'measurement')} varied in itself or was disturbed"
    setting = f"{units.plural(verdict['threads'], 'thread')}, batch {verdict['batch']}"
    return f"{setting}: {found}; {verdict['conditions']['note']}."


def of_setting(verdict: Row, row: Row) -> bool:
    """Whether a measurement was made at the setting that a verdict is about."""
    return (verdict["threads"], verdict["batch"]) == (row["threads"], row["batch"])


def summary(verdicts: Sequence[Row]) -> str:
    """One sentence about several settings."""
    noisy = sum(verdict["noisy"] for verdict in verdicts)
    known = [verdict["difference"] for verdict in verdicts if verdict["difference"] is not None]
    text = f"The machine was noisy in {noisy} of {units.plural(len(verdicts), 'race')}"
    if known:
        text += f"; two processes of the same file differed by up to {max(known):.1%}"
    seen = [verdict["conditions"] for verdict in verdicts]
    return f"{text}; {conditions.merged(seen)['note']}." if seen else f"{text}."
