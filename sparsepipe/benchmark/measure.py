"""Decide layer by layer by timing: what `sparsepipe export --measure` does on the machine that it runs on.

Each layer that could go sparse is timed alone at its place's sizes: dense as onnxruntime fuses it, and sparse with each
block and each mode, in turn, by CPU time in one thread. Then the whole network is timed, sparse against dense; where
it is not faster, the layers that save least go back to dense until it is, or all do.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from sparsepipe.benchmark.candidates import Candidate, Form, candidates_of
from sparsepipe.benchmark.interleaved import interleave
from sparsepipe.benchmark.layers import bound_call, copies_of, layer_times
from sparsepipe.errors import GraphError
from sparsepipe.graph.choice import Choice, balanced, dense_again, settle
from sparsepipe.graph.sizes import sizes_of
from sparsepipe.graph.universal import rewrite
from sparsepipe.graph.verdict import Network
from sparsepipe.runtime import library_path
from sparsepipe.runtime.inputs import random_inputs
from sparsepipe.runtime.network import OnnxNetwork

WINS_BELOW = 0.95
"""A layer goes sparse, and in another mode than the kernel would choose, only where that takes less of the time."""
WHOLE_BELOW = 0.98
"""The whole network must take less than this share of the dense time."""
LAYERS_SHARE = 0.7
"""Share of the time that is for single layers; the rest is for the whole network."""
ATTEMPTS = 4
"""How often the weaker half of the sparse layers is given up before all are."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """What measuring found.

    Attributes:
        choices: a row for each node with a constant weight, as `universal.choose` gives them.
        ratio: time of the whole network in times of the dense one; None where every layer stays dense.
        dense_ms: milliseconds of the dense network; None where there was nothing to compare.
        timed: layers that were timed, or are like one that was.
        missed: layers that the time did not suffice for.
    """

    choices: list[Choice]
    ratio: float | None = None
    dense_ms: float | None = None
    timed: int = 0
    missed: int = 0


def measure(
    model: ModelProto,
    choices: Sequence[Choice],
    seconds: float,
    progress: Callable[[float, str], None] = lambda share, note: None,
) -> Outcome:
    """Choose anew by timing, with one thread and batch 1.

    Free sizes are taken as validation takes them: images of 224 x 224, sequences of 16.

    Args:
        model: without batch normalisations.
        choices: what the cost model made of it.
        seconds: of timing, about. Layers that it does not suffice for stay as they are in `choices`.
        progress: called with the share of `seconds` that is over and the name of what is timed next.

    Raises:
        GraphError: the kernel library was not built, or onnxruntime cannot run the model.
    """
    if library_path() is None:
        raise GraphError(
            "Layers cannot be measured: the kernel library was not built.",
            where="export --measure",
            advice="Install sparsepipe where there is a C++ compiler (`sparsepipe doctor` says more), or leave out "
            "--measure: the cost model then decides.",
        )
    progress(0.0, "preparing layers")
    feeds = _feeds(model)
    sizes = sizes_of(model, {name: value.shape for name, value in feeds.items()}).sizes
    rows: dict[str, Choice] = {}
    saved: dict[str, float] = {}
    groups = _groups(candidates_of(model, choices, sizes))
    streamed = Network.of(model).streamed
    started = time.perf_counter()
    for done, group in enumerate(groups):
        left = started + seconds * LAYERS_SHARE - time.perf_counter()
        if left <= 0:
            for candidate in group:
                row = candidate.choice
                rows[row.output] = replace(row, reason=f"{row.reason}; not measured, the time was over")
            continue
        progress(LAYERS_SHARE - left / seconds, group[0].choice.node)
        copies = copies_of(4 * group[0].choice.size) if streamed else 1
        dense, form, sparse = _time(group[0], left / (len(groups) - done), copies)
        for candidate in group:
            rows[candidate.choice.output] = _decided(candidate.choice, form, dense, sparse)
            saved[candidate.choice.output] = dense - sparse
    progress(LAYERS_SHARE, "the whole network")
    decided = balanced(model, [rows.get(choice.output, choice) for choice in choices], sizes)
    outcome = _whole(model, decided, saved, feeds, (1 - LAYERS_SHARE) * seconds)
    progress(1.0, "")
    return replace(outcome, timed=len(saved), missed=sum(map(len, groups)) - len(saved))


def _feeds(model: ModelProto) -> dict[str, Array]:
    """Inputs as validation makes them up, at batch 1 or the one that the network fixes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        network = OnnxNetwork(path)
        batch = next((entry.batch for entry in network.inputs if len(entry.shape) > 1 and entry.batch), 1)
        return random_inputs(network.inputs, batch, 0, network.index_bounds())


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Layers that share a measurement; first those with most values, for the time may not suffice for all."""
    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.key, []).append(candidate)
    return sorted(groups.values(), key=lambda group: -sum(candidate.choice.size for candidate in group))


def _time(candidate: Candidate, seconds: float, copies: int) -> tuple[float, Form, float]:
    """Nanoseconds of the dense layer, its fastest form, and that one's nanoseconds."""
    dense, *times = layer_times(
        candidate.forms[0].model, [form.model for form in candidate.forms], candidate.inputs, seconds, copies=copies
    )
    pairs = list(zip(times, candidate.forms, strict=True))
    kernel_decides = [pair for pair in pairs if pair[1].mode == "auto"]
    best, form = min(kernel_decides, key=lambda pair: pair[0])
    for taken, other in pairs:
        if other.mode != "auto" and taken < WINS_BELOW * best:
            best, form = taken, other
    return dense, form, best


