"""Whether an int8 file does what its fp32 network does.

Bytes cannot give the values of fp32, so a quantised file is judged by what it is used for: by its accuracy, or where no
labels are known by the share of samples of the same class, both with the uncertainty of so many samples; and by its
numeric error, which finds files that are broken where there are no classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from sparsepipe.benchmark.statistics import Estimate, as_dict, paired_difference, wilson
from sparsepipe.quantization import noise
from sparsepipe.recipe import Validation
from sparsepipe.runtime.compare import Tally, finite
from sparsepipe.runtime.inputs import Input, rename
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.stages.reference import Network

Array = NDArray[Any]

TRACED = 8
"""Samples on which the noise of layers is measured; all their activations are in memory at once."""
POINTS = 100
WORST = 5


def judge(tally: Tally, limits: Validation) -> tuple[bool, dict[str, Any], list[str]]:
    """Whether a file passes, the figures that this was decided by, and what must be said about them.

    A loss of accuracy (or a share of equal classes) fails only where its whole 95% interval is beyond the limit, so
    that few samples do not fail a file by chance; where the samples do not suffice to tell, a note says so.
    """
    passed, notes = tally.complete, []
    drop = _drop(tally)
    if drop is not None:
        passed &= drop.low * POINTS <= limits.int8_max_drop
        if drop.low * POINTS <= limits.int8_max_drop < drop.high * POINTS:
            notes.append(
                f"With {tally.samples} samples the loss of accuracy is known as {drop.low * POINTS:.2f} to "
                f"{drop.high * POINTS:.2f} points, so that it may be above the limit of {limits.int8_max_drop:g}."
            )
    elif tally.agreeing is not None and tally.samples:
        share = wilson(tally.agreeing, tally.samples)
        passed &= share.high >= limits.int8_min_agreement
        if share.low < limits.int8_min_agreement <= share.high:
            notes.append(
                f"With {tally.samples} samples the share of the same class is known as {share.low:.1%} to "
                f"{share.high:.1%}, so that it may be below the limit of {limits.int8_min_agreement:.1%}."
            )
    error = tally.rms_of_range
    passed &= error <= limits.int8_max_error
    return passed, {"rms_of_range": finite(error), "drop_points": as_dict(drop, POINTS)}, notes


def layers(
    candidate: OnnxNetwork, reference: Network, sample: Mapping[str, Array], taken: Sequence[Input]
) -> list[dict[str, Any]]:
    """The layers that add most noise, worst first, as JSON-able rows: `layer`, `sqnr_db` and `added`.

    Args:
        candidate: the int8 file.
        reference: its network in fp32.
        sample: inputs by name, of some samples.
        taken: what the samples were made for.

    Raises:
        GraphError: one of the two cannot be looked into.
    """
    order = noise.tensors(candidate.model.graph)
    expected = reference.trace(rename(sample, taken, reference.inputs), [tensor.stands_for for tensor in order])
    found = candidate.trace(rename(sample, taken, candidate.inputs), [tensor.name for tensor in order])
    rows = sorted(noise.noise(order, expected, found), key=lambda row: -row.added)
    return [{**asdict(row), "added": finite(row.added)} for row in rows[:WORST]]


def _drop(tally: Tally) -> Estimate | None:
    return paired_difference(tally.lost, tally.gained, tally.samples) if tally.correct is not None else None
