"""Write ONNX files: from a trained network of this project, or from any ONNX file whose weights hold zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from sparsepipe import recipe
from sparsepipe.artefact import Artefact, atomic_write, digest_file, draft, write_json
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.errors import MissingExtraError
from sparsepipe.graph import index, opset
from sparsepipe.graph.choice import Choice, choose
from sparsepipe.graph.finish import serialise, stamp
from sparsepipe.graph.finite import refuse_not_finite
from sparsepipe.graph.fold import fold
from sparsepipe.graph.load import load
from sparsepipe.graph.portable import sparsify
from sparsepipe.graph.select import Layer, sparsity, survey
from sparsepipe.graph.universal import rewrite
from sparsepipe.progress import bar
from sparsepipe.runtime import session
from sparsepipe.runtime.sessions import run as run_once
from sparsepipe.settings import check
from sparsepipe.spec import CALIBRATION_KEY, LAYERS_FILE, PRECISION_KEY, SPEC_FILE, SPEC_KEY, TARGET_KEY, ModelSpec
from sparsepipe.stages.forms import FP32, INT8, Form, forms
from sparsepipe.stages.network import load_network

if TYPE_CHECKING:
    from torch import nn

    from sparsepipe.benchmark.measure import Outcome
    from sparsepipe.stages.int8 import Int8

log = logging.getLogger("sparsepipe")

COMMON_IR_VERSION = 10
"""Version of the file format that any onnxruntime since 1.18 reads. The onnx package writes its own newest one, which
onnxruntime reads only months later."""
STEPS = 4  # of the progress bar: read or build, choose, check, write; measuring has one for each second


@dataclass(frozen=True)
class Plan:
    """A model, and which of its layers become sparse: for `portable` by size, for `universal` by time.

    Attributes:
        model: as it was built or read.
        layers: what `portable` stores sparse.
        folded: the model without batch normalisations.
        kernels: what `universal` runs sparse in fp32, in `folded`; empty where that is not exported.
        outcome: what measuring found; None where the cost model decided.
        int8: the files in int8; None where there are none.
    """

    model: ModelProto
    layers: Sequence[Layer]
    folded: ModelProto
    kernels: Sequence[Choice]
    outcome: Outcome | None = None
    int8: Int8 | None = None


TARGETS: Mapping[str, Callable[[Plan], ModelProto]] = {
    "dense": lambda plan: index.copy(plan.model),
    "portable": lambda plan: sparsify(plan.model, plan.layers),
    "universal": lambda plan: rewrite(plan.folded, plan.kernels),
}
"""Target -> how it stores the chosen layers."""


def run(
    config: recipe.Export, inputs: Mapping[str, Artefact], out: Path, *, trusted_model: str | None = None
) -> Artefact:
    """Export the network of a `convert` or `freeze` artefact.

    Args:
        config: targets and opset.
        inputs: `convert` or `freeze` -> its artefact.
        out: the folder to write.
        trusted_model: `module:function` that may be imported, if the network was made by it.

    Raises:
        ModelError: the network's code is not trusted, or its weights do not fit it.
        GraphError: the network cannot be exported, a weight is not finite, or onnxruntime cannot load the result.
        ArtefactError: the artefact is damaged.
        MissingExtraError: torch or onnxscript is not installed.
    """
    try:
        from sparsepipe.graph.build import build
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", "Exporting a network") from error

    stage = "convert" if "convert" in inputs else "freeze"
    source = inputs[stage]
    spec = ModelSpec.read(source.file(SPEC_FILE))
    with bar("Export", _steps(config)) as progress:
        network = load_network(source, trusted_model)
        built = build(network, spec.input_shape, opset=config.opset)
        model, unfolded = fold(refuse_not_finite(built, where=str(source.folder)))
        for norm in unfolded:
            log.info("The batch normalisation '%s' is not folded: %s.", norm.node, norm.reason)
        properties = {SPEC_KEY: spec.model_dump_json(), **_versions("torch", "onnxscript")}
        if spec.recipe_digest is not None:
            properties["sparsepipe.recipe_digest"] = spec.recipe_digest
        progress.advance(note="choosing layers")
        return _write(model, properties, config, {stage: source.digest}, out, progress.advance)


def from_onnx(path: Path, config: recipe.Export, out: Path) -> Artefact:
    """Export an ONNX file from any tool: graph, names and opset stay, only the storage of weights changes.

    The opset is converted only if `config` sets one explicitly. A version of the file format that is newer than the
    opset needs is lowered, so that onnxruntime reads it. torch is not needed.

    For `universal`, batch normalisations are folded and what follows a sparse layer becomes part of it.

    Raises:
        GraphError: the file cannot be read, holds values that are not finite, cannot be converted to the opset, or
            cannot be loaded by onnxruntime.
    """
    with bar("Export", _steps(config)) as progress:
        model = refuse_not_finite(load(path), where=str(path))
        if "opset" in config.model_fields_set:
            model = opset.convert(model, config.opset, where=str(path))
        model.ir_version = min(model.ir_version, max(opset.smallest_ir_version(model), COMMON_IR_VERSION))
        progress.advance(note="choosing layers")
        return _write(model, {}, config, {"onnx": digest_file(path)}, out, progress.advance)


def export_onnx(network: nn.Module, input_shape: tuple[int, ...], out: str | Path, **settings: Any) -> Artefact:
    """Export a network as it stands in memory, trained in whatever loop; the zeros in its weights are what is sparse.

    Args:
        network: takes one tensor [batch, *input_shape] and gives one; exported in evaluation mode and not touched.
        input_shape: shape of one sample, (C, H, W) or (F,).
        out: the folder to write. What an earlier export wrote there is replaced.
        settings: keys of a recipe's section `export`: targets, opset.

    Raises:
        RecipeError: there is no such setting, or its value is not allowed.
        GraphError: the network cannot be exported, a weight is not finite, or onnxruntime cannot load the result.
        ArtefactError: the folder holds something else.
        MissingExtraError: onnxscript is not installed.
    """
    config = check(recipe.Export, settings, where="export")
    try:
        from sparsepipe.graph.build import build
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train", "Exporting a network") from error

    with bar("Export", STEPS) as progress:
        built = build(network, tuple(input_shape), opset=config.opset)
        model, _ = fold(refuse_not_finite(built, where=type(network).__name__))
        progress.advance(note="choosing layers")
        return _write(model, _versions("torch", "onnxscript"), config, {}, Path(out), progress.advance)


def file_name(target: str) -> str:
    """Name of the ONNX file of a target in the output folder; `dense.int8` is the int8 form beside that in fp32."""
    return f"model.{target}.onnx"


def _write(
    model: ModelProto,
    properties: Mapping[str, str],
    config: recipe.Export,
    inputs: Mapping[str, str],
    out: Path,
    advance: Callable[..., None],
) -> Artefact:
    """Choose, rewrite, check and write; nothing is written before every file is known to be good."""
    plan = _plan(model, properties, config, advance)
    total = sparsity(plan.layers)
    common = {
        **properties,
        **_versions("onnx"),
        "sparsepipe.version": package_versions()["sparsepipe"],
        "sparsepipe.sparsity": f"{total:.6f}",
    }
    advance(note="checking")
    files: dict[Form, bytes] = {}
    for form in forms(config):
        own = {**common, TARGET_KEY: form.target, PRECISION_KEY: form.precision}
        if form.precision == INT8 and plan.int8 is not None:
            rewritten = index.copy(plan.int8.files[form.target])
            if config.calibrate is not None:
                own[CALIBRATION_KEY] = config.calibrate.model_dump_json()
        else:
            rewritten = TARGETS[form.target](plan)
        stamp(rewritten, own)
        files[form] = serialise(rewritten, where=file_name(form.key), source=model)
    advance(note="writing")
    rows = [asdict(layer) for layer in plan.layers]
    universal = "universal" in config.targets
    with draft(out, "export", config, inputs) as building:
        for form, data in files.items():
            path = building.folder / file_name(form.key)
            with atomic_write(path) as file:
                file.write(data)
            opened = session(path)
            if form.precision == INT8 and plan.int8 is not None:  # some of its faults show only when it runs
                run_once(opened, plan.int8.call, where=path.name)
        write_json(building.folder / LAYERS_FILE, rows)
        building.metrics.update(
            files={
                form.key: {
                    "name": file_name(form.key),
                    "bytes": len(data),
                    "target": form.target,
                    "precision": form.precision,
                }
                for form, data in files.items()
            },
            sparsity=total,
            opset=index.opset(model),
            layers=rows,
            kernels=[asdict(choice) for choice in plan.kernels],
            int8_kernels=[asdict(choice) for choice in plan.int8.kernels] if plan.int8 and universal else [],
            measured=_facts(plan.outcome),
            precision=config.precision,
            calibration_samples=plan.int8.samples if plan.int8 else None,
            selection=plan.int8.selection.facts if plan.int8 and plan.int8.selection else None,
        )
    advance()
    return Artefact.read(out, "export")


def _plan(
    model: ModelProto, properties: Mapping[str, str], config: recipe.Export, advance: Callable[..., None]
) -> Plan:
    """Which layers become sparse: by size, by the cost model and, where that is asked for, by timing them."""
    layers = survey(model)
    made = None
    if INT8 in config.precision:
        from sparsepipe.stages import int8  # it needs scipy.stats, which takes long to import

        advance(0, note="calibrating")
        made = int8.prepare(fold(model)[0], properties, config)
    if FP32 not in config.precision or "universal" not in config.targets:
        return Plan(model, layers, model, [], int8=made)
    folded = fold(model)[0]
    kernels = choose(folded, config.isa)
    if not config.measure:
        return Plan(model, layers, folded, kernels, int8=made)
    from sparsepipe.benchmark.measure import measure

    steps = _steps(config) - STEPS
    done = 0

    def move(share: float, note: str) -> None:
        nonlocal done
        before, done = done, round(share * steps)
        advance(done - before, note)

    outcome = measure(folded, kernels, config.measure_seconds, move)
    return Plan(model, layers, folded, outcome.choices, outcome, made)


def _steps(config: recipe.Export) -> int:
    return STEPS + (max(1, round(config.measure_seconds)) if config.measure and "universal" in config.targets else 0)


def _facts(outcome: Outcome | None) -> dict[str, Any] | None:
    """What the manifest says of a measurement: it holds for the machine where it was done."""
    if outcome is None:
        return None
    figures = {key: value for key, value in vars(outcome).items() if key != "choices"}
    return {**figures, "machine": describe_machine()}


def _versions(*packages: str) -> dict[str, str]:
    return {f"sparsepipe.{name}": package_versions()[name] for name in packages}
