"""`sparsepipe validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common

SHOWN_LAYERS = 3
BELONGS = {"epsilon": ("--attack pgd",), "steps": ("--attack pgd",)}


@click.command("validate")
@click.argument("onnx", nargs=-1, required=True, type=common.existing_path(dir_okay=False))
@click.option(
    "--against", required=True, type=common.existing_path(), help="An ONNX file, a run folder or a stage's folder."
)
@click.option(
    "--data",
    help="Dataset to compare on; its options as --set data.size=224. Default: the one the network was trained on, or "
    "random inputs.",
)
@click.option("--max-relative", type=float, help="Largest allowed difference, relative to the largest output.")
@click.option("--min-agreement", type=float, help="Smallest allowed share of samples with the same top class.")
@click.option(
    "--max-drop", type=float, metavar="POINTS",
    help="int8 files: largest allowed loss of accuracy. Default: 1 point; it counts as more only where its whole 95% "
    "interval is above this.",
)  # fmt: skip
@click.option(
    "--max-error", type=float, metavar="SHARE",
    help="int8 files: largest allowed root mean square error, as a share of the output's range. Default: 0.1.",
)  # fmt: skip
@click.option("--samples", type=int, default=64, show_default=True, help="Number of random inputs, without a dataset.")
@click.option("--attack", type=click.Choice(["pgd"]), help="Measure the accuracy on inputs changed by this, too.")
@click.option(
    "--epsilon", type=float,
    help="--attack: largest change of a value before normalisation; pixels are in [0, 1]. Default: 8/255.",
)  # fmt: skip
@click.option("--steps", type=int, help="--attack: gradient steps. Default: 20.")
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
    max_drop: float | None,
    max_error: float | None,
    samples: int,
    attack: str | None,
    epsilon: float | None,
    steps: int | None,
    input_: dict[str, tuple[int, ...]],
    trusted_model: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare ONNX files with what they were made from: outputs, predicted classes, accuracy.

    Exits with 1 if a file differs by more than the tolerance, and names the first layer that diverges. An int8 file is
    judged by its loss of accuracy and its numeric error instead, and the layers that add most noise are named.

    \b
    sparsepipe validate runs/quickstart/export/model.portable.onnx --against runs/quickstart
    sparsepipe validate pruned.onnx --against original.onnx
    sparsepipe validate model.universal.onnx --against runs/quickstart --attack pgd --epsilon 0.1
    """
    from sparsepipe.settings import check
    from sparsepipe.stages import validate

    flags = {
        "max_relative": max_relative,
        "min_agreement": min_agreement,
        "int8_max_drop": max_drop,
        "int8_max_error": max_error,
    }
    tolerances = common.section(against, "validate", overrides, flags)
    given = {key: value for key, value in (("epsilon", epsilon), ("steps", steps)) if value is not None}
    common.refuse_idle(BELONGS, ["--attack pgd"] if attack else [])
    attacked = None if attack is None else {"name": attack, **given}
    table = {**tolerances.model_dump(), "samples": samples, "input": input_, "attack": attacked}
    config = check(validate.ValidateConfig, table, where="validate")
    results = validate.compare_all(
        onnx, against, common.dataset(data, overrides), config=config, trusted_model=trusted_model
    )
    passed = all(result["passed"] for result in results)
    if as_json:
        common.print_json(results[0] if len(results) == 1 else {"passed": passed, "results": results})
    else:
        _show(results)
    if not passed:
        raise click.exceptions.Exit(1)


def _show(results: list[dict[str, Any]]) -> None:
    rows = [row for result in results for row in result["candidates"]]
    exact = [row for row in rows if row["precision"] != "int8"]
    ranked = [row for row in rows if row.get("auc") is not None]
    if exact:
        common.print_table(
            [
                "file", "", "samples", "max abs", "max relative", "same class", "accuracy", "of the reference",
                "diverges at",
            ],
            [
                [*_outcome(row), row["max_abs"], row["max_relative"], *_classes(row), _diverging(row)]
                for row in exact
            ],
        )  # fmt: skip
    quantised = [row for row in rows if row["precision"] == "int8"]
    if quantised:
        common.print_table(
            [
                "int8 file", "", "samples", "error / range", "same class", "accuracy", "of the reference",
                "points lost", "noisiest layers (SQNR up to there)",
            ],
            [
                [*_outcome(row), _share(row["rms_of_range"]), *_classes(row), _drop(row), _noisiest(row)]
                for row in quantised
            ],
        )  # fmt: skip
    if ranked:
        common.print_table(
            ["file", "ROC-AUC", "of the reference"],
            [[row["file"], f"{row['auc']:.4f}", f"{row['reference_auc']:.4f}"] for row in ranked],
        )
    attacks = [result["attack"] for result in results if "attack" in result]
    if attacks:
        _show_attacks(attacks)
    notes = [result["note"] for result in results]
    notes += [attack["note"] for attack in attacks]
    notes += [row["note"] and f"{row['file']}: {row['note']}" for row in rows]
    for note in dict.fromkeys(note for note in notes if note):
        click.echo(note)


def _show_attacks(attacks: list[dict[str, Any]]) -> None:
    rows: list[list[Any]] = []
    for attack in attacks:  # files that were compared on the same samples share one
        own = [["PyTorch", "white-box", attack["network"]]]
        if joint := attack["joint"]:
            own.append(["PyTorch", f"on {attack['branches']} branches together", joint])
        rows += [row for row in own if row not in rows]
    rows += [[file["file"], "transferred", file["accuracy"]] for attack in attacks for file in attack["files"]]
    first = attacks[0]
    common.print_table(
        [f"under {first['name']}, epsilon {first['epsilon']:.4g}, {first['steps']} steps", "attack", "samples",
         "accuracy", "95% interval"],
        [
            [name, kind, found["samples"], f"{found['value']:.2%}", f"{found['low']:.2%}–{found['high']:.2%}"]
            for name, kind, found in rows
        ],
    )  # fmt: skip


def _outcome(row: dict[str, Any]) -> list[Any]:
    return [row["file"], "passed" if row["passed"] else "FAILED", row["samples"]]


def _classes(row: dict[str, Any]) -> list[str | None]:
    """Agreement, accuracy and that of the reference."""
    accuracy, reference = row["accuracy"], row["reference_accuracy"]
    return [
        _share(row["agreement"]),
        f"{accuracy['value']:.2%}" if accuracy else None,
        f"{reference['value']:.2%}" if reference else None,
    ]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"


def _diverging(row: dict[str, Any]) -> str | None:
    divergence = row["first_divergence"]
    return divergence["layer"] if divergence else None


def _drop(row: dict[str, Any]) -> str | None:
    drop = row["drop_points"]
    return f"{drop['value']:.2f} ({drop['low']:.2f}–{drop['high']:.2f})" if drop else None


def _noisiest(row: dict[str, Any]) -> str | None:
    named = [
        layer["layer"] + (f" {layer['sqnr_db']:.0f} dB" if layer["sqnr_db"] is not None else "")
        for layer in row["noisiest_layers"][:SHOWN_LAYERS]
    ]
    return ", ".join(named) or None