def _decided(choice: Choice, form: Form, dense: float, sparse: float) -> Choice:
    """The row of a layer that takes so many nanoseconds dense, and in this form."""
    ratio = sparse / dense
    mode = f", mode {form.mode}" if form.mode != "auto" else ""
    reason = f"measured {ratio:.2f} of the dense time (predicted {choice.predicted[form.block]:.2f}){mode}"
    choice = replace(choice, measured=round(ratio, 4), dense_us=round(dense / 1e3, 3))
    if ratio >= WINS_BELOW:
        return dense_again(choice, f"{reason}: pays below {WINS_BELOW}")
    size = form.bytes if choice.dense_bytes else 0  # an earlier row counts a weight that is shared
    return replace(choice, sparse=True, block=form.block, mode=form.mode, bytes=size, reason=reason, kernel=form.kernel)


def _whole(
    model: ModelProto, choices: list[Choice], saved: Mapping[str, float], feeds: Mapping[str, Array], seconds: float
) -> Outcome:
    """Give up the layers that save least until the network as a whole is faster than the dense one."""
    dense = bound_call(model, feeds)
    dense_ms = None
    for attempt in range(ATTEMPTS):
        # Layers that were not measured go first: there is only a prediction for them.
        sparse = sorted(
            (choice for choice in choices if choice.sparse), key=lambda choice: saved.get(choice.output, -math.inf)
        )
        if not sparse:
            break
        timings = interleave([dense, bound_call(rewrite(model, choices), feeds)], seconds / 2 ** (attempt + 1))
        dense_ms = timings[0].best_decile / 1e6
        ratio = timings[1].best_decile / timings[0].best_decile
        if ratio < WHOLE_BELOW:
            return Outcome(choices, ratio, dense_ms)
        kept = {choice.output for choice in sparse[(len(sparse) + 1) // 2 :]} if attempt < ATTEMPTS - 1 else set()
        reason = f"; but the whole network took {ratio:.2f} of the dense time, and this layer saves little"
        rows = [
            dense_again(choice, choice.reason + reason) if choice.sparse and choice.output not in kept else choice
            for choice in choices
        ]
        choices = settle(model, rows)
    return Outcome(choices, dense_ms=dense_ms)
