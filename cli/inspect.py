"""`sparsepipe inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsepipe.cli import common


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
        if key != "layers" and isinstance(value, (str, int, float)):
            text = f"{value:.2%}" if key == "sparsity" else common.size_text(int(value)) if key == "bytes" else value
            click.echo(f"{key.replace('_', ' ')}: {text}")
    for key, value in found.items():
        if key != "layers" and isinstance(value, dict) and value:
            click.echo(f"{key.replace('_', ' ')}:")
            for name, entry in value.items():
                click.echo(f"  {name}: {entry}")
    layers = found.get("layers") or []
    if layers:
        common.print_table(
            ["layer", "shape", "nonzeros", "sparsity", "bytes", "format", "zeros also fit"],
            [
                [
                    layer["name"],
                    "x".join(map(str, layer["shape"])),
                    f"{layer['nnz']}/{layer['size']}",
                    f"{layer['sparsity']:.1%}",
                    layer.get("bytes"),
                    layer.get("format"),
                    ", ".join(layer.get("patterns") or []) or None,
                ]
                for layer in layers
            ],
        )
