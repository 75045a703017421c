"""`sparsepipe train`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsepipe.cli import common


@click.command("train")
@common.recipe_options
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted run.")
@common.output_options
def command(recipe: Path, out: Path | None, resume: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train a network sparse from scratch, as the recipe says; writes OUT/train.

    \b
    In several processes, each with its own share of the data:
      torchrun --nproc-per-node=2 --no-python sparsepipe train RECIPE
    """
    from sparsepipe import launch
    from sparsepipe import recipe as recipes
    from sparsepipe.stages import train

    loaded, folder = common.load_recipe(recipe, overrides, out)
    config = train.TrainConfig.from_recipe(loaded)
    if launch.rank() > 0:
        train.follow(config)
        return
    artefact = train.run(config, {}, folder / "train", resume=resume)
    recipes.write(loaded, folder / common.RECIPE_FILE)
    if as_json:
        common.print_json(common.artefact_json(artefact))
        return
    metrics = artefact.metrics
    common.print_table(
        ["method", "sparsity", "validation accuracy", "test accuracy", "exploration rate", "training FLOPs", "minutes"],
        [
            [
                loaded.method.name,
                f"{metrics['sparsity']:.2%}",
                f"{metrics['validation_accuracy']:.2%}",
                f"{metrics['test_accuracy']:.2%}",
                metrics["exploration_rate"],
                f"{metrics['training_flops_multiple']:.3f}x dense",
                f"{metrics['seconds'] / 60:.1f}",
            ]
        ],
    )
    click.echo(f"Written to {artefact.folder}. Next: sparsepipe freeze {folder}")
