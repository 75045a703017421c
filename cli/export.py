"""`sparsepipe export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsepipe.cli import common
from sparsepipe.reporting import units

if TYPE_CHECKING:
    from sparsepipe.recipe import Export


INT8 = ("--precision int8",)
BELONGS = {
    "calibrate": INT8,
    "calibration": INT8,
    "calibration_samples": INT8,
    "max_drop": INT8,
    "isa": ("--target universal in fp32",),
    "measure_seconds": ("--measure",),
    "trusted_model": ("a run folder",),
}
"""Options that only some exports have."""


@click.command("export")
@click.argument("source", type=common.existing_path())
@click.option("--format", "format_", type=click.Choice(["onnx"]), default="onnx", help="File format.")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(["dense", "portable", "universal"]),
    help="dense: ordinary weights. portable: sparse initializers, standard operators. universal: compact weights, "
    "sparse kernels where their library is registered, standard operators elsewhere. Default: all.",
)  # fmt: skip
@click.option("--opset", type=int, help="ONNX opset, 13 to 22.")
@click.option(
    "--isa", type=click.Choice(["any", "avx512", "avx2", "sse4", "neon", "portable"]),
    help="universal: the instruction set of the machines that the file is for. Default: any, where a layer goes sparse "
    "only if that should pay on each of them.",
)  # fmt: skip
@click.option(
    "--measure", is_flag=True, default=None,
    help="universal: choose by timing dense and sparse layers on this machine, one thread, batch 1.",
)  # fmt: skip
@click.option("--measure-seconds", type=float, metavar="N", help="About how long that may take. Default: 30.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(["fp32", "int8"]),
    help="int8: static, for the targets dense and universal. Given twice, once for each: files of both. Default: fp32.",
)  # fmt: skip
@click.option(
    "--calibrate", metavar="DATA",
    help="int8: the dataset on whose training split the ranges of activations are found; its options as "
    "--set data.size=224.",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Choice(["minmax", "percentile", "entropy"]),
    help="int8: how ranges come from values. Default: minmax.",
)  # fmt: skip
@click.option("--calibration-samples", type=int, metavar="N", help="int8: how many samples. Default: 128.")
@click.option(
    "--max-drop", type=float, metavar="POINTS",
    help="int8: keep layers in fp32 until the accuracy on training samples is within so many points of that of fp32.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Output folder. Default: export/ in the run folder.")
@common.model_option
@common.overrides_option
@common.output_options
def command(
    source: Path,
    format_: str,
    targets: tuple[str, ...],
    opset: int | None,
    isa: str | None,
    measure: bool | None,
    measure_seconds: float | None,
    precisions: tuple[str, ...],
    calibrate: str | None,
    calibration: str | None,
    calibration_samples: int | None,
    max_drop: float | None,
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

    flags = {
        "targets": targets,
        "opset": opset,
        "isa": isa,
        "measure": measure,
        "measure_seconds": measure_seconds,
        "precision": precisions,
        "calibrate": common.dataset(calibrate, overrides),
        "calibration": calibration,
        "calibration_samples": calibration_samples,
        "max_drop": max_drop,
    }
    if source.is_file():
        config = common.section(None, "export", overrides, flags)
        _refuse_idle(source, config, targets)
        artefact = export.from_onnx(source, config, common.required_out(out, source))
    else:
        saved = common.find_input(source, ["convert", "freeze"])
        config = common.section(saved.folder, "export", overrides, flags)
        _refuse_idle(source, config, targets)
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
    if metrics["int8_kernels"]:
        _print_layers("universal int8", metrics["int8_kernels"])
    if "portable" in metrics["files"] or not (metrics["kernels"] or metrics["int8_kernels"]):
        _print_layers("portable", metrics["layers"])
    if measured := metrics["measured"]:
        click.echo(_whole(measured))
    if chosen := metrics["selection"]:
        click.echo(
            f"On {chosen['samples']} training samples that the calibration did not see: accuracy "
            f"{chosen['accuracy']:.2%} in int8, {chosen['fp32_accuracy']:.2%} in fp32."
        )
    for file in metrics["files"].values():
        click.echo(f"{artefact.folder / file['name']}  {units.size(file['bytes'])}")


def _refuse_idle(source: Path, config: Export, targets: Sequence[str]) -> None:
    """Refuse options that would change nothing in this export; `targets` are those on the command line."""
    fp32 = "fp32" in config.precision
    if "portable" in targets and not fp32:
        raise click.UsageError("--target portable has no int8 form; name dense, universal or both.")
    holds = {
        "--precision int8": "int8" in config.precision,
        "--target universal in fp32": "universal" in config.targets and fp32,
        "--measure": config.measure,
        "a run folder": source.is_dir(),
    }
    common.refuse_idle(BELONGS, [name for name, held in holds.items() if held])


def _stored(layer: Mapping[str, Any]) -> str:
    if not layer["sparse"]:
        return "dense"
    if layer.get("kernel", "").startswith("SparseQ"):
        return f"sparse {layer['block']}x4"
    return f"sparse {layer['block']}x1" if layer.get("block", 1) > 1 else "sparse"


def _whole(measured: Mapping[str, Any]) -> str:
    missed = f" The time did not suffice for {measured['missed']} of them." if measured["missed"] else ""
    timed = f"Measured {measured['timed']} layers on this machine, 1 thread, batch 1.{missed} "
    if measured["ratio"] is None:
        return f"{timed}No sparse layer makes the whole network faster: all stay dense."
    return (
        f"{timed}The whole network takes {measured['ratio']:.2f} of the dense time, which is "
        f"{measured['dense_ms']:.3g} ms."
    )


def _print_layers(target: str, rows: Sequence[Mapping[str, Any]]) -> None:
    common.print_table(
        [f"layer ({target})", "op", "sparsity", "stored", "dense", "sparse", "why"],
        [
            [
                layer["name"],
                layer["op"],
                f"{layer['sparsity']:.2%}",
                _stored(layer),
                units.size(layer["dense_bytes"]),
                units.size(layer["bytes"]),
                layer["reason"],
            ]
            for layer in rows
        ],
    )
