"""What the page shows of each part of a run: contents -> plain values and figures for the template.

Every function gives None where the artefact that it shows is absent; the template then says so in one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsepipe.reporting import figures, film, masks, units, verdicts
from sparsepipe.reporting import motion as moving
from sparsepipe.reporting.contents import Contents, Layer, read_epochs

MAX_LAYERS = 500
"""Rows of a table of layers; the page says how many more there are."""


@dataclass(frozen=True)
class Layers:
    """A table of layers, cut to a length that a browser shows well."""

    shown: Sequence[Layer]
    left_out: int

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Layers:
        return cls(layers[:MAX_LAYERS], max(len(layers) - MAX_LAYERS, 0))

    @property
    def count(self) -> int:
        return len(self.shown) + self.left_out


def chain(contents: Contents) -> list[dict[str, Any]]:
    """The stages in order: when each was made, how long it took, its digest, and which of the others it was made of."""
    known = {artefact.digest: stage for stage, artefact in contents.artefacts.items()}
    return [
        {
            "stage": stage,
            "created": artefact.manifest.created,
            "seconds": _number(artefact.metrics.get("seconds")),
            "digest": artefact.digest,
            "inputs": [
                {"name": name, "digest": digest, "stage": known.get(digest)}
                for name, digest in artefact.manifest.inputs.items()
            ],
            "files": len(artefact.manifest.outputs),
        }
        for stage, artefact in contents.artefacts.items()
    ]


def versions(contents: Contents) -> dict[str, str]:
    """Package versions of all stages; where stages differ, all versions are named."""
    found: dict[str, list[str]] = {}
    for artefact in contents.artefacts.values():
        for name, version in artefact.manifest.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(several) for name, several in found.items()}


def training(contents: Contents) -> dict[str, Any] | None:
    """Curves and key figures of the sparse run and its dense twin."""
    if contents.train is None and contents.dense is None:
        return None
    sparse, dense = (read_epochs(contents.artefacts.get(stage)) for stage in ("train", "train-dense"))
    return {
        "columns": [(label, run) for label, run in (("sparse", contents.train), ("dense twin", contents.dense)) if run],
        "gradient_every": contents.train.dense_gradient_every if contents.train else None,
        "epochs": {"sparse": len(sparse), "dense twin": len(dense)},
        "figures": [*figures.learning_curves(sparse, dense)],
    }


def motion(contents: Contents) -> dict[str, Any] | None:
    """How the masks moved during training: curves of all layers, a row for each, and the film of one."""
    artefact = contents.artefacts.get("train")
    epochs, shown = read_epochs(artefact), film.read(artefact)
    names = moving.layers(epochs)
    curves = [*figures.exploration(epochs)]
    if not curves and not names and shown is None:
        return None
    return {
        "figures": curves,
        "layers": names[:MAX_LAYERS],
        "left_out": max(len(names) - MAX_LAYERS, 0),
        "columns": moving.columns(epochs, names[:MAX_LAYERS]),
        "updates": sum(epoch.mask_updates or 0 for epoch in epochs),
        "film": None if shown is None else film.strip(shown),
        "glyphs": {role: film.glyph(role) for role in film.GLYPHS},
    }


def layers(contents: Contents) -> dict[str, Any] | None:
    """Density of every layer, with the format and the bytes that were chosen for it."""
    rows = _layers(contents)
    if not rows:
        return None
    chosen = {layer.name: layer for layer in (contents.convert.layers if contents.convert else [])}
    joined = [_with_format(layer, chosen.get(layer.name)) for layer in rows]
    return {"figure": figures.density(joined), "table": Layers.of(joined)}


def _layers(contents: Contents) -> list[Layer]:
    """The layers of the latest stage of the chain that lists them all, else as the masks of the training give them."""
    for record in (contents.freeze, contents.convert, contents.export):
        if record is not None and record.layers:
            return _from_input_to_output(record.layers, contents)
    found = [
        Layer(name=name, shape=mask.shape, nnz=int(mask.sum()), size=mask.size)
        for name, mask in masks.read(contents.artefacts.get("train")).items()
    ]
    return _from_input_to_output(found, contents)


def _from_input_to_output(rows: Iterable[Layer], contents: Contents) -> list[Layer]:
    """Each weight once, in the order of the network, which the training's log and the exported graph know."""
    epochs = read_epochs(contents.artefacts.get("train"))
    logged = list(epochs[-1].density) if epochs else []
    exported = [layer.name for layer in contents.export.layers] if contents.export else []
    rank = {name: position for position, name in reversed(list(enumerate(logged or exported)))}
    once: dict[str, Layer] = {}
    for layer in rows:
        once.setdefault(layer.name, layer)
    return sorted(once.values(), key=lambda layer: rank.get(layer.name, len(rank)))


