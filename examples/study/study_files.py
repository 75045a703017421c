"""The end of the chain: the study's networks as ONNX files, their accuracy in onnxruntime, size, memory and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsepipe import pipeline, rows
from sparsepipe.artefact import Artefact, digest_file, read_json, write_json
from sparsepipe.comparison import Training
from sparsepipe.environment import describe_machine
from sparsepipe.recipe import Bench, Conversion, Export, digest
from sparsepipe.settings import Choice
from sparsepipe.stages import bench, convert, export, freeze, validate
from sparsepipe.stages.freeze import FreezeConfig
from sparsepipe.stages.validate import ValidateConfig

SCHEMA_VERSION = 1
TARGETS = ("dense", "universal")
SPEED_FILE = "speed.json"


def accuracies(trainings: Sequence[Training], folder: Path) -> list[Path]:
    """Export each training whose run folder is here, fp32 and int8, and test its files in onnxruntime.

    Calibration takes samples of the training split; nothing is chosen by the test split. A folder of another recipe
    counts as none.

    Returns:
        The files written into `folder`, one for each training; what was tested already and is here as files stays.
    """
    written = []
    for training in trainings:
        path = folder / f"{training.folder.name}.json"
        done = path.is_file() and (training.folder / "export").is_dir()
        trained = None if done else pipeline.unchanged(training.stage, {}, training.folder / "train")
        if trained is not None:
            write_json(path, _tested(training, trained))
            written.append(path)
    return written


def _tested(training: Training, trained: Artefact) -> dict[str, Any]:
    data = Choice.model_validate(trained.manifest.config["data"])
    frozen = freeze.run(FreezeConfig(), {"train": trained}, training.folder / "freeze")
    converted = convert.run(Conversion(), {"freeze": frozen}, training.folder / "convert")
    settings = Export(targets=TARGETS, precision=("fp32", "int8"), calibrate=data)
    exported = export.run(settings, {"convert": converted}, training.folder / "export")
    inputs = {"freeze": frozen, "export": exported}
    tested = validate.run(ValidateConfig(data=data), inputs, training.folder / "validate")
    by_name = {row["file"]: row for row in tested.metrics["candidates"]}
    kept = ("accuracy", "reference_accuracy", "agreement", "passed", "drop_points", "rms_of_range")
    return {
        "files_schema": SCHEMA_VERSION,
        "training": training.folder.name,
        "recipe_digest": digest(training.stage.config),
        "config": trained.manifest.config,
        "export": settings.model_dump(mode="json"),
        "files": {
            key: {
                "name": file["name"],
                "bytes": file["bytes"],
                "target": file["target"],
                "precision": file["precision"],
                **{name: by_name[file["name"]].get(name) for name in kept},
            }
            for key, file in exported.metrics["files"].items()
        },
        "sparse_layers": {
            "fp32": [layer["name"] for layer in exported.metrics["kernels"] if layer["sparse"]],
            "int8": [layer["name"] for layer in exported.metrics["int8_kernels"] if layer["sparse"]],
        },
        "commit": rows.source_commit(),
        "versions": exported.manifest.versions,
        "machine": describe_machine(),
    }


def speed(files: Mapping[str, tuple[str, Path]], folder: Path, seconds: float) -> Path:
    """Time files in turns, one thread, batch 1; the machine should be idle.

    Args:
        files: by what to call them, the training that each is of and where it is; the first is what the others are
            compared with.
        folder: where the result is written.
        seconds: measuring time for each file.
    """
    paths = [path for _, path in files.values()]
    result = bench.measure(paths, Bench(threads=(1,), batch=(1,), seconds=seconds))
    for (name, (training, path)), row in zip(files.items(), result["results"], strict=True):
        row |= {"file": name, "training": training, "digest": digest_file(path)}
    result["baseline"] = next(iter(files))
    path = folder / SPEED_FILE
    write_json(path, {"speed_schema": SCHEMA_VERSION, **result, "commit": rows.source_commit()})
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """What `accuracies` wrote."""
    return [read_json(path) for path in sorted(folder.glob("*.json")) if path.name != SPEED_FILE]
