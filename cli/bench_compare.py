"""`sparsepipe bench --compare OLD NEW`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsepipe.cli import common


def run(old: Path, new: Path, *, as_json: bool) -> None:
    """Show what changed between two results; exit code 1 where something got slower."""
    from sparsepipe.artefact import read_json
    from sparsepipe.benchmark import comparison, records

    changes = comparison.compare(*(records.read(read_json(path), where=str(path)) for path in (old, new)))
    result = comparison.as_dict(changes)
    if as_json:
        common.print_json(result)
    else:
        common.print_table(
            ["network", "file", "threads", "batch", "clock", "by", "old", "new", "new/old speed", "verdict"],
            [
                [
                    change.network or None,
                    change.label,
                    change.threads,
                    change.batch,
                    change.clock,
                    change.by,
                    _text(change.old),
                    _text(change.new),
                    None if change.ratio is None else f"{change.ratio:.3f}",
                    change.verdict,
                ]
                for change in changes
            ],
        )
        for note in dict.fromkeys(change.note for change in changes if change.note):
            click.echo(f"{note[0].upper()}{note[1:]}.")
        click.echo(f"{result['slower']} of {len(changes)} measurements got slower beyond their noise.")
    if result["slower"]:
        raise click.exceptions.Exit(1)


def _text(estimate: object) -> str | None:
    if not isinstance(estimate, dict):
        return None
    if estimate["low"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3g} ({estimate['low']:.3g}–{estimate['high']:.3g})"
