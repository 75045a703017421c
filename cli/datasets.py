"""`sparsepipe datasets`."""

from __future__ import annotations

import click

from sparsepipe.cli import common


@click.command("datasets")
@common.output_options
def command(as_json: bool) -> None:
    """List the data sources that a recipe, or --data, can name, and the options that each takes in the section `data`.

    Your own data: data = "module:function"; the function is called with the section's other keys.
    """
    from sparsepipe import data

    found = data.available()
    if as_json:
        common.print_json(
            [
                {
                    "name": info.name,
                    "form": info.form,
                    "summary": info.summary,
                    "options": list(info.options),
                    "extra": info.extra,
                }
                for info in found
            ]
        )
    else:
        common.print_table(
            ["data", "what", "options", "needs"],
            [
                [
                    info.form,
                    info.summary,
                    ", ".join(info.options) or None,
                    f"sparsepipe[{info.extra}]" if info.extra else "nothing more",
                ]
                for info in found
            ],
        )
