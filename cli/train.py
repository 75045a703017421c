"""`sparsepipe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common

BELONGS = {"tolerance": ("--target-sparsity",), "trials": ("--target-sparsity",)}


@click.command("train")
@common.recipe_options()
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted run.")
@click.option("--restart", is_flag=True, help="Start over, and delete what an interrupted run left.")
@click.option(
    "--modifier", "modifier_names", metavar="NAMES",
    help="What to combine with the method, as `adversarial,extrapolation`; their options are in the recipe "
    "([[modifiers]]).",
)  # fmt: skip
@click.option(
    "--target-sparsity",
    type=float,
    metavar="FRACTION",
    help="For methods without a target: train again and again, bisecting the method's knob, until it is reached.",
)
@click.option("--tolerance", type=click.FloatRange(0), default=0.01, show_default=True, help="Of --target-sparsity.")
@click.option("--trials", type=click.IntRange(1), default=10, show_default=True, help="At most, of --target-sparsity.")
@common.output_options
def command(
    recipe: Path,
    out: Path | None,
    resume: bool,
    restart: bool,
    modifier_names: str | None,
    target_sparsity: float | None,
    tolerance: float,
    trials: int,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a network sparse from scratch, as the recipe says; writes OUT/train.

    \b
    In several processes, each with its own share of the data:
      torchrun --nproc-per-node=2 --no-python sparsepipe train RECIPE
    """
    from sparsepipe import launch
    from sparsepipe import recipe as recipes
    from sparsepipe.stages import target, train

    common.refuse_idle(BELONGS, ["--target-sparsity"] if target_sparsity is not None else [])
    if target_sparsity is not None and launch.world_size() > 1:
        raise click.UsageError(
            "--target-sparsity searches in one process: it trains again and again. Run it without torchrun, and train "
            "in several processes with the knob that it found."
        )
    if resume and restart:
        raise click.UsageError("--resume goes on with an interrupted training, and --restart deletes it: give one.")
    loaded, folder = common.load_recipe(recipe, overrides, out)
    if modifier_names is not None:
        loaded = recipes.with_modifiers(loaded, modifier_names)
    common.check_recipe_copy(recipe, loaded if target_sparsity is None else None, folder)
    config = train.TrainConfig.from_recipe(loaded)
    if launch.rank() > 0:
        train.follow(config)
        return
    tried: list[dict[str, Any]] = []
    if target_sparsity is None:
        artefact = train.run(config, {}, folder / "train", resume=resume, restart=restart)
    else:
        if not restart:
            train.refuse_interrupted(folder / "train")
        artefact, config, tried = target.run(
            config, folder / "train", sparsity=target_sparsity, tolerance=tolerance, most=trials
        )
        loaded = loaded.model_copy(update={"method": config.method})
    common.write_recipe_copy(recipe, loaded, folder)
    if as_json:
        common.print_json(common.artefact_json(artefact))
        return
    if tried:
        common.print_table(list(tried[0]), [list(trial.values()) for trial in tried])
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
