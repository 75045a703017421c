"""`sparsepipe freeze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsepipe.cli import common

if TYPE_CHECKING:
    from sparsepipe.artefact import Artefact


CHECKPOINT = "a checkpoint from elsewhere"
BELONGS = {"model": (CHECKPOINT,), "data": (CHECKPOINT,), "overrides": (CHECKPOINT,)}
"""Options that only one kind of source has."""


@click.command("freeze")
@click.argument("source", type=common.existing_path())
@click.option("--out", type=click.Path(path_type=Path), help="Output folder. Default: freeze/ in the run folder.")
@click.option("--model", help="For a checkpoint from elsewhere: the network that its weights belong to.")
@click.option("--data", help="For a checkpoint from elsewhere: the dataset that gives classes and preprocessing.")
@common.overrides_option
@common.output_options
def command(
    source: Path, out: Path | None, model: str | None, data: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Fix the masks of a trained network: exact zeros, no training state.

    SOURCE is a run folder, a folder that `train` wrote, or a checkpoint from elsewhere (.safetensors, .pt): then its
    zeros are the masks, and --model and --data say what network it is.

    \b
    sparsepipe freeze runs/quickstart
    sparsepipe freeze pruned.pt --model resnet20 --data cifar10:DIR --set model.width=32 --out frozen
    """
    from sparsepipe.stages import freeze

    common.refuse_idle(BELONGS, [CHECKPOINT] if source.is_file() else [])
    if source.is_file():
        artefact = _from_checkpoint(source, common.required_out(out, source), model, data, overrides)
    else:
        trained = common.find_input(source, ["train"])
        artefact = freeze.run(freeze.FreezeConfig(), {"train": trained}, common.output_folder(out, trained, "freeze"))
    if as_json:
        common.print_json(common.artefact_json(artefact))
        return
    common.print_table(
        ["layer", "shape", "nonzeros", "sparsity"],
        [
            [layer["name"], "x".join(map(str, layer["shape"])), layer["nnz"], f"{layer['sparsity']:.2%}"]
            for layer in artefact.metrics["layers"]
        ],
    )
    click.echo(f"Sparsity {artefact.metrics['sparsity']:.2%}. Written to {artefact.folder}.")


def _from_checkpoint(
    source: Path, out: Path, model: str | None, data: str | None, overrides: tuple[str, ...]
) -> Artefact:
    from sparsepipe import data as datasets
    from sparsepipe import recipe
    from sparsepipe.spec import ModelSpec
    from sparsepipe.stages import freeze

    if model is None or data is None:
        raise click.UsageError(
            f"'{source}' is a checkpoint: name its network with --model, and its dataset with --data."
        )
    loaded = recipe.parse({"model": model, "data": data}, overrides, where=str(source))
    dataset = datasets.load(loaded.data.name, loaded.data.options)
    spec = ModelSpec(
        model=loaded.model,
        input_shape=dataset.input_shape,
        classes=dataset.classes,
        preprocessing=dataset.preprocessing,
        data=loaded.data,
    )
    return freeze.from_checkpoint(source, spec, out)
