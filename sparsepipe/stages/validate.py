"""The stage `validate`: exported files against the network that they were made from, on the same data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, PositiveInt

from sparsepipe import data as datasets
from sparsepipe.artefact import Artefact, draft, write_json
from sparsepipe.benchmark.statistics import wilson
from sparsepipe.data.registry import SOURCES
from sparsepipe.errors import ArtefactError, DataError, GraphError, RecipeError, SparsepipeError
from sparsepipe.progress import track
from sparsepipe.quantization.noise import is_quantised
from sparsepipe.recipe import Recipe, Shapes, Validation
from sparsepipe.runtime import library_path
from sparsepipe.runtime.compare import Divergence, Tally, finite, first_divergence, has_classes
from sparsepipe.runtime.inputs import Input, aligned, merge, rename, sized
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.runtime.samples import Batch, Samples, labelled_samples, random_samples
from sparsepipe.settings import Choice, NamedChoice, Section, check
from sparsepipe.spec import CALIBRATION_KEY, TARGET_KEY, ModelSpec, Preprocessing
from sparsepipe.stages import int8_verdict
from sparsepipe.stages.fit import input_for
from sparsepipe.stages.reference import (
    DENSE_TARGET,
    NETWORK_STAGES,
    Network,
    Reference,
    TorchNetwork,
    from_artefact,
    from_path,
    spec_of,
)

LIBRARY_TARGET = "universal"
RESULT_FILE = "validation.json"
SOURCES_AT_HAND = SOURCES.keys() - {"hf"}
"""Kinds of datasets that a file may name: they run no code of others and download nothing."""


class Attack(Section):
    """Projected gradient descent on the inputs, within a ball (l-infinity)."""

    name: Literal["pgd"] = "pgd"
    epsilon: Annotated[float, Field(gt=0)] = 8 / 255
    """Radius, in units of the values before normalisation: pixels are in [0, 1]."""
    steps: PositiveInt = 20
    step_size: Annotated[float, Field(gt=0)] | None = None
    """None is 2.5 * epsilon / steps."""


class ValidateConfig(Validation):
    """The recipe's `validate` section, and what else the result depends on."""

    data: NamedChoice | None = None
    """What to compare on; None means the dataset that the file names, or else random inputs."""
    seed: int = 0
    """Of random inputs."""
    samples: PositiveInt = 64
    """Number of random inputs."""
    input: Shapes = Field(default_factory=dict)
    """Where the files leave sizes open."""
    attack: Attack | None = None
    """Measure the accuracy under it, too."""

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ValidateConfig:
        return cls(**recipe.validation.model_dump(), data=recipe.data, seed=recipe.seed)