def _with_format(layer: Layer, converted: Layer | None) -> Layer:
    return (
        layer if converted is None else layer.model_copy(update={"format": converted.format, "bytes": converted.bytes})
    )


def mask_pictures(contents: Contents) -> tuple[masks.Picture, ...] | None:
    return masks.pictures(masks.read(contents.artefacts.get("freeze") or contents.artefacts.get("train"))) or None


def sizes(contents: Contents) -> dict[str, Any] | None:
    """Sizes per file and per layer, with the reason for each layer's form."""
    if contents.export is None and contents.convert is None:
        return None
    files = contents.export.files if contents.export else {}
    dense = files["dense"].bytes if "dense" in files else None
    return {
        "files": [
            {
                "name": file.name,
                "target": target,
                "bytes": file.bytes,
                "ratio": dense / file.bytes if dense and file.bytes and target != "dense" else None,
            }
            for target, file in files.items()
        ],
        "opset": contents.export.opset if contents.export else None,
        "export": Layers.of(contents.export.layers) if contents.export else None,
        "convert": Layers.of(_from_input_to_output(contents.convert.layers, contents)) if contents.convert else None,
        "before": contents.convert.bytes_before if contents.convert else None,
        "after": contents.convert.bytes_after if contents.convert else None,
    }


def validation(contents: Contents) -> dict[str, Any] | None:
    """Every candidate against its reference, and the tolerance that was asked for."""
    if contents.validate is None:
        return None
    config = contents.artefacts["validate"].manifest.config
    return {
        "passed": contents.validate.passed,
        "candidates": contents.validate.candidates,
        "data": contents.validate.data,
        "note": contents.validate.note,
        "max_relative": _number(config.get("max_relative")),
        "min_agreement": _number(config.get("min_agreement")),
        "fp32": any(candidate.precision != "int8" for candidate in contents.validate.candidates),
        "int8": any(candidate.precision == "int8" for candidate in contents.validate.candidates),
        "int8_max_drop": _number(config.get("int8_max_drop")),
        "int8_max_error": _number(config.get("int8_max_error")),
    }


def speed(contents: Contents) -> dict[str, Any] | None:
    """Timings, a figure for each batch size, the notes of the runs, and the machine."""
    bench = contents.bench
    if bench is None:
        return None
    rows = [{"threads": one.threads, "batch": one.batch, "noisy": bool(one.noisy)} for one in bench.results]
    return {
        "baseline": bench.baseline,
        "results": bench.results,
        "is_baseline": bench.is_baseline,
        "over_int8": any(timing.speedup_over_int8 for timing in bench.results),
        "figures": [*figures.latencies(bench)],
        "notes": [(timing, timing.note) for timing in bench.results if timing.note],
        "noisy": bench.noisy,
        "verdicts": [verdicts.sentence(verdict.model_dump(), rows) for verdict in bench.verdicts],
        "incomplete": any(
            timing.percentile("p90") is None or timing.percentile("p99") is None for timing in bench.results
        ),
        "environment": list(flatten(bench.environment)),
    }


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as lines of (key, value), keys joined with a space; tables in a list are numbered."""
    for key, value in table.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name} ")
        else:
            yield name.removesuffix(" bytes"), _setting(str(key), value)


def _setting(key: str, value: Any) -> str:
    if value is None or value == []:
        return units.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return units.size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(_setting(key, item) for item in value) if isinstance(value, list) else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def subject(contents: Contents) -> dict[str, str | None]:
    """What was trained, on what and how, as the configuration of the training names it."""
    artefact = contents.artefacts.get("train")
    config = artefact.manifest.config if artefact else {}
    named = {key: config.get(key) for key in ("model", "data", "method")}
    return {
        key: str(choice["name"]) if isinstance(choice, Mapping) and "name" in choice else None
        for key, choice in named.items()
    }
