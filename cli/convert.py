"""`sparsepipe convert`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsepipe.cli import common
from sparsepipe.reporting import units


@click.command("convert")
@click.argument("source", type=common.existing_path())
@click.option("--out", type=click.Path(path_type=Path), help="Output folder. Default: convert/ in the run folder.")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["csr", "bsr", "nm", "bitmask"]),
    help="Choose among these formats only (repeatable).",
)  # fmt: skip
@common.overrides_option
@common.output_options
def command(
    source: Path, out: Path | None, formats: tuple[str, ...], overrides: tuple[str, ...], as_json: bool
) -> None:
    """Choose a compact format for every layer, by size.

    SOURCE is a run folder, a folder that `freeze` wrote, or any ONNX file.
    """
    from sparsepipe.stages import convert

    if source.is_file():
        config = common.section(None, "convert", overrides, {"formats": formats})
        artefact = convert.from_onnx(source, config, common.required_out(out, source))
    else:
        frozen = common.find_input(source, ["freeze"])
        config = common.section(frozen.folder, "convert", overrides, {"formats": formats})
        artefact = convert.run(config, {"freeze": frozen}, common.output_folder(out, frozen, "convert"))
    if as_json:
        common.print_json(common.artefact_json(artefact))
        return
    metrics = artefact.metrics
    common.print_table(
        ["layer", "sparsity", "format", "block", "before", "after", "why"],
        [
            [
                layer["name"],
                f"{layer['sparsity']:.2%}",
                layer["format"],
                "x".join(map(str, layer["block"])) if isinstance(layer["block"], list) else layer["block"],
                units.size(layer["dense_bytes"]),
                units.size(layer["bytes"]),
                layer["reason"],
            ]
            for layer in metrics["layers"]
        ],
    )
    before, after = metrics["bytes_before"], metrics["bytes_after"]
    click.echo(f"{units.size(before)} -> {units.size(after)}. Written to {artefact.folder}.")
