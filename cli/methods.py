"""`sparsepipe methods`."""

from __future__ import annotations

import click

from sparsepipe.cli import common


@click.command("methods")
@click.argument("pattern", default="*")
@common.output_options
def command(pattern: str, as_json: bool) -> None:
    """List the training methods, and how they can spread weights over layers."""
    from sparsepipe.sparsity import registry
    from sparsepipe.sparsity.modifiers.registry import MODIFIERS

    found = registry.available(pattern)
    if as_json:
        common.print_json([{key: value for key, value in vars(info).items() if key != "home"} for info in found])
    elif found:
        common.print_table(
            ["method", "exact sparsity", "what", "state per weight", "source"],
            [[info.name, info.exact, info.summary, info.state, info.source] for info in found],
        )
        if pattern == "*":
            common.print_table(
                ["modifier", "what, with any method (train --modifier)", "source"],
                [[info.name, info.summary, info.source] for info in MODIFIERS.values()],
            )
            common.print_table(["distribution", "how the weights are spread over layers"], registry.SPREADS.items())
            common.print_table(["redistribution", "who gets what was dropped"], registry.EXCHANGES.items())
    else:
        click.echo(f"No method matches '{pattern}'. `sparsepipe methods` lists all.", err=True)
