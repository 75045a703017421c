"""`sparsepipe validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsepipe.cli import common

if TYPE_CHECKING:
    from sparsepipe.recipe import Choice


@click.command("validate")
@click.argument("onnx", nargs=-1, required=True, type=common.existing_path(dir_okay=False))
@click.option(
    "--against", required=True, type=common.existing_path(), help="An ONNX file, a run folder or a stage's folder."
)
@click.option("--data", help="Dataset to compare on. Default: the one the network was trained on, or random inputs.")
@click.option("--max-relative", type=float, help="Largest allowed difference, relative to the largest output.")
@click.option("--min-agreement", type=float, help="Smallest allowed share of samples with the same top class.")
@click.option("--samples", type=int, default=64, show_default=True, help="Number of random inputs, without a dataset.")
@common.input_option
@common.model_option
@common.overrides_option
@common.output_options
def command(
    onnx: tuple[Path, ...],
    against: Path,
    data: str | None,
    max_relative: float | None,
    min_agreement: float | None,
    samples: int,
    input_: dict[str, tuple[int, ...]],
    trusted_model: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare ONNX files with what they were made from: outputs, predicted classes, accuracy.

    Exits with 1 if a file differs by more than the tolerance, and names the first layer that diverges.

    \b
    sparsepipe validate runs/quickstart/export/model.portable.onnx --against runs/quickstart
    sparsepipe validate pruned.onnx --against original.onnx
    """
    from sparsepipe import recipe
    from sparsepipe.stages import validate

    flags = {"max_relative": max_relative, "min_agreement": min_agreement}
    tolerances = common.section(against, "validate", overrides, flags)
    table = {**tolerances.model_dump(), "samples": samples, "input": input_}
    config = recipe.check(validate.ValidateConfig, table, where="validate")
    results = [
        validate.compare(path, against, dataset(data), config=config, trusted_model=trusted_model) for path in onnx
    ]
    passed = all(result["passed"] for result in results)
    if as_json:
        common.print_json(results[0] if len(results) == 1 else {"passed": passed, "results": results})
    else:
        _show(results)
    if not passed:
        raise click.exceptions.Exit(1)


def dataset(name: str | None) -> Choice | None:
    """The dataset that `--data NAME` means."""
    from sparsepipe.recipe import Choice

    return Choice(name=name) if name else None


def _show(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        for row in result["candidates"]:
            accuracy, reference = row["accuracy"], row["reference_accuracy"]
            divergence = row["first_divergence"]
            rows.append(
                [
                    row["file"],
                    "passed" if row["passed"] else "FAILED",
                    row["samples"],
                    row["max_abs"],
                    row["max_relative"],
                    None if row["agreement"] is None else f"{row['agreement']:.2%}",
                    f"{accuracy['value']:.2%}" if accuracy else None,
                    f"{reference['value']:.2%}" if reference else None,
                    divergence["layer"] if divergence else None,
                ]
            )
    common.print_table(
        ["file", "", "samples", "max abs", "max relative", "same class", "accuracy", "of the reference", "diverges at"],
        rows,
    )
    notes = [result["note"] for result in results]
    notes += [row["note"] and f"{row['file']}: {row['note']}" for result in results for row in result["candidates"]]
    for note in dict.fromkeys(note for note in notes if note):
        click.echo(note)
