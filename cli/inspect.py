"""`sparsepipe inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common
from sparsepipe.reporting import units

INT8 = "in int8 (time: of dense int8)"


@click.command("inspect")
@click.argument("path", type=common.existing_path())
@common.output_options
def command(path: Path, as_json: bool) -> None:
    """Show what PATH holds: an ONNX file, a checkpoint, a stage's folder or a run folder."""
    from sparsepipe.inspection import inspect

    found = inspect(path)
    if as_json:
        common.print_json(found)
        return
    for key, value in found.items():
        _show(key, value)
    layers = found.get("layers") or []
    if layers:
        # What only some kinds of files have: the operator of a weight, and how its kernel packs the input.
        extra = [name for name in ("op", "mode") if any(layer.get(name) for layer in layers)]
        common.print_table(
            ["layer", *extra, "shape", "nonzeros", "sparsity", "bytes", "each", "format", "zeros also fit", INT8],
            [
                [
                    layer["name"],
                    *(layer[name] for name in extra),
                    "x".join(map(str, layer["shape"])),
                    f"{layer['nnz']}/{layer['size']}",
                    f"{layer['sparsity']:.1%}",
                    layer.get("bytes"),
                    _each(layer.get("bytes_per_nonzero")),
                    layer.get("format"),
                    ", ".join(layer.get("patterns") or []) or None,
                    _int8(layer.get("int8")),
                ]
                for layer in layers
            ],
        )


def _each(value: float | None) -> str | None:
    """Bytes for each value that is not zero."""
    return None if value is None else f"{value:.2f} B"


def _int8(found: dict[str, Any] | None) -> str | None:
    """What the best blocks of the int8 operators cost and save."""
    if found is None:
        return None
    if not found["eligible"]:
        return f"dense ({found['block']}: {found['stored_zeros']:.0%} zeros stored)"
    return f"{found['block']}, {found['stored_zeros']:.0%} zeros stored, {found['time']:.2f} of the time"


def _show(key: str, value: Any) -> None:
    """One line for a plain value or a flat dict; the folders of a run as a table. All else is for `--json`."""
    label = key.replace("_", " ")
    if key == "stages":
        common.print_table(
            ["stage", "made", "sparsity", "bytes", "intact", "digest"],
            [
                [
                    name,
                    stage["created"],
                    None if stage["sparsity"] is None else f"{stage['sparsity']:.2%}",
                    units.size(stage["bytes"]),
                    stage["intact"],
                    stage["digest"][:19],
                ]
                for name, stage in value.items()
            ],
        )
    elif key == "sparsity" and value is not None:
        click.echo(f"{label}: {value:.2%}")
    elif key == "bytes":
        click.echo(f"{label}: {units.size(value)}")
    elif isinstance(value, (str, int, float)):
        click.echo(f"{label}: {value}")
    elif isinstance(value, dict) and all(isinstance(entry, (str, int, float)) for entry in value.values()):
        click.echo(f"{label}: {', '.join(f'{name} {entry}' for name, entry in value.items()) or 'none'}")
