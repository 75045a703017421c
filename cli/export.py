"""`sparsepipe export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common


@click.command("export")
@click.argument("source", type=common.existing_path())
@click.option("--format", "format_", type=click.Choice(["onnx"]), default="onnx", help="File format.")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(["dense", "portable", "universal"]),
    help="dense: ordinary weights. portable: sparse initializers, standard operators. universal: compact weights, "
    "sparse kernels where their library is registered, standard operators elsewhere. Default: all.",
)  # fmt: skip
@click.option("--opset", type=int, help="ONNX opset, 13 to 22.")
@click.option("--out", type=click.Path(path_type=Path), help="Output folder. Default: export/ in the run folder.")
@common.model_option
@common.overrides_option
@common.output_options
def command(
    source: Path,
    format_: str,
    targets: tuple[str, ...],
    opset: int | None,
    out: Path | None,
    trusted_model: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write ONNX files.

    SOURCE is a run folder, a folder that `freeze` or `convert` wrote, or any ONNX file whose weights hold zeros,
    from whatever tool.
    """
    from sparsepipe.stages import export

    flags = {"targets": targets, "opset": opset}
    if source.is_file():
        config = common.section(None, "export", overrides, flags)
        artefact = export.from_onnx(source, config, common.required_out(out, source))
    else:
        saved = common.find_input(source, ["convert", "freeze"])
        config = common.section(saved.folder, "export", overrides, flags)
        artefact = export.run(
            config,
            {saved.manifest.stage: saved},
            common.output_folder(out, saved, "export"),
            trusted_model=trusted_model,
        )
    if as_json:
        common.print_json(common.artefact_json(artefact))
        return
    metrics = artefact.metrics
    if metrics["kernels"]:
        _print_layers("universal", metrics["kernels"])
    if "portable" in metrics["files"] or not metrics["kernels"]:
        _print_layers("portable", metrics["layers"])
    for file in metrics["files"].values():
        click.echo(f"{artefact.folder / file['name']}  {common.size_text(file['bytes'])}")


def _print_layers(target: str, rows: Sequence[Mapping[str, Any]]) -> None:
    common.print_table(
        [f"layer ({target})", "op", "sparsity", "stored", "dense", "sparse", "why"],
        [
            [
                layer["name"],
                layer["op"],
                f"{layer['sparsity']:.2%}",
                "sparse" if layer["sparse"] else "dense",
                common.size_text(layer["dense_bytes"]),
                common.size_text(layer["bytes"]),
                layer["reason"],
            ]
            for layer in rows
        ],
    )
