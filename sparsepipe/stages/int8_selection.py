"""Which layers of an int8 export stay fp32, so that it loses no more accuracy than is allowed.

First nothing stays fp32; then the first and the last layer; then more and more of the layers whose int8 form alone
moves the outputs most, by bisection. The samples are of the training split: the test split decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import ModelProto

from sparsepipe.benchmark.statistics import as_dict, paired_difference
from sparsepipe.errors import GraphError
from sparsepipe.graph.finish import serialise
from sparsepipe.progress import bar
from sparsepipe.quantization.calibrate import Feeds, Ranges
from sparsepipe.quantization.sensitivity import fewest, layers, mixed, rank
from sparsepipe.runtime.compare import Tally
from sparsepipe.runtime.samples import Batch
from sparsepipe.runtime.sessions import run, session

log = logging.getLogger("sparsepipe")

POINTS = 100
RANKED_CALLS = 2
"""Calls on which the noise of each layer is measured."""


@dataclass
class Selection:
    """What stays fp32, and what that is worth.

    Attributes:
        kept: output of a layer -> why it stays fp32.
        facts: samples, accuracies and the points lost, JSON-able.
    """

    kept: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def select(
    model: ModelProto, found: Ranges, calibration: Sequence[Feeds], held_out: Sequence[Batch], max_drop: float
) -> Selection:
    """The fewest layers, in the order of their ranking, that have to stay fp32.

    Args:
        model: float32.
        found: the ranges of its activations.
        calibration: the calls that these come from.
        held_out: labelled samples that the calibration did not see.
        max_drop: points of accuracy that may be lost.

    Raises:
        GraphError: even with all layers in fp32 but one, more is lost.
    """
    names = layers(model)
    tried: dict[frozenset[str], dict[str, Any]] = {}
    expected = _run(model, held_out)

    def accurate(fp32: frozenset[str]) -> bool:
        tally = Tally()
        for batch, reference, outputs in zip(
            held_out, expected, _run(mixed(model, found, set(fp32)), held_out), strict=True
        ):
            tally.add(reference, outputs, batch.labels)
        tried[fp32] = _facts(tally)
        lost = tried[fp32]["drop_points"]["value"]
        log.info("%d of %d layers in fp32: %.2f points lost.", len(fp32), len(names), lost)
        return bool(lost <= max_drop)

    if accurate(frozenset()):
        return Selection({}, {"max_drop": max_drop, **tried[frozenset()]})
    ends = dict(zip((names[0], names[-1]), ("first layer", "last layer"), strict=True)) if names else {}
    if ends and len(names) > len(ends) and accurate(frozenset(ends)):
        kept = {name: _reason(reason) for name, reason in ends.items()}
        return Selection(kept, {"max_drop": max_drop, **tried[frozenset(ends)]})
    with bar("Layers in int8", len(names)) as progress:
        ranked = rank(model, found, calibration[:RANKED_CALLS], lambda note: progress.advance(note=note))
    noise = {one.output: f"alone in int8 it leaves the outputs at {one.sqnr_db:.1f} dB" for one in ranked}
    order = [*ends, *(one.output for one in ranked if one.output not in ends)]
    # The set of all layers is the network in fp32, which is no int8 file.
    sets = [frozenset(order[:count]) for count in range(len(ends) + 1, len(order))]
    chosen = fewest(sets, accurate)
    if chosen is None:
        least = min((facts["drop_points"]["value"] for facts in tried.values()), default=0.0)
        raise GraphError(
            f"No int8 file is within {max_drop:g} points of fp32: the best loses {least:.2f} on "
            f"{next(iter(tried.values()))['samples']} samples, with all layers but one in fp32.",
            where=model.graph.name or "model",
            advice="Allow more with --max-drop, calibrate on more samples or by another --calibration, or train it "
            "with train.precision = 'int8-qat'.",
        )
    kept = {name: _reason(ends.get(name) or noise[name]) for name in order if name in chosen}
    return Selection(kept, {"max_drop": max_drop, **tried[chosen]})


def _reason(why: str) -> str:
    return f"stays fp32 for --max-drop: {why}"


def _run(model: ModelProto, batches: Sequence[Batch]) -> list[list[Any]]:
    opened = session(serialise(model, where=model.graph.name), library=False)
    return [batch.outputs(run(opened, batch.inputs)) for batch in batches]


def _facts(tally: Tally) -> dict[str, Any]:
    if tally.correct is None or tally.reference_correct is None or not tally.samples:
        raise GraphError(
            tally.problem or "The network does not give scores of classes, so there is no accuracy to keep.",
            where="export.max_drop",
            advice="Leave --max-drop out.",
        )
    return {
        "samples": tally.samples,
        "accuracy": tally.correct / tally.samples,
        "fp32_accuracy": tally.reference_correct / tally.samples,
        "drop_points": as_dict(paired_difference(tally.lost, tally.gained, tally.samples), POINTS),
    }