def run(config: BaseModel, inputs: Mapping[str, Artefact], out: Path, *, trusted_model: str | None = None) -> Artefact:
    """Compare every exported file with the network itself, in PyTorch on the test split.

    Where torch is not installed, the dense file is the reference for the others.

    Args:
        config: a `ValidateConfig`.
        inputs: `export`, and `freeze` or `convert`.
        out: folder of the new artefact, with `validation.json`.
        trusted_model: the `module:function` that the user allows to be imported as the network.

    Raises:
        SparsepipeError: an input is missing or damaged. A file that differs is a result: `passed` is false.
    """
    assert isinstance(config, ValidateConfig)
    export = inputs["export"]
    source = next(inputs[stage] for stage in NETWORK_STAGES if stage in inputs)
    reference = from_artefact(source, export, trusted_model)
    files = {target: export.file(file["name"]) for target, file in export.metric("files").items()}
    if isinstance(reference.network, OnnxNetwork):
        files.pop(DENSE_TARGET)
    if not files:
        raise ArtefactError(
            "There is no exported file to compare with the network.",
            where=str(export.folder),
            advice="Without torch the dense file stands for the network; export a further target.",
        )
    digests = {name: artefact.digest for name, artefact in inputs.items()}
    if config.data is not None:
        digests["data"] = datasets.fingerprint(config.data.name, config.data.options)
    with draft(out, "validate", config, digests) as building:
        candidates = [network for path in files.values() for network in _ways_to_run(path)]
        result = _validate(candidates, reference, config)
        write_json(building.folder / RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def compare(
    candidate: Path,
    reference: Path | Artefact,
    data: Choice | None = None,
    *,
    config: ValidateConfig | None = None,
    trusted_model: str | None = None,
) -> dict[str, Any]:
    """Compare one ONNX file with another one, or with the network in a folder: see `compare_all`.

    Returns:
        What `validation.json` holds: `passed`, `candidates` (one; two for a universal file, which is also run without
        the kernel library), `reference`, `data`, `samples` and `note`.
    """
    (result,) = compare_all([candidate], reference, data, config=config, trusted_model=trusted_model)
    return result


def compare_all(
    candidates: Sequence[Path],
    reference: Path | Artefact,
    data: Choice | None = None,
    *,
    config: ValidateConfig | None = None,
    trusted_model: str | None = None,
) -> list[dict[str, Any]]:
    """Compare ONNX files with another one, or with the network in a folder.

    Files that are compared on the same samples share them, the outputs of the reference and the attack on it.

    Args:
        candidates: the ONNX files in question.
        reference: an ONNX file, a run folder or a stage's folder, or an artefact that holds a network.
        data: dataset to compare on. None means `config.data`, or the one that a file's metadata name, or else random
            inputs, for which there is no accuracy.
        config: tolerances, seed, and the number of random inputs.
        trusted_model: the `module:function` that the user allows to be imported as the network.

    Returns:
        For each file what `compare` returns, in the order of the files.

    Raises:
        SparsepipeError: a file is missing or damaged, or takes other inputs than the reference.
    """
    config = config or ValidateConfig()
    if data is not None:
        config = config.model_copy(update={"data": data})
    files = [_ways_to_run(candidate) for candidate in candidates]
    if isinstance(reference, Artefact):
        other = from_artefact(reference, None, trusted_model)
    else:
        other = from_path(reference, trusted_model)
    references = [replace(other, spec=other.spec or spec_of(ways[0])) for ways in files]
    alike: dict[str, list[int]] = {}
    for index, (ways, each) in enumerate(zip(files, references, strict=True)):
        material = (each.spec, _taken(ways, each, config), _known_data(ways, each))
        alike.setdefault(repr(material), []).append(index)
    results: dict[int, dict[str, Any]] = {}
    for indices in alike.values():
        together = [files[index] for index in indices]
        found = _validate([way for ways in together for way in ways], references[indices[0]], config)
        results |= zip(indices, _of_each_file(found, [len(ways) for ways in together]), strict=True)
    return [results[index] for index in range(len(files))]


@dataclass(frozen=True)
class _Material:
    """What to compare on: the samples, the dataset that they come from, and what must be said about the choice."""

    samples: Samples
    data: str | None
    classes: int | None
    note: str | None
    preprocessing: Preprocessing | None = None
    """Of a dataset's samples."""


@dataclass
class _Trial:
    """One file under test: the comparison so far, and the inputs for which it was worst."""

    network: OnnxNetwork
    tally: Tally = field(default_factory=Tally)
    worst: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    """Some samples, for a closer look."""

    def add(self, batch: Batch, expected: Sequence[Any], samples: Samples) -> None:
        self.first = self.first or batch.head(int8_verdict.TRACED)
        found = self.network.run(rename(batch.inputs, samples.inputs, self.network.inputs))
        sample = self.tally.add(expected, batch.outputs(found), batch.labels)
        if sample is not None or not self.worst:
            self.worst = batch.only(sample or 0)


def _of_each_file(result: Mapping[str, Any], ways: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The result of each of several files that were compared together; `ways` is how many rows it has."""
    start = 0
    for count in ways:
        own = slice(start, start := start + count)
        rows = result["candidates"][own]
        attacked = {}
        if attack := result.get("attack"):
            attacked = {"attack": {**attack, "files": attack["files"][own]}}
        yield {**result, **attacked, "passed": all(row["passed"] for row in rows), "candidates": rows}


def _taken(candidates: Sequence[OnnxNetwork], reference: Reference, config: ValidateConfig) -> list[Input]:
    """The inputs that all take."""
    taken = reference.network.inputs
    for candidate in candidates:
        taken = merge(taken, candidate.inputs)
    return sized(taken, config.input)


def _known_data(candidates: Sequence[OnnxNetwork], reference: Reference) -> Choice | None:
    """The dataset that the network was trained on, or else that a file was calibrated on."""
    if reference.spec and reference.spec.data:
        return reference.spec.data
    return next((data for data in map(_calibration_data, candidates) if data), None)


def _validate(candidates: Sequence[OnnxNetwork], reference: Reference, config: ValidateConfig) -> dict[str, Any]:
    network = reference.network
    taken, known = _taken(candidates, reference, config), _known_data(candidates, reference)
    material = _material(taken, [*candidates, network], reference.spec, known, config)
    samples, trials = material.samples, [_Trial(candidate) for candidate in candidates]
    for batch in track(samples, "Validating", len(samples)):
        expected = batch.outputs(network.run(rename(batch.inputs, samples.inputs, network.inputs)))
        _check_classes(expected, material)
        for trial in trials:
            trial.add(batch, expected, samples)
    rows = [_row(trial, network, samples.inputs, config) for trial in trials]
    attacked = {} if config.attack is None else {"attack": _attacked(config, reference, candidates, material)}
    return {
        **attacked,
        "passed": all(row["passed"] for row in rows),
        "candidates": rows,
        "reference": network.name,
        "data": material.data,
        "samples": samples.count,
        "note": "; ".join(note for note in (reference.note, material.note) if note) or None,
    }


def _attacked(
    config: ValidateConfig, reference: Reference, candidates: Sequence[OnnxNetwork], material: _Material
) -> dict[str, Any]:
    """Accuracy under an attack.

    Raises:
        ArtefactError: there is no PyTorch network to attack, or a file of another branch of it is damaged.
        DataError: no labels are known.
    """
    network = reference.network
    if not isinstance(network, TorchNetwork):
        raise ArtefactError(
            "An attack follows the gradients of the PyTorch network, which an ONNX file has not.",
            where=network.name,
            advice=f"Give the run folder or a folder of {' or '.join(NETWORK_STAGES)} by --against, with torch "
            "installed.",
        )
    if material.preprocessing is None:
        raise DataError("An attack needs samples with labels.", where="--attack", advice="Name a dataset by --data.")
    from sparsepipe.stages import attack  # it needs torch

    assert config.attack is not None
    return attack.robustness(
        config.attack,
        network,
        candidates,
        material.samples,
        material.preprocessing,
        config.seed,
        branches=attack.branches(reference.source, network) if reference.source else (),
    )


def _ways_to_run(path: Path) -> list[OnnxNetwork]:
    """The file as it runs here, and, where the kernel library takes part, also as it runs elsewhere."""
    network = OnnxNetwork(path)
    if network.metadata.get(TARGET_KEY) != LIBRARY_TARGET or library_path() is None:
        return [network]
    return [network, OnnxNetwork(path, library=False)]


def _calibration_data(network: OnnxNetwork) -> Choice | None:
    """The dataset that an int8 file says it was calibrated on."""
    text = network.metadata.get(CALIBRATION_KEY)
    try:
        return check(Choice, json.loads(text), where=network.name) if text else None
    except (ValueError, RecipeError) as error:
        raise GraphError(f"The metadata '{CALIBRATION_KEY}' is damaged: {error}.", where=network.name) from error


def _material(
    taken: Sequence[Input],
    networks: Sequence[Network],
    spec: ModelSpec | None,
    known: Choice | None,
    config: ValidateConfig,
) -> _Material:
    """The test split of the configured dataset, or of the one that a file names, or random inputs."""
    if config.data is not None:
        return _test_split(config.data, taken, spec, config)
    if known is None:
        note = "no dataset is known, so random inputs were compared, and there is no accuracy"
        return _random(taken, networks, config, note)
    if known.name.partition(":")[0] not in SOURCES_AT_HAND:
        note = (
            f"the dataset '{known.name}' of the file's metadata is code or a download, which is used only if you "
            "name it; random inputs were compared, and there is no accuracy"
        )
        return _random(taken, networks, config, note)
    try:
        return _test_split(known, taken, spec, config)
    except SparsepipeError as error:
        note = (
            f"the dataset '{known.name}' of the file's metadata cannot be used ({error}); random inputs were "
            "compared, and there is no accuracy"
        )
        return _random(taken, networks, config, note)


def _test_split(choice: Choice, taken: Sequence[Input], spec: ModelSpec | None, config: ValidateConfig) -> _Material:
    dataset = datasets.load(choice.name, choice.options)
    entry = input_for(dataset, taken, where=choice.name)
    preprocessing, notes = dataset.preprocessing, []
    if spec is None:
        notes.append("the file names no preprocessing, so that of the dataset was used")
    else:
        preprocessing = spec.preprocessing
        if len(spec.classes) == len(dataset.classes) and spec.classes != dataset.classes:
            notes.append("the classes of the dataset have other names than those of the network")

    def load(indices: Any) -> Any:
        return datasets.prepare(dataset.test.load(indices), preprocessing)

    samples = labelled_samples(entry, dataset.test.labels, config.batch_size, load)
    return _Material(samples, choice.name, len(dataset.classes), "; ".join(notes) or None, preprocessing)


def _random(taken: Sequence[Input], networks: Sequence[Network], config: ValidateConfig, note: str) -> _Material:
    bounds: dict[str, int] = {}
    for network in networks:
        if isinstance(network, OnnxNetwork):
            theirs = network.index_bounds()
            bounds |= {
                entry.name: min(theirs[own.name], bounds.get(entry.name, theirs[own.name]))
                for entry, own in zip(taken, aligned(taken, network.inputs), strict=True)
                if own.name in theirs
            }
    samples = random_samples(taken, config.samples, config.batch_size, config.seed, bounds)
    return _Material(samples, None, None, note)


def _check_classes(outputs: Sequence[Any], material: _Material) -> None:
    if material.classes is not None and has_classes(outputs[0]) and outputs[0].shape[1] != material.classes:
        raise DataError(
            f"The dataset has {material.classes} classes, the network {outputs[0].shape[1]}.", where=material.data
        )


def _row(trial: _Trial, network: Network, taken: Sequence[Input], config: ValidateConfig) -> dict[str, Any]:
    tally = trial.tally
    judged = _judge_int8 if is_quantised(trial.network.model) else _judge
    passed, facts, notes = judged(trial, network, taken, config)
    return {
        "file": trial.network.name,
        "reference": network.name,
        "samples": tally.samples,
        "max_abs": finite(tally.max_abs),
        "max_relative": finite(tally.max_relative),
        "agreement": tally.agreement,
        "passed": passed,
        "accuracy": _accuracy(tally.correct, tally.samples),
        "reference_accuracy": _accuracy(tally.reference_correct, tally.samples),
        **_aucs(tally),
        **facts,
        "note": " ".join(note for note in (tally.note, *notes) if note) or None,
    }


def _aucs(tally: Tally) -> dict[str, float | None]:
    """Of two classes with known labels, the area under the ROC curve of file and reference."""
    if not tally.ranked:
        return {}
    from sparsepipe.ranking import roc_auc  # it needs scipy.stats, which takes long to import

    candidate, reference, labels = np.concatenate(tally.ranked, axis=1)
    return {"auc": roc_auc(candidate, labels), "reference_auc": roc_auc(reference, labels)}


_Judgement = tuple[bool, dict[str, Any], list[str]]


def _judge(trial: _Trial, network: Network, taken: Sequence[Input], config: ValidateConfig) -> _Judgement:
    """An fp32 file, by its values and classes; where it fails, the first layer that diverges."""
    passed, divergence, notes = trial.tally.passed(config.max_relative, config.min_agreement), None, []
    if not passed:
        try:
            divergence = _first_divergence(trial, network, taken, config.max_relative)
        except GraphError as error:
            notes.append(f"The layers cannot be looked at: {error}")
    return passed, {"precision": "fp32", "first_divergence": asdict(divergence) if divergence else None}, notes


def _judge_int8(trial: _Trial, network: Network, taken: Sequence[Input], config: ValidateConfig) -> _Judgement:
    """A quantised file, by its accuracy and the noise that it adds, and the layers that add most."""
    passed, facts, notes = int8_verdict.judge(trial.tally, config)
    if not passed and trial.tally.correct is None:
        notes.append(
            "Activations that random inputs cause may lie outside of the ranges that were calibrated: name a dataset."
        )
    worst: list[dict[str, Any]] = []
    try:
        worst = int8_verdict.layers(trial.network, network, trial.first, taken)
    except GraphError as error:
        notes.append(f"The layers cannot be looked at: {error}")
    return passed, {"precision": "int8", "first_divergence": None, **facts, "noisiest_layers": worst}, notes


def _first_divergence(trial: _Trial, network: Network, taken: Sequence[Input], tolerance: float) -> Divergence | None:
    """Where the sample with the largest difference first goes beyond the tolerance."""
    candidate = trial.network
    own, theirs = (rename(trial.worst, taken, target) for target in (candidate.inputs, network.inputs))
    expected = network.trace(theirs, candidate.tensors)
    found = candidate.trace(own, list(expected))
    # Outputs belong together by position, whatever they are called.
    expected |= dict(zip(candidate.outputs, network.run(theirs), strict=False))
    found |= dict(zip(candidate.outputs, candidate.run(own), strict=False))
    return first_divergence([*candidate.tensors, *candidate.outputs], expected, found, tolerance)


def _accuracy(correct: int | None, samples: int) -> dict[str, Any] | None:
    if correct is None or not samples:
        return None
    return {**asdict(wilson(correct, samples)), "correct": correct, "samples": samples}
