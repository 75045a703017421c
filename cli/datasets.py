"""`sparsepipe datasets`."""

from __future__ import annotations

import click

from sparsepipe.cli import common


@click.command("datasets")
@common.output_options
def command(as_json: bool) -> None:
    """List the data sources that a recipe, or --data, can name."""
    from sparsepipe import data

    found = data.available()
    if as_json:
        common.print_json(
            [{"name": info.name, "form": info.form, "summary": info.summary, "extra": info.extra} for info in found]
        )
    else:
        common.print_table(
            ["data", "what", "needs"],
            [
                [info.form, info.summary, f"sparsepipe[{info.extra}]" if info.extra else "nothing more"]
                for info in found
            ],
        )
