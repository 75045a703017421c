"""What each operator of a network takes, by onnxruntime's own profiler, and which layer of the file it belongs to.

onnxruntime fuses and renames operators before it runs them. An operator is found again by what it is called, by the
tensors that it writes, and by the constants that it reads, which keep their names where they keep their values.
"""

from __future__ import annotations

import json
import math
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from sparsepipe.errors import GraphError, one_line
from sparsepipe.graph.index import index
from sparsepipe.graph.select import WEIGHT_INPUTS
from sparsepipe.native.operators import DOMAIN
from sparsepipe.runtime.sessions import run, session

NCHWC_ENDING = "_nchwc"
TIME_ENDING = "_kernel_time"
WARM_UP_CALLS = 3
FASTER_HALF = (10, 50)
"""Percentiles: what else runs on a machine makes calls longer only, so these come nearest to an operator's own time."""
Array = NDArray[Any]


@dataclass(frozen=True)
class NodeTime:
    """One operator as it was run.

    Attributes:
        name: that onnxruntime gave it.
        op: its operator after fusion.
        us: microseconds of one call: the mean of the calls from the first decile to the median, since single
            ones are whole numbers.
        bytes: of the activations that it reads and the output that it writes; what it reads of weights the profiler
            does not tell, where onnxruntime has packed them.
        layer: name of the node of the file whose layer it computes; None for other work.
    """

    name: str
    op: str
    us: float
    bytes: int
    layer: str | None


@dataclass(frozen=True)
class Profile:
    """The operators of a network in the order in which they ran.

    `between_us` are the microseconds of a call in which none ran: onnxruntime's own work, and the profiler's.
    """

    nodes: list[NodeTime]
    between_us: float
    calls: int

    @property
    def us(self) -> float:
        """Of a call: the sum of its parts, each as it was found, so that a disturbed call does not count."""
        return self.between_us + sum(node.us for node in self.nodes)


class Profiler:
    """A session that is profiled; use it as a context manager and call it many times.

    Args:
        model: with a name of its own for each node (`named`).
        layers: name of a node with a weight -> name of that weight as the file stores it. The node's name is the key.
        threads: of one operator.

    Raises:
        GraphError: onnxruntime cannot load it, or it is too large to be held in memory twice.
    """

    def __init__(self, model: ModelProto, layers: Mapping[str, str], threads: int) -> None:
        self._model, self._layers = model, layers
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsepipe-")))
        try:
            self._optimised = folder / "optimised.onnx"
            try:
                data = model.SerializeToString()
            except Exception as error:  # protobuf's limit of 2 GB
                raise GraphError(f"The network cannot be profiled: {one_line(error)}") from error
            self._session = session(
                data,
                threads=threads,
                enable_profiling=True,
                profile_file_prefix=str(folder / "profile"),
                optimized_model_filepath=str(self._optimised),
            )
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def call(self, feeds: Mapping[str, Array]) -> list[Array]:
        """One call that is profiled."""
        return run(self._session, feeds)

    def result(self) -> Profile:
        """What the calls took, without the first few."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8", errors="replace"))
        times: dict[str, list[float]] = defaultdict(list)
        facts: dict[str, Mapping[str, Any]] = {}
        runs = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "model_run")
        busy = dict.fromkeys(runs, 0)
        for event in events:
            name = str(event.get("name", ""))
            if event.get("cat") == "Node" and name.endswith(TIME_ENDING):
                key = name.removesuffix(TIME_ENDING)
                times[key].append(event["dur"])
                facts.setdefault(key, event["args"])
                last = bisect_right(runs, (event["ts"], math.inf)) - 1
                busy[runs[last]] += event["dur"]
        owners = _owners(self._model, onnx.load(self._optimised, load_external_data=False), self._layers)
        nodes = [
            NodeTime(
                name=name,
                op=facts[name]["op_name"],
                us=_per_call(taken, len(runs)),
                bytes=sum(int(facts[name].get(key, 0)) for key in ("activation_size", "output_size")),
                layer=owners.get(name),
            )
            for name, taken in times.items()
        ]
        between = [max(duration - busy[started, duration], 0) for started, duration in runs]
        return Profile(nodes, _usual(between[WARM_UP_CALLS:] or between), len(runs) - WARM_UP_CALLS)


def named(model: ModelProto) -> ModelProto:
    """The model with a name of its own for each node of the graph, in place; names that are unique stay."""
    taken: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}#{position}"
        taken.add(node.name)
    return model


def _per_call(taken: Sequence[float], runs: int) -> float:
    """An operator inside of a loop runs several times in a call."""
    times = max(len(taken) // runs, 1)
    calls = [sum(taken[start : start + times]) for start in range(0, len(taken) - times + 1, times)]
    return _usual(calls[WARM_UP_CALLS:] or calls)


def _usual(values: Sequence[float]) -> float:
    low, high = np.percentile(values, FASTER_HALF)
    return float(np.mean([value for value in values if low <= value <= high]))


def _owners(model: ModelProto, optimised: ModelProto, layers: Mapping[str, str]) -> dict[str, str]:
    """Name of an operator that ran -> key of its layer."""
    found = index(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    readers: dict[str, set[str]] = defaultdict(set)  # constant -> the layers that read it
    for name, weight in layers.items():
        if name not in nodes:  # one operator stands for several layers
            continue
        for read in (weight, *nodes[name].input[1:]):
            if read in found.stored:
                readers[read].add(name)
    owners = {}
    for node in optimised.graph.node:
        if node.domain != DOMAIN and node.op_type not in WEIGHT_INPUTS:
            continue
        origins = [node.name, node.name.removesuffix(NCHWC_ENDING), *node.output]
        direct = next((name for name in origins if name in layers), None)
        read = {name for tensor in node.input for name in readers.get(tensor, ())}
        if direct is None and len(read) == 1:
            direct = read.pop()
        if direct is None:
            written = next((found.producers[name] for name in origins[1:] if name in found.producers), None)
            direct = _above(written, node.op_type, found.producers, layers) if written is not None else None
        if direct is not None:
            owners[node.name] = direct
    return owners


def _above(node: NodeProto, op_type: str, producers: Mapping[str, NodeProto], layers: Mapping[str, str]) -> str | None:
    """The layer that `node` is, or that it was fused with: the nearest one above it."""
    level = [node]
    for _ in range(len(producers)):
        direct = next((one.name for one in level if one.name in layers), None)
        if direct is not None:
            return direct
        # A product of two activations has no weight, and what stands above it is not part of it.
        level = [
            producers[name]
            for one in level
            if one.op_type not in WEIGHT_INPUTS
            for name in one.input
            if name in producers
        ]
        if not level:
            break
    return None
