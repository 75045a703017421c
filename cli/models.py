"""`sparsepipe models`."""

from __future__ import annotations

import click

from sparsepipe.cli import common


@click.command("models")
@click.argument("pattern", default="*")
@common.output_options
def command(pattern: str, as_json: bool) -> None:
    """List the networks that a recipe can name, e.g. sparsepipe models 'resnet*'.

    Your own network: model = "module:function"; the function is called with input_shape, classes and the section's
    other keys, and returns a torch.nn.Module.
    """
    from sparsepipe.models import registry

    found = registry.available(pattern)
    if as_json:
        common.print_json(
            [
                {
                    "name": info.name,
                    "input_shape": list(info.input_shape),
                    "classes": info.classes,
                    "summary": info.summary,
                    "source": info.source,
                }
                for info in found
            ]
        )
    elif found:
        common.print_table(
            ["model", "input", "classes", "what", "source"],
            [
                [info.name, "x".join(map(str, info.input_shape)), info.classes, info.summary, info.source]
                for info in found
            ],
        )
    else:
        click.echo(f"No model matches '{pattern}'. `sparsepipe models` lists all.", err=True)
