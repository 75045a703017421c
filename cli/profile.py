"""`sparsepipe profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common


@click.command("profile")
@click.argument("model", type=common.existing_path(dir_okay=False))
@click.option(
    "--against", type=common.existing_path(dir_okay=False), metavar="DENSE.onnx",
    help="The dense file of the same network, to be measured beside it, layer by layer.",
)  # fmt: skip
@click.option("--threads", type=int, help="Threads of one operator. Default: 1.")
@click.option("--batch", type=int, help="Batch size. Default: 1.")
@click.option("--seconds", type=float, help="Time for the calls of each file, about. Default: 3.")
@common.input_option
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Also write the result, its table in Markdown and the roofline (SVG) into this folder.",
)  # fmt: skip
@common.output_options
def command(
    model: Path, against: Path | None, out: Path | None, as_json: bool, input_: dict[str, Any], **options: Any
) -> None:
    """Show layer by layer what an ONNX file takes, and why it is not faster.

    For each layer: its time by onnxruntime's own profiler, the arithmetic on its nonzeros and the bytes it moves, each
    as a share of what this machine was just measured to reach, and the largest reasons for the gap.

    \b
    sparsepipe profile model.universal.onnx --against model.dense.onnx --out profile
    """
    from sparsepipe.settings import check
    from sparsepipe.stages import profile

    given = {key: value for key, value in options.items() if value is not None}
    if input_:
        given["input"] = input_
    config = check(profile.ProfileConfig, given, where="profile")
    common.check_threads([config.threads])
    if out is None:
        result = profile.measure(model, config, against)
    else:
        result = profile.record(model, config, out, against).metrics
        if not (out / profile.PICTURE_FILE).is_file():
            click.echo("The roofline was not drawn: matplotlib is not installed (sparsepipe[report]).", err=True)
    if as_json:
        common.print_json(result)
        return
    from sparsepipe.reporting import layer_table

    for table in layer_table.tables(result):
        common.print_table(table.headers, table.rows, title=table.title)
    for remark in layer_table.remarks(result):
        click.echo(remark)
